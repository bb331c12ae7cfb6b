"""How a command joins the other ranks of its job."""

import signal
import threading

from loft_hpc.comm import launch
from loft_hpc.comm.alone import Alone
from loft_hpc.comm.engines import AUTO, open_engine
from loft_hpc.comm.world import World
from loft_hpc.errors import LoftError


def start(asked: str = AUTO) -> World:
    """Start MPI and the engine that was `asked` for. Where MPI is not installed, and no launcher started this process, a world of one rank.

    Raises LoftError where they are missing or where MPI sees another world than the launcher made.
    """
    launch.refuse_without_home()
    said = launch.announced()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as problem:
        if said is None and asked == AUTO:
            return Alone()
        raise LoftError(f"MPI does not load ({problem}): run bin/setup, or load the MPI module that it was set up with") from None
    _take_back_signals()
    size = MPI.COMM_WORLD.Get_size()
    if said and said[1] != size:
        raise LoftError(
            f"the launcher announced {said[1]} ranks, but MPI sees a world of {size}: the launcher belongs to another MPI; "
            "use the mpirun that `loft doctor` names, or srun --mpi=pmix",
            usage=True,
        )
    if size == 1 and asked == AUTO:
        return Alone()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise LoftError(
            "this MPI gives no MPI_THREAD_MULTIPLE, which training and its watchdog need: load one built with it", everywhere=True
        )
    return World(MPI.COMM_WORLD, open_engine(asked, MPI.COMM_WORLD))


def _take_back_signals() -> None:
    """Set this process's handlers again: MPI puts its own in their place as it starts (Open MPI 5: that of HUP), and nobody would be told."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)
