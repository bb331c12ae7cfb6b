"""Preemption: a scheduler's warning reaches the ranks as a signal, at different moments, and all of them must stop at one step."""

import signal
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP)
"""USR1 is what slurm/*.sh ask Slurm to send; USR2 is other schedulers' (SGE, LSF); both are passed on by mpirun and srun. TERM is followed
by KILL within moments under mpirun, but not under srun. XCPU comes at a limit of CPU time, HUP when the terminal is closed."""

SIGNALS = (*WARNINGS, signal.SIGINT)
"""INT is Ctrl-C of somebody who runs a training without mpirun."""

_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""Whoever starts a command with nohup, or in a script's background, has them ignored, and so they stay."""


class Interruption:
    """For the length of a `with`, the signals are noted in place of ending the process. A second Ctrl-C ends it all the same."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """Note the signals from now on, to the end of the process."""
        for number in SIGNALS:
            if number not in _MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def __enter__(self) -> "Interruption":
        self.listen()
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
