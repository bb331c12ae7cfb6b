"""From the first step to the last: epochs, evaluation, snapshots, checkpoints and the log, whatever the strategy."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loft_hpc.comm.ledger import Ledger
from loft_hpc.comm.watchdog import Watchdog
from loft_hpc.comm.world import World
from loft_hpc.data.dataset import DataSet
from loft_hpc.errors import Interrupted
from loft_hpc.models.architecture import Architecture
from loft_hpc.models.scores import refuse_not_finite
from loft_hpc.runs.checkpoints import Checkpoint
from loft_hpc.runs.run import Run
from loft_hpc.training.calendar import Calendar
from loft_hpc.training.consensus import Consensus
from loft_hpc.training.evaluation import Score, judge, network_for
from loft_hpc.training.roundlog import RoundLog
from loft_hpc.training.settings import Checkpointing, Evaluation, Snapshots
from loft_hpc.training.strategy import Strategy
from loft_hpc.training.stretch import Clock, Stretch
from loft_hpc.training.watching import Observer, Oversight


@dataclass(frozen=True)
class Outcome:
    """What a session achieved, the same on every rank."""

    score: Score
    wall_seconds: float
    """Of the training with its evaluations, over all legs of a run that was interrupted."""
    steps: int
    """Local steps done: fewer than planned where the training was ended early."""
    stopped_early: bool = False


class Session:
    """Runs a strategy to its end and leaves a complete run on disk, written by rank 0 alone."""

    def __init__(
        self, strategy: Strategy, architecture: Architecture, hidden_widths: Mapping[str, int] | None, data: DataSet,
        evaluation: Evaluation, snapshots: Snapshots, checkpointing: Checkpointing,
        run: Run, world: World, device: torch.device, oversight: Oversight, observer: Observer | None = None,
        account: Callable[[], Mapping[str, Any]] | None = None,
    ):  # fmt: skip
        """`account`: collective; what else to record of this leg of the training when it ends, for instance its energy."""
        self._strategy, self._data, self._world, self._watcher = strategy, data, world, oversight.watcher
        self._run = run if world.rank == 0 else None
        self._path = run.path
        self._evaluation = evaluation
        self._full_snapshots, self._snapshot_name = snapshots.snapshot_tensors, run.snapshots.name
        self._calendar = Calendar.of(strategy.total_steps, strategy.steps_per_epoch, evaluation, snapshots, checkpointing)
        self._kept = checkpointing.keep_checkpoints
        self._watched, self._observer, self._account = observer is not None, observer, account
        self._distance: float | None = None
        # One full network for evaluations, filled anew each time.
        self._network = network_for(architecture, hidden_widths, strategy.full_state(), device, "the initial state")
        self._interruption = oversight.interruption
        self._watchdog = Watchdog(world, oversight.supervision.stall_seconds)
        self._consensus = Consensus(strategy, world, oversight.supervision.check_ranks)
        self._rounds = RoundLog(self._log, strategy.expected_rounds)
        self._step = 0
        self._stretch = Stretch(0)
        self._clock = Clock()
        self._interrupted_at: list[int] = []
        """Steps after which a checkpoint was written because the run was preempted."""

    def run(self, checkpoint: Checkpoint | None = None) -> Outcome:
        """Train, from the beginning or from a checkpoint. Collective.

        Raises Interrupted where the ranks were preempted, and LoftError where the loss is no finite number any more or the ranks disagree.
        """
        with self._run.failures_recorded() if self._run else nullcontext(), self._watchdog:
            if checkpoint:
                self._resume(checkpoint)
            if self._run:
                self._run.forget_after(self._step if checkpoint else -1)
            outcome = self._train()
            self._record_leg()
        if self._run:
            score = outcome.score
            results = {"accuracy": score.accuracy, "test_loss": score.loss, "wall_seconds": outcome.wall_seconds}
            results |= {"steps": outcome.steps, "stopped_early": outcome.stopped_early, "interrupted_at_steps": self._interrupted_at}
            self._run.finish("done", results)
        self._world.barrier()
        return outcome

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint left off, its ledger included."""
        self._strategy.restore(checkpoint)
        rank, size, progress = self._world.rank, self._world.size, checkpoint.progress
        self._world.ledger = Ledger()
        for ledger in checkpoint.ledgers[rank::size]:  # one, unless it is another number of ranks
            self._world.ledger.add(ledger)
        self._step = checkpoint.step
        self._clock.start_at(float(progress.get("wall_seconds", 0)))
        self._interrupted_at = list(progress.get("interrupted_at_steps", []))
        self._stretch = (
            Stretch.from_json(progress["epoch_so_far"], self._step, rank, size) if "epoch_so_far" in progress else Stretch(self._step)
        )

    def _train(self) -> Outcome:
        strategy, total, per_epoch = self._strategy, self._strategy.total_steps, self._strategy.steps_per_epoch
        self._watcher.started(str(self._path), total, self._step)
        if self._step == 0:
            self._snapshot(last=False)
        # A run that was interrupted just after its stop was decided stays stopped.
        stop = self._step > 0 and self._watched and self._world.on_root(lambda: self._observer.stop)
        score, wanted = None, False
        while self._step < total and not stop:
            begin, began_seconds = self._step, self._clock.seconds
            done = strategy.advance(self._calendar.next(begin))
            self._step = done.step
            told = self._consensus.reach(self._interruption.requested, done.diverged_at)
            self._stretch.add(done, done.step - begin, self._clock.seconds - began_seconds)
            self._watcher.advanced(done.step, done.mean_loss)
            if done.rounds is not None:
                self._rounds.add(done)
            due, last = self._calendar.due(begin, done.step), done.step >= total
            if due.snapshot:
                stop = self._snapshot(last) and not last
            ends = last or stop
            if due.epoch or stop:
                score = self._end_of_epoch(evaluate=due.evaluation or stop)
            wanted = wanted or due.checkpoint or stop
            leave = told and strategy.settled and not ends
            if strategy.settled and (wanted or leave):
                self._write_checkpoint(asked_for=not wanted)
                wanted = False
            if leave:
                self._leave()
        if stop:
            self._watcher.stopped(self._step / per_epoch, math.ceil(total / per_epoch))
        if score is None:  # resumed at the very end
            score = self._judge(strategy.full_state())
        ledgers = self._world.gather_objects(self._world.ledger)
        if self._run:
            self._run.write_ledger(ledgers)
            self._run.write_model(self._network.state_dict())
        return Outcome(score, self._clock.seconds, self._step, stopped_early=self._step < total)

    def _record_leg(self) -> None:
        if self._account is not None:
            fields = self._account()
            if self._run:
                self._run.add_leg(fields)

    def _leave(self) -> None:
        """End here, because some rank was told to. Raises Interrupted on all of them, with everything on disk to go on from."""
        self._record_leg()
        if self._run:
            self._run.interrupt(self._step)
        raise Interrupted(f"{self._path}: preempted, checkpoint written after step {self._step}")

    def _snapshot(self, last: bool) -> bool:
        """Record the filters' scores, and the full network where it is asked for; whether the observer wants to stop here.

        The first and the last network are recorded in full in any case: to rewind to, and to draw tickets from.
        """
        scores, stop = self._strategy.filter_scores(), False
        refuse_not_finite(scores)
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

    def _end_of_epoch(self, evaluate: bool) -> Score | None:
        """The epoch's line in the log, and an evaluation where it is due (a round may end several epochs after the last one)."""
        step, per_epoch, stretch = self._step, self._strategy.steps_per_epoch, self._stretch
        last = step >= self._strategy.total_steps
        epoch = math.ceil(step / per_epoch) if last or step // per_epoch == stretch.first_step // per_epoch else step // per_epoch
        loss, score = self._mean_over_ranks(stretch.mean_loss), None
        self._rounds.flush()
        self._log(
            "epoch", epoch=epoch, step=step, loss=loss, lr=self._strategy.schedule.lr_at(step - 1),
            train_wall_seconds=stretch.seconds, exchange_seconds=stretch.exchange_seconds,
            images_per_second_per_rank=stretch.steps * self._strategy.batch_images / stretch.seconds,
        )  # fmt: skip
        if evaluate:
            score = self._judge(self._strategy.full_state())
            self._log("eval", epoch=epoch, step=step, accuracy=score.accuracy, test_loss=score.loss, test_images=score.images)
        epochs = math.ceil(self._strategy.total_steps / per_epoch)
        self._watcher.epoch_ended(epoch, epochs, loss, score, self._distance, stretch.seconds)
        self._stretch = Stretch(step)
        return score

    def _write_checkpoint(self, asked_for: bool) -> None:
        """Everything to go on from, at the end of an epoch or in the middle of one; `asked_for` by whoever told the run to end."""
        if asked_for:
            self._interrupted_at.append(self._step)
        tensors, progress = self._strategy.checkpoint()
        self._consensus.confirm(tensors)
        if self._stretch.steps:
            progress = progress | {"epoch_so_far": self._stretch.to_json(self._world.gather_objects(self._stretch.losses))}
        ledger = Ledger()
        ledger.add(self._world.ledger)
        ledgers = self._world.gather_objects(ledger)
        self._rounds.flush()
        if self._run:
            sent, received = (sum(way) for way in zip(*(ledger.payload_bytes for ledger in ledgers), strict=True))
            epoch = self._step / self._strategy.steps_per_epoch
            self._log("ledger", epoch=epoch, step=self._step, payload_sent_bytes=sent, payload_received_bytes=received)
            progress = progress | {"wall_seconds": self._clock.seconds, "interrupted_at_steps": self._interrupted_at}
            self._run.checkpoints.write(Checkpoint(self._step, tensors, ledgers, progress), self._kept)

    def _judge(self, state: Mapping[str, Tensor]) -> Score:
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                parameter.copy_(state[name])
        return judge(self._network, self._data, self._evaluation, self._world)

    def _mean_over_ranks(self, loss: float) -> float:
        losses = torch.zeros(self._world.size, dtype=torch.float64)
        losses[self._world.rank] = loss
        self._world.all_reduce_(losses, "control")()
        return float(losses.mean())

    def _log(self, event: str, **fields) -> None:
        if self._run:
            self._run.log(event, **fields)
