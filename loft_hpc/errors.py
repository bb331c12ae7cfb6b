"""The one exception that a user sees: what was wrong, and what to do about it, in one line."""


class LoftError(Exception):
    """Something that the user, their files or their cluster can mend. Told as one line, with exit code 1.

    `usage` marks a mistake in the command itself: every rank sees the same, and the exit code is 2.
    """

    def __init__(self, message: str, usage: bool = False, everywhere: bool = False):
        super().__init__(message)
        self.usage = usage
        self.everywhere = everywhere or usage
        """Whether every rank is known to have met it, so that rank 0 alone tells."""


class Interrupted(Exception):
    """All ranks were preempted (a signal), and have written a checkpoint to go on from."""
