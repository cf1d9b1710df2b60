#!/usr/bin/env bash
# Pretrain with two processes on this machine: on its CPU, or on two GPUs where it has them (--runtime.device cpu
# forces the CPU).
#
#     launch/local-two-processes.sh --config configs/demo.yaml [--section.key value ...]
#
# The corpus, the tokenizer and the shards are made first, by one process (nothing happens where they stand already).
# Ctrl-C stops both processes; the same command goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

for stage in corpus tokenizer shards; do
  bertpipe "$stage" "$@"
done
exec torchrun --nproc_per_node 2 --master_port "${MASTER_PORT:-29500}" pretrain.py "$@"
