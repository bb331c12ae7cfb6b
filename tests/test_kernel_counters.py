"""The ledger against the kernel: trainings over network namespaces, a host for each rank, whose interfaces count what is sent."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bin" / "reports"))

from hosts import available
from kernel import CASES, TOTALS_HEADER, TrainingFailed, measure, totals_row

pytestmark = pytest.mark.namespaces

RANKS = 4
SECONDS = 180

# Of what the ledger counts. Packet headers were 0.2 %, for a packet here holds up to 64 kB; the rest is for what is sent again.
OVERHEAD = 0.01
# What MPI adds to its messages.
UNCOUNTED = 0.001
# The launcher's wiring up, and Horovod's negotiation, which goes on as long as the training does: half of a megabyte was seen.
ONCE_BYTES = 2_000_000


@pytest.fixture(scope="module", autouse=True)
def _hosts_can_be_made():
    reason = available()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_is_what_the_kernel_sent(name):
    try:
        measured = measure(name, RANKS, seconds=SECONDS)
    except TrainingFailed as problem:
        pytest.fail(f"{name}: {problem}")
    table = f"\n{TOTALS_HEADER}\n{totals_row(measured)}\n{measured}"
    # Whatever the ledger counts travelled, and from the host of the rank that counts it.
    for contents, ledger in zip(measured.contents_bytes, measured.ledger_bytes, strict=True):
        assert contents >= ledger, table
    # Whatever travelled is in the ledger.
    assert measured.uncounted_bytes <= UNCOUNTED * measured.ledger + ONCE_BYTES, table
    assert measured.overhead_bytes <= OVERHEAD * measured.ledger + ONCE_BYTES, table
    # The bounds above say something only where the training outweighs the start.
    assert measured.ledger > 50 * ONCE_BYTES, table
