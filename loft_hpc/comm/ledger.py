"""The byte ledger: what every collective carried, kept apart by operation and purpose."""

from dataclasses import asdict, dataclass, field

PURPOSES = ("partitioned", "shared", "activation", "gradient", "merge", "control")
"""`merge`: putting the full network together for an evaluation, a snapshot or a checkpoint, where the steps leave it in parts."""

MOST = 2**63
"""No count reaches it."""
OPERATIONS = ("allreduce", "allgather", "alltoall", "broadcast", "send", "receive")


@dataclass
class Entry:
    """Totals of one operation with one purpose on one rank, in bytes."""

    calls: int = 0
    payload_sent_bytes: int = 0
    """What the algorithm handed over: this rank's input to the collective."""
    payload_received_bytes: int = 0
    """What the algorithm got: the result that the collective delivered to this rank."""
    wire_sent_bytes: int = 0
    """What the textbook algorithm makes this rank send: ring (all-reduce, all-gather), chain (broadcast), pairs (all-to-all), the
    message itself (send, receive); see docs/communication.md."""
    wire_received_bytes: int = 0
    poster_bytes: int = 0
    """The poster's accounting, where it applies: what this worker uploads in an exchange, 4 * (its partitioned + shared)."""

    def add(self, other: "Entry") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Ledger:
    """Entries by operation and purpose, for one rank or for all together."""

    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def record(self, operation: str, purpose: str, entry: Entry) -> None:
        if purpose not in PURPOSES:
            raise ValueError(f"unknown purpose {purpose!r}")
        self.entries.setdefault(operation, {}).setdefault(purpose, Entry()).add(entry)

    def entry(self, operation: str, purpose: str) -> Entry:
        """The totals of one row; zeros where nothing was recorded."""
        return self.entries.get(operation, {}).get(purpose, Entry())

    @property
    def payload_bytes(self) -> tuple[int, int]:
        """(sent, received), over all operations and purposes."""
        entries = [entry for purposes in self.entries.values() for entry in purposes.values()]
        return sum(entry.payload_sent_bytes for entry in entries), sum(entry.payload_received_bytes for entry in entries)

    def add(self, other: "Ledger") -> None:
        for operation, purposes in other.entries.items():
            for purpose, entry in purposes.items():
                self.record(operation, purpose, entry)

    def to_json(self) -> dict:
        return {
            operation: {purpose: asdict(entry) for purpose, entry in sorted(purposes.items())}
            for operation, purposes in sorted(self.entries.items())
        }

    @classmethod
    def from_json(cls, fields: dict) -> "Ledger":
        """The inverse of `to_json`. Raises TypeError, AttributeError or ValueError for anything else."""
        ledger = cls()
        for operation, purposes in fields.items():
            if operation not in OPERATIONS:
                raise ValueError(f"unknown operation {operation!r}")
            for purpose, entry in purposes.items():
                if any(type(value) is not int or not 0 <= value < MOST for value in entry.values()):
                    raise ValueError(f"{operation} {purpose} is not counted in whole numbers")
                ledger.record(operation, purpose, Entry(**entry))
        return ledger


def ring_allreduce(elements: int, element_bytes: int, rank: int, size: int) -> tuple[int, int]:
    """(sent, received) bytes of `rank` in a ring all-reduce: reduce-scatter, then all-gather, S-1 steps each.

    The buffer is cut into S chunks, the first `elements % S` of them one element longer. In the reduce-scatter rank r sends
    every chunk but r+1, in the all-gather every chunk but r+2: 2(S-1)/S of the buffer on average, 2(S-1) buffers in total.
    """
    if size == 1:
        return 0, 0

    def chunk(index: int) -> int:
        index %= size
        return elements // size + (index < elements % size)

    sent = 2 * elements - chunk(rank + 1) - chunk(rank + 2)
    received = 2 * elements - chunk(rank) - chunk(rank + 1)
    return sent * element_bytes, received * element_bytes


def ring_allgather(counts: list[int], element_bytes: int, rank: int) -> tuple[int, int]:
    """(sent, received) bytes of `rank` in a ring all-gather of `counts[r]` elements from each rank r.

    A rank receives every block but its own, and passes on every block but the one that its successor started with.
    """
    total, size = sum(counts), len(counts)
    if size == 1:
        return 0, 0
    return (total - counts[(rank + 1) % size]) * element_bytes, (total - counts[rank]) * element_bytes


def chain_broadcast(elements: int, element_bytes: int, rank: int, size: int, root: int = 0) -> tuple[int, int]:
    """(sent, received) bytes of `rank` in a chain from the root: everyone but the last sends, everyone but the root receives."""
    place = (rank - root) % size
    whole = elements * element_bytes
    return whole * (place < size - 1), whole * (place > 0)
