#!/usr/bin/env bash
# Pretrain with N processes on this machine, started again from the last checkpoint when one of them is lost.
#
#     launch/supervised.sh 2 --config configs/demo.yaml [--section.key value ...]
#
# At most RESTARTS (default 10) new starts. Where a process stops answering, the others end after runtime.timeout and
# name it. Ctrl-C or SIGTERM to this script ends the run with a checkpoint, and is no reason to start again; for saving
# it leaves SECONDS_TO_SAVE (default 600). The stages up to `shards` must be done.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

processes=${1:?how many processes?}
shift
exec torchrun --nproc_per_node "$processes" --master_port "${MASTER_PORT:-29500}" --monitor_interval 1 \
  --max_restarts "${RESTARTS:-10}" --shutdown_timeout "${SECONDS_TO_SAVE:-600}" pretrain.py "$@"
