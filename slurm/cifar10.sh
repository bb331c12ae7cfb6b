#!/usr/bin/env bash
# The poster's row PreResNet-34 CIFAR-10: pretraining, tickets, and each of them retrained.
# sbatch slurm/cifar10.sh, in the checkout. It resumes by itself after a preemption or a time limit. Variables: docs/clusters.md
#SBATCH --job-name=loft-cifar10
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
# ---- Your cluster: fill in, and take one # of ## away ----
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
# module load gcc openmpi cuda
# -----------------------------------------------------------

common=${LOFT_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh
[ -f "$common" ] || { echo "slurm: no $common: type sbatch in the checkout of loft-hpc, or set LOFT_HOME to it" >&2; exit 1; }
. "$common"
find_tickets cifar10-preresnet34
