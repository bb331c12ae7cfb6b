#!/usr/bin/env bash
# The poster's row PreResNet-34 CIFAR-10.
# sbatch slurm/cifar10.sh; environment variables override: LOFT_RUN, LOFT_PRESET, LOFT_OPTIONS (more options of loft pretrain), LOFT_DATA.
#SBATCH --job-name=loft-cifar10
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
# Your cluster: uncomment and fill in.
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
# module load gcc openmpi cuda

. "${LOFT_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
preset=${LOFT_PRESET:-cifar10-preresnet34}
run=${LOFT_RUN:-runs/cifar10-$SLURM_JOB_ID}
data=${LOFT_DATA:-data}

# shellcheck disable=SC2086 # LOFT_OPTIONS is meant to be split
train pretrain --preset "$preset" --data-dir "$data" --run "$run" --resume ${LOFT_OPTIONS:-} || exit
[ -d "$run/tickets" ] || loft prune "$run" --preset "$preset" || exit
for ticket in "$run"/tickets/*; do
    train retrain "$ticket" --preset "$preset" --run "$run/retrained/$(basename "$ticket")" --resume || exit
done
