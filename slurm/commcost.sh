#!/usr/bin/env bash
# The communication-cost report into commcost.txt: the poster's table, and finished runs compared, their ledgers beside the formula.
# sbatch slurm/commcost.sh, in the checkout. Runs: LOFT_RUN="RUN RUN...", else all under runs/. Variables: docs/clusters.md
#SBATCH --job-name=loft-commcost
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# ---- Your cluster: fill in, and take one # of ## away ----
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
# module load gcc openmpi
# -----------------------------------------------------------

common=${LOFT_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh
[ -f "$common" ] || { echo "slurm: no $common: type sbatch in the checkout of loft-hpc, or set LOFT_HOME to it" >&2; exit 1; }
. "$common"
report_costs
