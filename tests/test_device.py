"""What suits a GPU, as far as a CPU can show it: no step asks the device for a number, buffers are aligned, precisions are refused."""

import os
import shutil
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loft_hpc.comm.alone import Alone
from loft_hpc.data.embedded import digits
from loft_hpc.errors import LoftError
from loft_hpc.filterwise.partition import deal
from loft_hpc.filterwise.subnetwork import SubNetwork
from loft_hpc.jobs.pretrain import PretrainSettings
from loft_hpc.models.architecture import Architecture, architecture
from loft_hpc.models.groups import filter_groups, partitioned_groups
from loft_hpc.models.resnet import build
from loft_hpc.training.buffers import Layout, ParameterBuffer
from loft_hpc.training.device import place, precision_here
from loft_hpc.training.evaluation import judge, network_for
from loft_hpc.training.settings import Computation, Evaluation
from loft_hpc.training.stopwatch import Stopwatch

from tiny import CPU, initial_state, make_loft, tiny


class Asked(TorchDispatchMode):
    """Counts how often somebody asks for the number in a tensor: on a GPU, each waits until all that was queued is done."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        listing = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: self._counted(listing, tensor))

    def _counted(self, listing, tensor):
        self.count += 1
        return listing(tensor)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_no_step_asks_the_device_for_a_number(monkeypatch):
    """As many questions in a round of 9 steps as in one of 3: those about its losses."""
    counts = []
    for steps in (3, 9):
        training = make_loft(Alone(), local_iterations=steps, rounds=9)
        training.advance()
        with Asked(monkeypatch) as asked:
            assert training.advance().step == 2 * steps
        counts.append(asked.count)
        monkeypatch.undo()
    assert counts[0] == counts[1] > 0


def test_an_evaluation_asks_no_more_for_more_batches(monkeypatch):
    counts = []
    for batches in (2, 8):
        network = network_for(tiny(), None, initial_state(tiny()), CPU, "")
        settings = Evaluation(statistics_batches=batches, evaluation_batch=360 // batches)
        with Asked(monkeypatch) as asked:
            judge(network, digits(CPU), settings, Alone())
        counts.append(asked.count)
        monkeypatch.undo()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("model", ["resnet20", "preresnet18"])
def test_convolutions_are_aligned_for_any_number_of_workers(model, workers):
    """To 16 bytes, without padding: a buffer is as long as what lies in it."""
    network = architecture(model, 10)
    groups = partitioned_groups(filter_groups(network), "all-blocks")
    for worker in range(workers):
        sub = SubNetwork(network, groups, worker, workers, CPU, momentum_travels=False)
        for buffer in (sub.shared, sub.partitioned):
            assert sum(view.numel() for view in buffer.views.values()) == buffer.layout.numel == len(buffer.values)
            assert all(view.data_ptr() % 16 == 0 for view in buffer.views.values() if view.dim() == 4)
        initial = {name: parameter.detach() for name, parameter in build(network, seed=0).named_parameters()}
        sub.load(initial, deal(groups, workers, 0, 0)[worker])
        assert all(view.isfinite().all() for view in sub.partitioned.views.values())


def test_a_ticket_of_odd_widths_is_aligned():
    network = architecture("resnet20", 10)
    widths = {group.name: 5 for group in filter_groups(network)}
    buffer = ParameterBuffer(dict(build(network, widths, seed=0).named_parameters()))
    assert all(view.data_ptr() % 16 == 0 for view in buffer.views.values() if view.dim() == 4)


def test_where_all_is_aligned_the_order_stays():
    shapes = {"a": (4, 4), "b": (8,), "c": (10,), "d": (3,)}
    assert list(Layout(shapes).offsets.items()) == [("a", 0), ("b", 16), ("c", 24), ("d", 34)]
    assert Layout({"a": (3,), "b": (8,), "c": (4,)}).offsets == {"b": 0, "c": 8, "a": 12}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_precisions_of_gpus_are_for_gpus():
    for precision in ("tf32", "bfloat16"):
        with pytest.raises(LoftError, match=f"--precision {precision} is for GPUs"):
            place("cpu", precision, Alone())
        assert precision_here(precision, "auto") == "auto"
    threads = torch.get_num_threads()
    for precision in ("auto", "float32"):
        assert place("cpu", precision, Alone())[1].precision == "float32"
        assert precision_here(precision, "auto") == precision
    torch.set_num_threads(threads)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_network_learns_the_same_but_for_rounding():
    losses, states = [], []
    for compiled in (False, True):
        training = make_loft(
            Alone(), Architecture("small", (1, 2), (4, 8), False, 1, "cifar", 1, 10), computation=Computation(compile=compiled)
        )
        losses.append([training.advance().mean_loss for _ in range(4)])
        states.append(training.full_state())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][0] != losses[0][-1]
    for name, there in states[0].items():
        torch.testing.assert_close(states[1][name], there, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LoftError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler here"):
        place("cpu", "float32", Alone(), compile=True)
    with pytest.raises(LoftError, match="--compile is for loft and data-parallel"):
        PretrainSettings(strategy="gpipe", computation=Computation(compile=True))


def test_a_stopwatch_counts_what_runs_and_begins_anew():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
    time.sleep(0.02)
    assert 0.04 <= watch.take() < 0.06 + 1
    assert watch.take() == 0
