#!/usr/bin/env bash
# train.sh RUN [section.key=value ...]: train a run through the deepspeed launcher.
#   RANKS=2 launch/train.sh runs/a                    on this machine
#   HOSTFILE=launch/hostfile.example launch/train.sh runs/a      on the hosts of a hostfile, over ssh
# PYTHON: the interpreter (default: python). MASTER_PORT: a free port (default: chosen on this machine, 29500 on hosts).
# CUDA_VISIBLE_DEVICES: which GPUs of this machine. DS_ENV_FILE: a file of KEY=VALUE lines that all hosts need.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
refuse() {
  echo "train.sh: $1" >&2
  exit 2
}
number() { # NAME VALUE
  case $2 in '' | 0* | *[!0-9]*) refuse "$1=$2: expected a whole number above 0" ;; esac
}
PYTHON=${PYTHON:-python}
command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON: no such program"
[ -z "${MASTER_PORT:-}" ] || number MASTER_PORT "$MASTER_PORT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torch warns many times a step of calls that DeepSpeed makes; PYTHON* travels to all hosts
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}
if [ -n "${HOSTFILE:-}" ]; then
  # where DeepSpeed finds no hostfile, no file of variables or a single host, it goes on with this machine alone
  { [ -f "$HOSTFILE" ] && [ -r "$HOSTFILE" ]; } || refuse "HOSTFILE=$HOSTFILE: no such file"
  [ -z "${RANKS:-}" ] || refuse "RANKS=$RANKS and HOSTFILE=$HOSTFILE: the file's slots say how many ranks start; unset one"
  hosts=$(awk '{ sub(/^[ \t]+/, ""); sub(/\r$/, "") } /^#/ || /^$/ { next }
    !/^[^ \t]+[ \t]+slots=[1-9][0-9]*([ \t]|$)/ { print NR ": expected HOST slots=N, got: " $0; exit 1 }
    seen[$1]++ { print NR ": host " $1 " is named twice"; exit 1 }
    { print $1 }' "$HOSTFILE") || refuse "HOSTFILE=$HOSTFILE, line $(tail -n 1 <<<"$hosts")"
  [ -n "$hosts" ] || refuse "HOSTFILE=$HOSTFILE: no host in it; expected lines HOST slots=N"
  if [ -n "${DS_ENV_FILE:-}" ]; then
    [ -f "$DS_ENV_FILE" ] || [ -f "$HOME/$DS_ENV_FILE" ] || refuse "DS_ENV_FILE=$DS_ENV_FILE: no such file"
  fi
  where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
  case $hosts in
    localhost | 127.0.0.1 | "$(uname -n)") ;;
    *) where+=(--force_multi) ;;
  esac
else
  ranks=${RANKS:-1}
  number RANKS "$ranks"
  port=${MASTER_PORT:-$("$PYTHON" -c 'from megakd.system.launcher import free_port; print(free_port())')}
  where=(--hostfile '' --master_addr 127.0.0.1 --master_port "$port")
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ "${DS_ACCELERATOR:-}" != cpu ] && [ -e /proc/driver/nvidia/version ]; then
    # with --num_gpus, DeepSpeed would ignore it and take the first GPUs of the machine
    case $CUDA_VISIBLE_DEVICES in
      *[!0-9,]*) refuse "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes numbers of GPUs alone" ;;
    esac
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    [ "${#gpus[@]}" -ge "$ranks" ] || refuse "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: fewer GPUs than $ranks ranks"
    gpus=("${gpus[@]:0:ranks}")
    where+=(--include "localhost:$(IFS=, && echo "${gpus[*]}")")
    unset CUDA_VISIBLE_DEVICES
  else
    where+=(--num_gpus "$ranks")
  fi
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --log_level warning --no_local_rank --module megakd train "$@"
