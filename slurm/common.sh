# Sourced by the job scripts of this folder: environment, launcher, and what makes a job go on after a preemption or a time limit.
# LOFT_HOME: the checkout (default: where sbatch was typed). LOFT_LAUNCHER: mpirun (default) or srun.
set -u
home=${LOFT_HOME:-$SLURM_SUBMIT_DIR}
if [ ! -f "$home/.venv/bin/activate" ]; then
    echo "slurm: no .venv in $home: run bin/setup there, and sbatch from there (or set LOFT_HOME)" >&2
    exit 1
fi
. "$home/.venv/bin/activate"

# Starts the ranks with `loft "$@"`, and waits. Slurm's warning comes to this shell as USR1 and is passed on to all ranks: they finish
# their step, write a checkpoint together and leave with 85, of which this makes a requeue. The restarted job runs the same command, whose
# --resume goes on where the checkpoint stands.
train() {
    local code pid
    if [ "${LOFT_LAUNCHER:-mpirun}" = srun ]; then
        srun --mpi=pmix loft "$@" &
    else
        mpirun -np "$SLURM_NTASKS" loft "$@" &
    fi
    pid=$!
    trap 'kill -USR1 "$pid" 2>/dev/null' USR1
    while :; do
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    trap - USR1
    if [ "$code" = 85 ]; then
        echo "slurm: told to end; asking for a requeue of job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
        exit 85
    fi
    return "$code"
}
