"""Rounds in the log: each of them in a short training; in a long one several in a line, so that the log stays readable and nothing is lost."""

from collections.abc import Callable

from loft_hpc.training.strategy import Advance

LINES = 5000
"""About as many lines a training's rounds take at most."""


class RoundLog:
    """Puts rounds together, `every` of them in a line; `flush` before anything that a run may go on from."""

    def __init__(self, log: Callable[..., None], expected_rounds: int):
        self._log, self._every = log, -(-expected_rounds // LINES)
        self._rounds: list[Advance] = []

    def add(self, done: Advance) -> None:
        """The next round."""
        self._rounds.append(done)
        if done.rounds % self._every == 0:
            self.flush()

    def flush(self) -> None:
        """Log what has been put together so far."""
        if not self._rounds:
            return
        last, losses = self._rounds[-1], [done.mean_loss for done in self._rounds]
        fields = {"round": last.rounds, "step": last.step, "loss": sum(losses) / len(losses)}
        fields["exchange_seconds"] = sum(done.exchange_seconds for done in self._rounds)
        if self._every > 1:
            fields |= {"rounds": len(losses), "lowest_loss": min(losses), "highest_loss": max(losses)}
        self._log("round", **fields)
        self._rounds = []
