#!/usr/bin/env bash
# The recipe of imagenet.sh over N nodes with G GPUs each, a rank for every GPU: 4 x 4 here. docs/clusters.md explains each line.
# sbatch slurm/imagenet-nodes.sh, in the checkout. It resumes by itself after a preemption or a time limit. Variables: docs/clusters.md
#SBATCH --job-name=loft-imagenet-nodes
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out
# ---- Your cluster: fill in, and take one # of ## away ----
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
# module load gcc openmpi cuda
# -----------------------------------------------------------

# One core of a rank computes, the others decode images. With shards, N workers share an epoch; without, each sees all images.
loaders=$((${SLURM_CPUS_PER_TASK:-1} - 1))
LOFT_OPTIONS="--shard-data --loader-workers $loaders ${LOFT_OPTIONS:-}" LOFT_RETRAIN_OPTIONS="--loader-workers $loaders ${LOFT_RETRAIN_OPTIONS:-}"

common=${LOFT_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh
[ -f "$common" ] || { echo "slurm: no $common: type sbatch in the checkout of loft-hpc, or set LOFT_HOME to it" >&2; exit 1; }
. "$common"
find_tickets imagenet-preresnet18
