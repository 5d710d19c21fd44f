#!/usr/bin/env bash
# Sourced by the other scripts: finds Python, makes .venv in the repository, installs the package.
#   prepare EXTRA [REQUIREMENT...]   requirements one by one, then the package with that extra;
#                                    does nothing when that is done and setup.py is as it was
# Started by itself, it does just that: bash launch/venv.sh cuda

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$repo/.venv"

fail() {
  echo "error: $*" >&2
  exit 1
}

# $PYTHON if given, else the first Python here that TensorFlow and JAX have wheels for.
find_python() {
  local python right='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  for python in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
    if "$python" -c "$right" 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "agfsync_jax needs Python 3.11, 3.12 or 3.13; ${PYTHON:-python3} is" \
    "$("${PYTHON:-python3}" --version 2>&1 || echo missing). Install one and name it:" \
    "PYTHON=/path/to/python3.12 bash $0"
}

pip() {
  PYTHONWARNINGS=ignore "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

prepare() {
  local extra="$1" python requirement done_file="$venv/.installed-${1:-run}" want
  shift
  if ! pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "making $venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$venv" ||
      fail "could not make $venv; on Debian and Ubuntu: apt install python3-venv"
  fi
  want="$venv $* $(cat "$repo/setup.py" "$repo/agfsync_jax/__init__.py")"
  if [[ -f "$done_file" && "$(<"$done_file")" == "$want" ]]; then
    return
  fi
  echo "installing into $venv (minutes, the first time)" >&2
  for requirement in "$@" "--editable=$repo${extra:+[$extra]}"; do
    pip install "$requirement" ||
      fail "could not install $requirement (pip says why above); the same command tries again"
  done
  printf '%s\n' "$want" >"$done_file"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  set -euo pipefail
  prepare "$@"
fi
