#!/usr/bin/env bash
# Pretrains a size on the GPUs of this machine; run again after a failure, it resumes.
#   bash single_node.sh SIZE [option of metro_ext.train ...]     SIZE: base, base++, large++, xl, xxl
# Corpus and tokenizer are looked for where the recipe says, from the current folder.
set -euo pipefail

size=${1:?usage: single_node.sh SIZE [option ...]}
shift
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
recipes=$(python -m metro_ext.recipes)

# --max-restarts: a rank that is killed takes the others with it, and all go on from the last
# checkpoint.
exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 \
  -m metro_ext.train --config "$recipes/$size.toml" --run.dir "runs/$size" "$@"
