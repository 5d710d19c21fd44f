#!/usr/bin/env bash
# The whole loop on this machine, in minutes on a CPU. Flags go on to agfsync:
#   bash launch/quickstart.sh --config.train.num_steps=400 --workdir=/tmp/longer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare ""
exec "$venv/bin/python" -m agfsync_jax run \
  --config="$repo/configs/micro.py" --workdir="$repo/runs/micro" "$@"
