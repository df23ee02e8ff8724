#!/usr/bin/env bash
# train.sh RUN [section.key=value ...]: train a run on several ranks. The short name of: run.sh train RUN
#   RANKS=2 launch/train.sh runs/a                    on this machine
#   HOSTFILE=launch/hostfile.example launch/train.sh runs/a      on the hosts of a hostfile, over ssh
# run.sh explains the variables.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "$0")/lib.sh"
help "$@"
[ $# -ge 1 ] || usage
exec bash "$(dirname "$0")/run.sh" train "$@"
