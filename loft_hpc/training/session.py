"""From the first step to the last: epochs, evaluation, snapshots, checkpoints and the log, whatever the strategy."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.errors import Interrupted, LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.runs.run import Run
from loft_hpc.training.evaluation import Score, judge, network_for
from loft_hpc.training.interruption import Interruption
from loft_hpc.training.interval import next_multiple, passes
from loft_hpc.training.settings import Evaluation, Optimisation, Snapshots
from loft_hpc.training.strategy import Advance, Strategy
from loft_hpc.training.watching import Observer, Watcher


@dataclass(frozen=True)
class Outcome:
    """What a session achieved, the same on every rank."""

    score: Score
    wall_seconds: float
    """Of the training with its evaluations, over all legs of a run that was interrupted."""
    steps: int
    """Local steps done: fewer than planned where the training was ended early."""
    stopped_early: bool = False


class _Clock:
    """Wall time since the training began, in seconds."""

    def __init__(self) -> None:
        self.start_at(0.0)

    def start_at(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


class _Stretch:
    """What happened since the last epoch ended."""

    def __init__(self, first_step: int, began_seconds: float):
        self.first_step, self.began_seconds = first_step, began_seconds
        self.steps, self.exchange_seconds, self.losses = 0, 0.0, 0.0

    def add(self, done: Advance, steps: int) -> None:
        self.steps += steps
        self.losses += done.mean_loss * steps
        self.exchange_seconds += done.exchange_seconds

    @property
    def mean_loss(self) -> float:
        return self.losses / self.steps


class Session:
    """Runs a strategy to its end and leaves a complete run on disk, written by rank 0 alone."""

    def __init__(
        self, strategy: Strategy, architecture: Architecture, hidden_widths: Mapping[str, int] | None, data: DataSet,
        optimisation: Optimisation, evaluation: Evaluation, snapshots: Snapshots, run: Run, world: World,
        device: torch.device, watcher: Watcher, observer: Observer | None = None,
    ):  # fmt: skip
        self._strategy, self._data, self._world, self._watcher = strategy, data, world, watcher
        self._run = run if world.rank == 0 else None
        self._path = run.path
        self._optimisation, self._evaluation = optimisation, evaluation
        self._full_snapshots, self._snapshot_name = snapshots.snapshot_tensors, run.snapshots.name
        self._snapshot_steps = snapshots.every.steps(strategy.steps_per_epoch)
        self._watched, self._observer = observer is not None, observer
        self._distance: float | None = None
        # One full network for evaluations, filled anew each time.
        self._network = network_for(architecture, hidden_widths, strategy.full_state(), device, "the initial state")
        self._interruption = Interruption()
        self._step = 0
        self._stretch: _Stretch | None = None
        self._clock = _Clock()

    def run(self, checkpoint: Checkpoint | None = None) -> Outcome:
        """Train, from the beginning or from a checkpoint. Collective."""
        with self._interruption, self._run.failures_recorded() if self._run else nullcontext():
            if checkpoint:
                self._resume(checkpoint)
            if self._run:
                self._run.forget_after(self._step if checkpoint else -1)
            outcome = self._train()
        if self._run:
            score = outcome.score
            results = {"accuracy": score.accuracy, "test_loss": score.loss, "wall_seconds": outcome.wall_seconds}
            self._run.finish("done", results | {"steps": outcome.steps, "stopped_early": outcome.stopped_early})
        self._world.barrier()
        return outcome

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint left off, its ledger included."""
        self._strategy.restore(checkpoint)
        self._world.ledger = Ledger()
        for ledger in checkpoint.ledgers[self._world.rank :: self._world.size]:  # one, unless it is another number of ranks
            self._world.ledger.add(ledger)
        self._step = checkpoint.step
        seconds = float(checkpoint.progress.get("wall_seconds", 0))
        self._clock.start_at(seconds)
        begun = checkpoint.progress.get("epoch_so_far")
        if begun:  # written in the middle of an epoch
            self._stretch = _Stretch(int(begun["first_step"]), seconds - float(begun["seconds"]))
            self._stretch.steps = self._step - self._stretch.first_step
            losses = begun["losses"]
            self._stretch.losses = float(losses[self._world.rank] if len(losses) == self._world.size else sum(losses) / len(losses))
            self._stretch.exchange_seconds = float(begun["exchange_seconds"])

    def _train(self) -> Outcome:
        strategy, total, per_epoch = self._strategy, self._strategy.total_steps, self._strategy.steps_per_epoch
        epochs, watch = math.ceil(total / per_epoch), self._clock
        self._watcher.started(str(self._path), total, self._step)
        if self._step == 0:
            self._snapshot(last=False)
        # A run that was interrupted just after its stop was decided stays stopped.
        stop = self._step > 0 and self._watched and self._world.on_root(lambda: self._observer.stop)
        score, stretch = None, self._stretch or _Stretch(self._step, watch.seconds)
        told = False
        while self._step < total and not stop:
            begin, anybody = self._step, self._world.anybody(told or self._interruption.requested)
            done = strategy.advance(min(total, *(next_multiple(begin, every) for every in (per_epoch, self._snapshot_steps) if every)))
            self._step = done.step
            stretch.add(done, done.step - begin)
            self._watcher.advanced(done.step, done.mean_loss)
            if done.rounds is not None:
                self._log("round", round=done.rounds, step=done.step, loss=done.mean_loss, exchange_seconds=done.exchange_seconds)
            seconds, last = watch.seconds - stretch.began_seconds, done.step >= total
            if last or passes(begin, done.step, self._snapshot_steps):
                stop = self._snapshot(last) and not last
                stretch.began_seconds = watch.seconds - seconds  # its own time does not count
            whole = passes(stretch.first_step, done.step, per_epoch)
            told = anybody()
            if not (last or stop or whole):
                if told and strategy.settled:
                    self._leave(stretch, seconds)
                continue
            epoch = done.step // per_epoch if whole and not last else math.ceil(done.step / per_epoch)
            loss = self._mean_over_ranks(stretch.mean_loss)
            self._log(
                "epoch", epoch=epoch, step=done.step, loss=loss, lr=self._optimisation.lr_at(done.step - 1, total),
                train_wall_seconds=seconds, exchange_seconds=stretch.exchange_seconds,
                images_per_second_per_rank=stretch.steps * strategy.batch_images / seconds,
            )  # fmt: skip
            score = self._end_of_epoch(epoch, stretch.first_step // per_epoch, last or stop)
            self._watcher.epoch_ended(epoch, epochs, loss, score, self._distance, seconds)
            stretch = _Stretch(done.step, watch.seconds)
            if told and not (last or stop):
                self._leave(None, 0.0)
        if stop:
            self._watcher.stopped(self._step / per_epoch, epochs)
        if score is None:  # resumed at the very end
            score = self._judge(strategy.full_state())
        ledgers = self._world.gather_objects(self._world.ledger)
        if self._run:
            self._run.write_ledger(ledgers)
            self._run.write_model(self._network.state_dict())
        return Outcome(score, watch.seconds, self._step, stopped_early=self._step < total)

    def _leave(self, stretch: _Stretch | None, seconds: float) -> None:
        """End here, because some rank was told to. Raises Interrupted on all of them, with everything on disk to go on from."""
        if stretch:
            self._write_checkpoint(stretch=stretch, seconds=seconds)
        if self._run:
            self._run.interrupt(self._step)
        raise Interrupted(f"{self._path}: told to end, checkpoint written after step {self._step}; go on with --resume")

    def _snapshot(self, last: bool) -> bool:
        """Record the filters' scores, and the full network where it is asked for; whether the observer wants to stop here.

        The first and the last network are recorded in full in any case: to rewind to, and to draw tickets from.
        """
        scores, stop = self._strategy.filter_scores(), False
        if self._run:
            self._run.snapshots.write_scores(self._step, scores)

        def observe() -> tuple[float | None, bool]:
            seen = self._observer.see(scores)
            if seen.fields:
                self._log("snapshot", epoch=self._step / self._strategy.steps_per_epoch, step=self._step, **seen.fields)
            return seen.distance, seen.stop

        if self._watched:
            self._distance, stop = self._world.on_root(observe)
        if self._full_snapshots or last or stop or self._step == 0:
            state = self._strategy.full_state()
            if self._run:
                self._run.snapshots.write(self._snapshot_name(self._step), state)
        return stop

    def _end_of_epoch(self, epoch: int, earlier: int, last: bool) -> Score | None:
        """Evaluation, when it is due (a round may end several epochs after the `earlier` one), and a checkpoint."""
        score = None
        if last or passes(earlier, epoch, self._evaluation.evaluate_every):
            score = self._judge(self._strategy.full_state())
            self._log("eval", epoch=epoch, step=self._step, accuracy=score.accuracy, test_loss=score.loss, test_images=score.images)
        self._write_checkpoint(epoch=epoch)
        return score

    def _write_checkpoint(self, epoch: int | None = None, stretch: _Stretch | None = None, seconds: float = 0.0) -> None:
        """Everything to go on from, at the end of `epoch` or in the middle of one: then with its `stretch` and `seconds` so far."""
        tensors, progress = self._strategy.checkpoint()
        if stretch:
            losses = self._world.gather_objects(stretch.losses)
            so_far = {"first_step": stretch.first_step, "losses": losses, "exchange_seconds": stretch.exchange_seconds, "seconds": seconds}
            progress = progress | {"epoch_so_far": so_far}
        ledger = Ledger()
        ledger.add(self._world.ledger)
        ledgers = self._world.gather_objects(ledger)
        if self._run:
            sent, received = (sum(way) for way in zip(*(ledger.payload_bytes for ledger in ledgers), strict=True))
            if epoch is not None:
                self._log("ledger", epoch=epoch, step=self._step, payload_sent_bytes=sent, payload_received_bytes=received)
            progress = progress | {"wall_seconds": self._clock.seconds}
            self._run.checkpoints.write(Checkpoint(self._step, tensors, ledgers, progress))

    def _judge(self, state: Mapping[str, Tensor]) -> Score:
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                parameter.copy_(state[name])
        return judge(self._network, self._data, self._evaluation, self._world)

    def _mean_over_ranks(self, loss: float) -> float:
        """The loss averaged over the ranks. Raises LoftError, on all of them, when it is no number any more."""
        losses = torch.zeros(self._world.size, dtype=torch.float64)
        losses[self._world.rank] = loss
        self._world.all_reduce_(losses, "control")()
        if not torch.isfinite(losses).all():
            rank = int((~torch.isfinite(losses)).nonzero()[0])
            raise LoftError(f"the loss is no finite number any more (rank {rank}, by step {self._step}): lower --lr")
        return float(losses.mean())

    def _log(self, event: str, **fields) -> None:
        if self._run:
            self._run.log(event, **fields)
