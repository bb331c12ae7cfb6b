# Sourced by the job scripts of this folder: the environment, the launcher, and what makes a job go on after a preemption or a time limit.
# docs/clusters.md explains it, with the variables that are read here.
set -u

# Slurm's warning comes to this shell (--signal=B:USR1@..., or USR2), which passes it on; mpirun and srun pass it on to all ranks. They
# finish their step, write a checkpoint together and leave with 85.
warnings=0
child=
warn() { # SIGNAL
    warnings=$((warnings + 1)) signal=$1
    [ -n "$child" ] || return
    # Ranks that are only being started would miss it, or die of it.
    while [ $((SECONDS - began)) -lt 5 ] && kill -0 "$child" 2>/dev/null; do sleep 1; done
    kill -"$1" "$child" 2>/dev/null
}
trap 'warn USR1' USR1
trap 'warn USR2' USR2

die() {
    echo "slurm: $1: $2" >&2
    exit 1
}

find_environment() {
    [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script for Slurm" "sbatch $0"
    home=${LOFT_HOME:-$SLURM_SUBMIT_DIR}
    [ -f "$home/.venv/bin/activate" ] || die "no .venv in $home" "run bin/setup there first"
    . "$home/.venv/bin/activate"

    case ${LOFT_LAUNCHER:-mpirun} in
        mpirun)
            launcher=(mpirun -np "$SLURM_NTASKS")
            # Open MPI would bind each rank to one core; a rank takes its share of the job's cores. (Open MPI 5, and 4)
            export PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none ;;
        srun)
            # Slurm does not hand --cpus-per-task on to srun by itself, and would let a job wait for ranks that are gone.
            launcher=(srun --mpi=pmix --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
            # The ranks' PMIx may not know the way in which Slurm's PMIx would make sure who they are (munge); both know this one.
            export PMIX_SECURITY_MODE=${PMIX_SECURITY_MODE:-native} ;;
        *) die "LOFT_LAUNCHER=$LOFT_LAUNCHER is not known" "mpirun or srun" ;;
    esac
    command -v "${launcher[0]}" >/dev/null || die "there is no ${launcher[0]} on the PATH" "load the MPI module that bin/setup found, at the top of slurm/*.sh"
}

# A GPU without a rank does nothing, for as long as the job runs.
check_gpus() {
    local gpus=$((${SLURM_GPUS_ON_NODE:-0} * ${SLURM_JOB_NUM_NODES:-1}))
    if [ "$gpus" -gt "$SLURM_NTASKS" ] && [ -z "${LOFT_IDLE_GPUS:-}" ]; then
        die "more GPUs ($gpus) than ranks ($SLURM_NTASKS), so that $((gpus - SLURM_NTASKS)) would idle" \
            "ask for a rank for each by --ntasks-per-node=$SLURM_GPUS_ON_NODE, or set LOFT_IDLE_GPUS=1"
    elif [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$SLURM_NTASKS" ]; then
        echo "slurm: note: more ranks ($SLURM_NTASKS) than GPUs ($gpus): they share, and exchange through host memory; a GPU for each is faster"
    fi
}

requeue() {
    # TERM makes ranks leave with 85 as well. Where it came from scancel or a time limit, nobody wants the job back.
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
        echo "slurm: preempted; job $SLURM_JOB_ID is requeued and resumes from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 85
}

# Runs a command and returns its exit code. Never returns once the job was preempted: then the job is requeued.
step() {
    local code heard
    [ "$warnings" = 0 ] || requeue
    began=$SECONDS
    "$@" &
    child=$!
    [ "$warnings" = 0 ] || warn "$signal"  # told between the lines above
    heard=-1
    until [ "$heard" = "$warnings" ]; do  # a warning ends the wait, not the command
        heard=$warnings
        wait "$child"
        code=$?
    done
    child=
    # 85, or killed by the warning while it was too young to know it. Whatever else is a failure, warned or not.
    if [ "$code" = 85 ] || { [ "$warnings" -gt 0 ] && [ "$code" -gt 128 ]; }; then requeue; fi
    return "$code"
}

train() { # RUN COMMAND...: loft COMMAND over all ranks, into RUN or on from where it is; ends the job if that fails
    step "${launcher[@]}" loft "${@:2}" --run "$1" --resume || exit
    # A launcher's exit code is no proof: mpirun's is 0 when it loses a node.
    grep -qs '^  "status": "done"' "$1/run.json" || die "the training ended, but $1 is not done" "look above for the reason, then sbatch it again with LOFT_RUN"
}

# Tickets of RUN, all of the recipe's or none: while they are drawn, a file says so to whoever comes after a job that died meanwhile.
draw_tickets() { # RUN OPTIONS...
    local drawing=$1/.drawing-tickets code
    [ ! -e "$drawing" ] || rm -rf "$1/tickets"
    [ ! -d "$1/tickets" ] || return 0
    touch "$drawing"
    step loft prune "$@"
    code=$?
    [ "$code" = 0 ] || rm -rf "$1/tickets"
    rm "$drawing"
    [ "$code" = 0 ] || exit "$code"
}

# Pretraining, tickets, and each of them retrained. What is done is not done again, so the same job may be started any number of times.
find_tickets() { # PRESET
    local preset=${LOFT_PRESET:-$1} run=${LOFT_RUN:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID} ticket
    echo "slurm: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}: $preset into $run"
    check_gpus
    # shellcheck disable=SC2086 # options are meant to be split
    {
        train "$run" pretrain --preset "$preset" ${LOFT_DATA:+--data-dir "$LOFT_DATA"} ${LOFT_OPTIONS:-}
        draw_tickets "$run" --preset "$preset" ${LOFT_DATA:+--data-dir "$LOFT_DATA"} ${LOFT_PRUNE_OPTIONS:-}
        for ticket in "$run"/tickets/*; do
            train "$run/retrained/${ticket##*/}" retrain "$ticket" --preset "$preset" ${LOFT_DATA:+--data-dir "$LOFT_DATA"} ${LOFT_RETRAIN_OPTIONS:-}
        done
    }
    echo "slurm: job $SLURM_JOB_ID is done: $run"
}

# The poster's table, and the bytes of finished pretraining runs with their proof, into commcost.txt, which is there whole or not at all.
report_costs() {
    local run runs=${LOFT_RUN:-} report=commcost.txt
    if [ -z "$runs" ]; then
        for run in runs/*/; do
            grep -qs '^  "kind": "pretrain"' "$run/run.json" && grep -qs '^  "status": "done"' "$run/run.json" && runs+=" ${run%/}"
        done
    fi
    # shellcheck disable=SC2086 # several runs are meant to be split
    { loft commcost && { [ -z "$runs" ] || { echo && loft commcost --verify $runs; }; }; } > ".$report.$SLURM_JOB_ID" || exit
    mv ".$report.$SLURM_JOB_ID" "$report"
    echo "slurm: job $SLURM_JOB_ID is done: $SLURM_SUBMIT_DIR/$report"
}

# `loft plan` wants to know the commands: they are told, each between the control characters that it looks for, and nothing is done.
if [ -n "${LOFT_PLAN:-}" ]; then
    told() { printf '\035'; printf '%s\037' "$@"; printf '\036'; }
    step() { :; }
    train() { told "${@:2}"; }
    draw_tickets() { told prune "$@"; }
    check_gpus() { :; }
    report_costs() { :; }
else
    find_environment
fi
