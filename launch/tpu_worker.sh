#!/usr/bin/env bash
# What a worker of launch/tpu_pod.sh does, which copies this file there and calls it:
#   start FLAG...   unpacks the repository, installs it, and starts agfsync run FLAG..., which
#                   outlives the connection; if that very run is under way, it goes on
#   follow          shows the run's output until it ends; its exit status
#   cause           waits for its end; its exit status, but 0 if it only followed another worker's
#   stop            lets the run save and end
# Beside this file: log, what the run says; lock, held while it lives; status, once it has ended.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repo="$HOME/agfsync_jax"
cd "$here"

# The systems of TPUs come with Python 3.10, or with one that cannot make environments; their own
# archive has what is missing. A machine that has just started may be busy updating itself.
get_python() {
  local python version=3.11
  # shellcheck source=venv.sh
  source "$repo/launch/venv.sh"
  if python="$(find_python 2>/dev/null)"; then
    ! "$python" -c "import ensurepip" 2>/dev/null || return 0
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  fi
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update >&2
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y "python$version-venv" >&2
}

start() {
  local wanted
  wanted="$(printf '%q ' "$@")"
  exec 9>lock # inherited by what is started here, and so held until the last of it has ended
  if ! flock -n 9; then
    if [[ "$(cat flags)" != "$wanted" ]]; then
      echo "error: another run is under way: $(cat flags)" >&2
      echo "stop it (tpu_pod.sh stop --name=...) or let it end" >&2
      return 2
    fi
    echo "$(hostname): this run is under way, and goes on" >&2
    return 0
  fi
  rm -f log status stopped process
  echo "$wanted" >flags
  mkdir -p "$repo"
  find "$repo" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf repository.tar.gz -C "$repo"
  get_python
  bash "$repo/launch/venv.sh" tpu
  setsid bash "$here/tpu_worker.sh" work "$@" >log 2>&1 </dev/null &
}

work() {
  local status=0
  echo $$ >process # which leads a group of its own
  trap : TERM      # agfsync gets the signal too, and its status is waited for
  # shellcheck source=/dev/null
  source ./keys
  cd "$repo"
  AGFSYNC_DISTRIBUTED=1 PYTHONUNBUFFERED=1 .venv/bin/python -m agfsync_jax run "$@" || status=$?
  cd "$here"
  [[ ! -f stopped ]] || status=130
  echo "$status" >status
}

follow() {
  local viewer
  tail -n 100 -F --pid="$$" log 2>/dev/null & # which an interrupt does not end
  viewer=$!
  flock --shared lock true
  sleep 1 # for the last lines
  kill "$viewer" 2>/dev/null || true
  return "$(ended)"
}

cause() {
  local status
  flock --shared lock true
  status="$(ended)"
  [[ "$status" -eq 75 ]] || return "$status" # agfsync's, when another process is gone
}

# Without a status, the machine went down under the run.
ended() {
  cat status 2>/dev/null || echo 143
}

stop() {
  if flock --nonblock lock true; then
    echo "$(hostname): nothing is running" >&2
    return 0
  fi
  if [[ ! -f process ]]; then
    echo "error: $(hostname) is still installing; try again in a minute" >&2
    return 1
  fi
  touch stopped
  kill -TERM -- "-$(cat process)"
  flock --shared lock true
}

case "${1:-}" in
  start) start "${@:2}" ;;
  work) work "${@:2}" ;;
  follow) follow ;;
  cause) cause ;;
  stop) stop ;;
  *)
    echo "usage: tpu_worker.sh start FLAG... | follow | cause | stop" >&2
    exit 2
    ;;
esac; exit # in one line: a newer copy may be laid over this file meanwhile
