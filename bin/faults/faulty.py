"""The loft command in a process that can be broken from outside: a signal makes something go wrong inside it, wherever it is just then."""

import gc
import signal

from loft_hpc.cli.main import main

EXCEPTION, NAN, BIT = signal.SIGRTMIN + 2, signal.SIGRTMIN, signal.SIGRTMIN + 1


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


if __name__ == "__main__":
    signal.signal(EXCEPTION, raise_exception)
    signal.signal(NAN, set_nan)
    signal.signal(BIT, flip_bit)
    main()
