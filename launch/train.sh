#!/usr/bin/env bash
# train.sh RUN [section.key=value ...]: train a run through the deepspeed launcher.
#   RANKS=2 launch/train.sh runs/a                    on this machine
#   HOSTFILE=launch/hostfile.example launch/train.sh runs/a      on the hosts of a hostfile, over ssh
# PYTHON: the interpreter (default: python). MASTER_PORT: a free port (default: chosen on this machine, 29500 on hosts).
# Environment that all hosts need goes to the file that DS_ENV_FILE names, KEY=VALUE lines only.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torch warns many times a step of calls that DeepSpeed makes; PYTHON* travels to all hosts
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}
if [ -n "${HOSTFILE:-}" ]; then
  where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
else
  port=${MASTER_PORT:-$("$PYTHON" -c 'from megakd.dist import free_port; print(free_port())')}
  where=(--num_gpus "${RANKS:-1}" --master_addr 127.0.0.1 --master_port "$port")
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --log_level warning --no_local_rank --module megakd train "$@"
