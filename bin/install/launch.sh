# Sourced after bin/setup: the environment, and mpirun as bin/demo, bin/test and bin/bench start it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
. "$root/.venv/bin/activate"
# Inside a container one often is root, and a laptop has fewer cores than ranks: say to Open MPI that both are meant.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
