#!/usr/bin/env bash
# A first job on a new cluster, 10 epochs on digits without a GPU: pretraining, tickets, and each of them retrained.
# sbatch slurm/digits.sh, in the checkout. It resumes by itself after a preemption or a time limit. Variables: docs/clusters.md
#SBATCH --job-name=loft-digits
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
# ---- Your cluster: fill in, and take one # of ## away ----
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
# module load gcc openmpi
# -----------------------------------------------------------

common=${LOFT_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh
[ -f "$common" ] || { echo "slurm: no $common: type sbatch in the checkout of loft-hpc, or set LOFT_HOME to it" >&2; exit 1; }
. "$common"
find_tickets digits
