#!/usr/bin/env bash
# Runs agfsync on TPU slices of a GKE cluster that xpk made.
#
#   bash launch/xpk.sh --name=sdxl --cluster=tpus --type=v6e-16 --slices=1 --image=IMAGE --build \
#     --config=configs/sdxl.py --workdir=gs://bucket/sdxl
#
#   --name=  --cluster=  --type=     of the workload; the cluster; TPU type as xpk calls it
#   --image=IMAGE                    what the pods run; with --build, made from launch/Dockerfile and
#                                    this working tree, and pushed, before the workload is created
#   --slices=1  --zone=  --project=  zone and project: gcloud's, if not given
#   --max-restarts=20                after a preemption or a crash; not after an error of the user
#   --dry-run                        shows the commands and runs none
#
# All other flags go on to agfsync. WANDB_API_KEY and HF_TOKEN, where they are set, become variables
# of the pods, which whoever may read the cluster's workloads can read too.
# Afterwards: xpk workload list --cluster=tpus; xpk workload delete --cluster=tpus --workload=sdxl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
name="" cluster="" type="" slices=1 zone="" project="" image="" build="" max_restarts=20
take "name cluster type slices zone project image max-restarts" "build" "$@"
[[ -n "$name" && -n "$cluster" && -n "$type" && -n "$image" ]] ||
  fail "--name, --cluster, --type and --image are needed, such as" \
    "--name=sdxl --cluster=tpus --type=v6e-16 --image=IMAGE; --help says more"
check_name "$name"
check_flags remote
need xpk "Install it: pipx install xpk, and what it says it needs"

if [[ -n "$build" ]]; then
  need docker "Install it, or leave out --build and give an --image that is pushed already"
  run docker build --platform=linux/amd64 --file="$repo/launch/Dockerfile" --build-arg=EXTRA=tpu \
    --tag="$image" "$repo"
  run docker push "$image"
fi
present=()
for key in "${keys[@]}"; do
  [[ -z "${!key:-}" ]] || present+=("$key")
done
environment=""
if [[ ${#present[@]} -gt 0 ]]; then # names alone: xpk takes the values from its own environment
  environment="$repo/runs/launch/$name.env"
  run mkdir -p "$repo/runs/launch"
  # shellcheck disable=SC2016
  run sh -c 'printf "%s\n" "$@" >"$0"' "$environment" "${present[@]}"
fi
# exec, so that SIGTERM comes to agfsync; the pod is given time to save. 75 is the status of a
# process whose companion is gone: with it the others start anew, but with 2 none does.
run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" \
  --num-slices="$slices" ${zone:+--zone="$zone"} ${project:+--project="$project"} \
  --docker-image="$image" ${environment:+--env-file="$environment"} \
  --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 \
  --command="$(quote exec env AGFSYNC_DISTRIBUTED=1 AGFSYNC_STOP_SECONDS=240 agfsync run "${flags[@]}")"
