"""The loft command in a process that can be broken from outside: a signal makes something go wrong inside it, wherever it is just then."""

import gc
import signal
import time

from loft_hpc.cli.main import main

NAN, BIT, EXCEPTION, HANG = (signal.SIGRTMIN + number for number in range(4))


def _parameters():
    """The first parameter buffer of the running training."""
    from loft_hpc.training.buffers import ParameterBuffer

    return next(thing for thing in gc.get_objects() if isinstance(thing, ParameterBuffer) and thing.layout.numel)


def raise_exception(*_: object) -> None:
    """A defect of ours, as it were: nothing that the program knows."""
    raise ZeroDivisionError("injected")


def set_nan(*_: object) -> None:
    """Arithmetic that has gone wrong: a parameter is no number any more."""
    _parameters().values[:1] = float("nan")


def flip_bit(*_: object) -> None:
    """Memory that has gone wrong: one bit of one parameter."""
    import torch

    _parameters().values.view(torch.int32)[:1] ^= 1 << 20


def hang(*_: object) -> None:
    """A call that does not come back, as of a file system that does not answer."""
    time.sleep(1000)


if __name__ == "__main__":
    signal.signal(HANG, hang)
    signal.signal(EXCEPTION, raise_exception)
    signal.signal(NAN, set_nan)
    signal.signal(BIT, flip_bit)
    main()
