#!/usr/bin/env bash
# Runs agfsync on the GPUs of this machine: makes .venv with JAX for CUDA, then agfsync run.
#
#   bash launch/gpu_host.sh --config=configs/sd15.py --workdir=runs/sd15
#
# --dry-run shows the commands and runs none; all other flags go on to agfsync. WANDB_API_KEY and
# HF_TOKEN are taken from the environment. Ctrl-C and SIGTERM save; the same command goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take "" "" "$@"
check_flags
need nvidia-smi "It comes with NVIDIA's driver: install that, or run on the CPU by\
 launch/quickstart.sh"
[[ -n "$dry_run" ]] || nvidia-smi --list-gpus >/dev/null ||
  fail "nvidia-smi sees no GPU (it says why above); mend the driver, then start this again"

run bash "$repo/launch/venv.sh" cuda
[[ -n "$dry_run" ]] || exec "$venv/bin/python" -m agfsync_jax run "${flags[@]}"
run "$venv/bin/python" -m agfsync_jax run "${flags[@]}"
