"""From the first step to the last: epochs, evaluation, snapshots, checkpoints and the log, whatever the strategy."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import Architecture
from loft_hpc.runs.run import Checkpoint, Run
from loft_hpc.training.evaluation import Score, judge, network_for
from loft_hpc.training.settings import Evaluation, Optimisation
from loft_hpc.training.strategy import Strategy


class Watcher(Protocol):
    """Who is told of the progress: the command line, or nobody."""

    def started(self, path: str, total_steps: int, done_steps: int) -> None: ...

    def advanced(self, step: int, loss: float) -> None: ...

    def epoch_ended(self, epoch: int, epochs: int, loss: float, score: Score | None, seconds: float) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a session achieved, the same on every rank."""

    score: Score
    wall_seconds: float
    """Of the training with its evaluations, over all legs of a run that was interrupted."""


class _Clock:
    """Wall time since the training began, in seconds."""

    def __init__(self) -> None:
        self.start_at(0.0)

    def start_at(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


class Session:
    """Runs a strategy to its end and leaves a complete run on disk, written by rank 0 alone."""

    def __init__(
        self, strategy: Strategy, architecture: Architecture, hidden_widths: Mapping[str, int] | None, data: DataSet,
        optimisation: Optimisation, evaluation: Evaluation, snapshot_every: int, run: Run, world: World,
        device: torch.device, watcher: Watcher,
    ):  # fmt: skip
        self._strategy, self._data, self._world, self._watcher = strategy, data, world, watcher
        self._run = run if world.rank == 0 else None
        self._path = run.path
        self._optimisation, self._evaluation, self._snapshot_every = optimisation, evaluation, snapshot_every
        # One full network for evaluations, filled anew each time.
        self._network = network_for(architecture, hidden_widths, strategy.full_state(), device, "the initial state")
        self._step = 0
        self._clock = _Clock()

    def run(self, checkpoint: Checkpoint | None = None) -> Outcome:
        """Train, from the beginning or from a checkpoint. Collective."""
        with self._run.failures_recorded() if self._run else nullcontext():
            if checkpoint:
                self._resume(checkpoint)
            if self._run:
                self._run.forget_after(self._step if checkpoint else -1)
            outcome = self._train()
        if self._run:
            score = outcome.score
            self._run.finish("done", {"accuracy": score.accuracy, "test_loss": score.loss, "wall_seconds": outcome.wall_seconds})
        self._world.barrier()
        return outcome

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint left off, its ledger included."""
        self._strategy.restore(checkpoint)
        self._world.ledger = Ledger()
        self._world.ledger.add(checkpoint.ledgers[self._world.rank])
        self._step = checkpoint.step
        self._clock.start_at(float(checkpoint.progress.get("wall_seconds", 0)))

    def _train(self) -> Outcome:
        strategy, total = self._strategy, self._strategy.total_steps
        per_epoch = strategy.steps_per_epoch
        epochs = math.ceil(total / per_epoch)
        watch = self._clock
        self._watcher.started(str(self._path), total, self._step)
        if self._step == 0 and self._run:
            self._run.write_snapshot(0, strategy.full_state())
        score, losses, exchange_seconds, begun, epoch_step = None, 0.0, 0.0, watch.seconds, self._step
        epoch_end = (self._step // per_epoch + 1) * per_epoch
        while self._step < total:
            done = strategy.advance()
            losses += done.mean_loss * (done.step - self._step)
            exchange_seconds += done.exchange_seconds
            self._step = done.step
            self._watcher.advanced(done.step, done.mean_loss)
            if done.rounds is not None:
                self._log("round", round=done.rounds, step=done.step, loss=done.mean_loss, exchange_seconds=done.exchange_seconds)
            if done.step < min(epoch_end, total):
                continue
            epoch = math.ceil(done.step / per_epoch) if done.step >= total else done.step // per_epoch
            loss = self._mean_over_ranks(losses / (done.step - epoch_step))
            seconds = watch.seconds - begun
            self._log(
                "epoch", epoch=epoch, step=done.step, loss=loss, lr=self._optimisation.lr_at(done.step - 1, total),
                train_wall_seconds=seconds, exchange_seconds=exchange_seconds,
                images_per_second_per_rank=(done.step - epoch_step) * strategy.batch_images / seconds,
            )  # fmt: skip
            score = self._end_of_epoch(epoch, epoch_step // per_epoch, last=done.step >= total)
            self._watcher.epoch_ended(epoch, epochs, loss, score, seconds)
            losses, exchange_seconds, epoch_step, begun = 0.0, 0.0, done.step, watch.seconds
            epoch_end = (done.step // per_epoch + 1) * per_epoch
        if score is None:  # resumed at the very end
            score = self._judge(strategy.full_state())
        ledgers = self._world.gather_objects(self._world.ledger)
        if self._run:
            self._run.write_ledger(ledgers)
            self._run.write_model(self._network.state_dict())
        return Outcome(score, watch.seconds)

    def _end_of_epoch(self, epoch: int, earlier: int, last: bool) -> Score | None:
        """Evaluation, snapshot and checkpoint, each when it is due: a round may end several epochs after the `earlier` one."""

        def due(every: int) -> bool:
            return last or (every > 0 and epoch // every > earlier // every)

        state = self._strategy.full_state()
        score = None
        if due(self._evaluation.evaluate_every):
            score = self._judge(state)
            self._log("eval", epoch=epoch, step=self._step, accuracy=score.accuracy, test_loss=score.loss, test_images=score.images)
        tensors, progress = self._strategy.checkpoint()
        ledger = Ledger()
        ledger.add(self._world.ledger)
        ledgers = self._world.gather_objects(ledger)
        if self._run:
            if due(self._snapshot_every):
                self._run.write_snapshot(epoch, state)
            progress = progress | {"wall_seconds": self._clock.seconds}
            self._run.write_checkpoint(Checkpoint(self._step, tensors, ledgers, progress))
        return score

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
