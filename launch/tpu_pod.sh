#!/usr/bin/env bash
# Runs agfsync on a Cloud TPU VM or pod slice: makes it, or takes the one of that name, copies this
# working tree to all workers, installs it, runs the same command on all, and shows worker 0's output.
#
#   bash launch/tpu_pod.sh --name=sdxl --zone=us-east5-b --type=v6e-16 --spot \
#     --config=configs/sdxl.py --workdir=gs://bucket/sdxl
#   bash launch/tpu_pod.sh stop --name=sdxl --zone=us-east5-b      it saves and ends
#   bash launch/tpu_pod.sh delete --name=sdxl --zone=us-east5-b    of the TPU, not of the workdir
#
#   --name=  --zone=  --type=    of the TPU; its type is one that
#                                gcloud compute tpus accelerator-types list --zone=ZONE   names
#   --spot                       cheaper, and may be taken away at any time
#   --project=  --runtime=       gcloud's project and the TPU's usual system, if not given
#   --max-restarts=20            how often a run that lost its TPU goes on on a new one
#   --dry-run                    shows the commands and runs none
#
# All other flags go on to agfsync. WANDB_API_KEY and HF_TOKEN go along in a file that only you can
# read. Ctrl-C ends the watching, not the run: the same command shows it again. What agfsync refuses,
# and what crashes on a TPU that is there, is not tried again. For several workers gcloud wants its
# key in the ssh agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
action=run
case "${1:-}" in
  run | stop | delete)
    action="$1"
    shift
    ;;
esac
name="" zone="" type="" spot="" project="" runtime="" max_restarts=20
take "name zone type project runtime max-restarts" "spot" "$@"
[[ -n "$name" && -n "$zone" ]] ||
  fail "--name and --zone are needed, such as --name=sdxl --zone=us-east5-b; --help says more"
check_name "$name"
need gcloud "Install the Google Cloud CLI, then: gcloud auth login, gcloud config set project ID"

tpu() {
  run gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+--project="$project"}
}

worker="bash agfsync_launch/tpu_worker.sh"
if [[ "$action" != run ]]; then
  [[ ${#flags[@]} -eq 0 ]] || fail "$action takes --name, --zone and --project, not ${flags[0]}"
  if [[ "$action" == stop ]]; then
    tpu ssh "$name" --worker=all --command="$worker stop"
  else
    tpu delete "$name" --quiet
  fi
  exit
fi

check_flags remote
[[ -n "$type" ]] || fail "--type is missing, such as --type=v6e-16"
if [[ -z "$runtime" ]]; then
  case "$type" in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--type=$type is new here: name its system too, by --runtime=VERSION;" \
      "gcloud compute tpus tpu-vm versions list --zone=$zone lists them" ;;
  esac
fi
bundle="$repo/runs/launch/$name/agfsync_launch"
if [[ -z "$dry_run" ]]; then
  errors="$(mktemp)"
  trap 'rm -rf "$errors" "$bundle"' EXIT # the bundle may hold keys
fi
trap 'say "not watching any more; if the run has started it goes on, the same command shows it,\
 and $0 stop --name=$name --zone=$zone ends it"; exit 130' INT

# Sets state: ABSENT, READY, PREEMPTED, ... as gcloud calls them.
look() {
  if [[ -n "$dry_run" ]]; then
    tpu describe "$name" --format="value(state)"
    echo "# if there is no such TPU:"
    state=ABSENT
  elif ! state="$(tpu describe "$name" --format="value(state)" 2>"$errors")"; then
    state=ABSENT
    grep -q NOT_FOUND "$errors" || {
      cat "$errors" >&2
      fail "could not ask for $name (gcloud says why above); the same command goes on"
    }
  fi
}

# Returns once there is a TPU of that name, and it is ready.
get_tpu() {
  look
  while [[ "$state" != READY ]]; do
    case "$state" in
      PREEMPTED | TERMINATED)
        say "$name is $state: making it anew"
        tpu delete "$name" --quiet || return
        state=ABSENT
        ;;
      ABSENT)
        tpu create "$name" --accelerator-type="$type" --version="$runtime" ${spot:+--spot} || return
        state=READY
        ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | STOPPING | DELETING)
        say "$name is $state: waiting"
        sleep 20
        look
        ;;
      *) fail "$name is $state; start or delete it, or take another --name" ;;
    esac
  done
}

# One attempt, phase by phase; the status of the phase that failed, or of agfsync.
attempt() {
  local status=0
  phase="get"
  get_tpu || return
  phase=start
  run bash "$repo/launch/pack.sh" "$bundle" || return
  tpu scp --recurse "$bundle" "$name:" --worker=all || status=$?
  run rm -rf "$bundle"
  [[ $status -eq 0 ]] || return "$status"
  tpu ssh "$name" --worker=all --command="$worker $(quote start "${flags[@]}")" || return
  phase=run
  tpu ssh "$name" --worker=0 --command="$worker follow" || status=$?
  if [[ $status -eq 75 ]]; then # it stopped because another worker did, which knows why
    status=0
    tpu ssh "$name" --worker=all --command="$worker cause" || status=$?
    [[ $status -ne 0 ]] || status=143 # none does: they lost sight of one another
  fi
  return "$status"
}

# worth_another STATUS: agfsync was stopped from outside, or the TPU is gone.
worth_another() {
  case "$phase:$1" in
    *:0 | *:2 | *:130) return 1 ;;
    get:*)
      [[ $restarts -gt 0 ]] || return 1
      say "no TPU to be had; trying again in five minutes"
      sleep 300
      return 0
      ;;
  esac
  sleep 30 # until a preemption shows
  look
  case "$state:$phase:$1" in
    READY:run:143 | READY:run:255) ;; # a signal; a lost connection, which finds the run again
    READY:*) return 1 ;;
  esac
}

restarts=0
while true; do
  status=0
  attempt || status=$?
  [[ -z "$dry_run" ]] || exit "$status"
  worth_another "$status" || break
  if [[ $restarts -ge $max_restarts ]]; then
    say "stopped after $restarts restarts (--max-restarts); the same command goes on"
    break
  fi
  restarts=$((restarts + 1))
  say "stopped with status $status, $name is $state: restart $restarts of $max_restarts"
done
[[ $status -eq 0 ]] || [[ "$phase" == get ]] ||
  say "status $status; another worker's output: gcloud compute tpus tpu-vm ssh $name --zone=$zone" \
    "--worker=1 --command='cat agfsync_launch/log'"
[[ "$phase" == get ]] ||
  say "$name is still there and costs money: bash $0 delete --name=$name --zone=$zone"
exit "$status"
