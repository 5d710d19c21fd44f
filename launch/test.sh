#!/usr/bin/env bash
# The tests. Arguments go on to pytest:
#   bash launch/test.sh tests/models -k unet        bash launch/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
prepare test "torch==2.13.0"
cd "$repo"
exec "$venv/bin/python" -m pytest "$@"
