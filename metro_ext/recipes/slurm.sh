#!/usr/bin/env bash
# Pretrains a size on nodes of eight GPUs under SLURM; submitted again, it resumes.
#   sbatch --nodes 32 slurm.sh xxl [option of metro_ext.train ...]
# Corpus, tokenizer and runs/ are looked for from the folder of the submission, which all nodes must
# share. One torchrun a node starts a process a GPU.
#SBATCH --job-name=metro
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=metro-%j.log
set -euo pipefail

size=${1:?usage: sbatch --nodes N slurm.sh SIZE [option ...]}
shift
recipes=$(python -m metro_ext.recipes)
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A job of its own port, so that two that share a node do not meet each other.
# The cores are named again: some releases of srun do not take them over from the job.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
  --rdzv-endpoint "$first_node:$((20000 + SLURM_JOB_ID % 10000))" \
  -m metro_ext.train --config "$recipes/$size.toml" --run.dir "runs/$size" "$@"
