#!/usr/bin/env bash
# Writes what a worker of launch/tpu_pod.sh needs into FOLDER, anew: the repository as it lies here
# (what git knows or would add), the script that runs there, and, for the eyes of its owner alone,
# API keys that are set in the environment.
#   bash launch/pack.sh FOLDER
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# -eq 1 ]] || fail "usage: bash launch/pack.sh FOLDER"
folder="$1"
git -C "$repo" rev-parse --is-inside-work-tree >/dev/null 2>&1 ||
  fail "$repo is no git checkout, and git tells which files to copy: git init \"$repo\" is enough"

umask 077
rm -rf "$folder"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
cd "$repo"
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do
    # What is deleted but not committed is still listed.
    [[ ! -e "$file" && ! -L "$file" ]] || printf '%s\0' "$file"
  done | COPYFILE_DISABLE=1 tar -czf "$folder/repository.tar.gz" --null -T -
cp launch/tpu_worker.sh "$folder"
for key in "${keys[@]}"; do
  [[ -z "${!key:-}" ]] || printf 'export %s=%q\n' "$key" "${!key}"
done >"$folder/keys"
