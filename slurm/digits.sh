#!/usr/bin/env bash
# 10 epochs of LoFT on digits, and its tickets retrained: a first job on a new cluster.
# sbatch slurm/digits.sh; environment variables override: LOFT_RUN, LOFT_PRESET, LOFT_OPTIONS (more options of loft pretrain).
#SBATCH --job-name=loft-digits
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
# Your cluster: uncomment and fill in.
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
# module load gcc openmpi

. "${LOFT_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
preset=${LOFT_PRESET:-digits}
run=${LOFT_RUN:-runs/digits-$SLURM_JOB_ID}

# shellcheck disable=SC2086 # LOFT_OPTIONS is meant to be split
train pretrain --preset "$preset" --run "$run" --resume ${LOFT_OPTIONS:-} || exit
[ -d "$run/tickets" ] || loft prune "$run" --preset "$preset" || exit
for ticket in "$run"/tickets/*; do
    train retrain "$ticket" --preset "$preset" --run "$run/retrained/$(basename "$ticket")" --resume || exit
done
