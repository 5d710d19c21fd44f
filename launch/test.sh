#!/usr/bin/env bash
# The tests: all of them, in two processes; or what the arguments tell pytest:
#   bash launch/test.sh tests/models -k unet        bash launch/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# Dozens of processes import the same files: the first that does compiles them, and keeps that.
unset PYTHONDONTWRITEBYTECODE
export PIP_COMPILE=0
prepare test "torch==2.13.0"
# Without what it requires: its torchvision must be of torch's own build, and only its networks and
# tokenizer are compared with ours.
open_clip="open_clip_torch==3.3.0"
if [[ ! -f "$venv/.installed-$open_clip" ]]; then
  pip install --no-deps "$open_clip" || fail "could not install $open_clip (pip says why above)"
  touch "$venv/.installed-$open_clip"
fi
cd "$repo"
[[ $# -gt 0 ]] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec "$venv/bin/python" -m pytest "$@"
