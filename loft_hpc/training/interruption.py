"""Being told to end: a scheduler's warning reaches the ranks as a signal, at different moments, and all of them must stop at one step."""

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""USR1 is what slurm/*.sh ask Slurm to send, and what mpirun passes on; TERM is followed by KILL within moments under mpirun, but not
under srun; INT is Ctrl-C of somebody who runs a training without mpirun."""


class Interruption:
    """For the length of a `with`, the signals are noted in place of ending the process. A second Ctrl-C ends it all the same."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
