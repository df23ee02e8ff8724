#!/usr/bin/env bash
# train.sh RUN [section.key=value ...]: train a run on several ranks. The short name of: run.sh train RUN
#   RANKS=2 launch/train.sh runs/a                    on this machine
#   HOSTFILE=launch/hostfile.example launch/train.sh runs/a      on the hosts of a hostfile, over ssh
# run.sh explains the variables.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
exec bash "$(dirname "$0")/run.sh" train "$@"
