#!/usr/bin/env bash
# Sourced by the scripts that start a run on other machines: flags, --dry-run, quoting, checks.

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" # repo, venv, fail

dry_run=""
flags=()
# Taken along from the environment where they are set: never on a command line, never printed.
# shellcheck disable=SC2034
keys=(WANDB_API_KEY HF_TOKEN)

say() {
  echo "$*" >&2
}

# take "NAME..." "SWITCH..." ARGUMENT...: --max-restarts=3 sets max_restarts, a switch sets its
# variable to 1; what is not among them is agfsync's, and left in the array flags.
take() {
  local values="$1" switches="$2 dry-run" argument word
  shift 2
  flags=()
  for argument in "$@"; do
    case "$argument" in
      -h | --help) # the comment at the head of the script
        awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "$0"
        exit 0
        ;;
      --config | --workdir) fail "$argument wants its value in the same word: $argument=VALUE" ;;
    esac
    for word in $values; do
      case "$argument" in
        "--$word="*)
          printf -v "${word//-/_}" %s "${argument#*=}"
          continue 2
          ;;
        "--$word") fail "--$word wants its value in the same word: --$word=VALUE" ;;
      esac
    done
    for word in $switches; do
      if [[ "$argument" == "--$word" ]]; then
        printf -v "${word//-/_}" 1
        continue 2
      fi
    done
    flags+=("$argument")
  done
}

# check_flags [remote]: what agfsync cannot do without, told before a machine is paid for. On a
# remote machine there is nothing but what lies in the repository and in buckets.
check_flags() {
  local argument config="" workdir=""
  for argument in ${flags[@]+"${flags[@]}"}; do
    case "$argument" in
      --config=*) config="${argument#*=}" ;;
      --workdir=*) workdir="${argument#*=}" ;;
    esac
  done
  [[ -n "$config" ]] || fail "--config=FILE is missing, such as --config=configs/sd15.py"
  [[ -n "$workdir" ]] || fail "--workdir=DIR is missing: where all that the run makes is kept"
  [[ "${1:-}" == remote ]] || return 0
  [[ "$workdir" == gs://?* ]] ||
    fail "--workdir=$workdir: the workers share no disk; give a bucket, such as" \
      "--workdir=gs://BUCKET/FOLDER"
  case "${config%%:*}" in
    /* | ../* | */../*) ;;
    *) [[ ! -f "$repo/${config%%:*}" ]] || return 0 ;;
  esac
  fail "--config=$config: no file of the repository, which is all that the workers get;" \
    "put it there and name it from its root, such as --config=configs/sd15.py"
}

# check_name NAME: what Google Cloud and Kubernetes allow, and what is safe as a file's name.
check_name() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "--name=$1: expected small letters, digits and hyphens, beginning with a letter"
}

# need COMMAND ADVICE
need() {
  [[ -n "$dry_run" ]] || command -v "$1" >/dev/null || fail "there is no $1 here. $2"
}

# quote WORD...: one line, which bash reads back as the same words. Kubernetes replaces $(NAME) and
# $$ in a command; the line has neither, whatever the words are.
quote() {
  local word quoted line=""
  for word in "$@"; do
    case "$word" in
      "" | *[![:print:]]* | *[\'\$]*) # the last two would end it, or be read by Kubernetes
        printf -v quoted %q "$word"
        if [[ "$quoted" == "\$'"* ]]; then
          quoted="${quoted:2}"
          quoted="\$'${quoted//\$/\\044}"
        fi
        ;;
      *[!A-Za-z0-9_@%+=:,./-]*) quoted="'$word'" ;;
      *) quoted="$word" ;;
    esac
    line+=" $quoted"
  done
  printf '%s\n' "${line# }"
}

# run COMMAND...: does it; with --dry-run, shows it, ready to be pasted.
run() {
  if [[ -n "$dry_run" ]]; then quote "$@"; else "$@"; fi
}
