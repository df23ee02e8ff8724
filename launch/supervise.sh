#!/usr/bin/env bash
# supervise.sh VERB RUN [section.key=value ...]: run.sh on the hosts of HOSTFILE, started again after every fault.
#   HOSTFILE=launch/hostfile.example launch/supervise.sh train runs/a
# It waits until all hosts answer, and starts a new attempt after a crash, a host without power, or MEGAKD_STALL seconds
# (default: 600) without output or progress. Every attempt goes on from what is saved. A user error ends it (exit code
# 2), as do TERM, USR1 or Ctrl-C: the ranks save what they have, exit code 85. Variables of run.sh, and:
# MEGAKD_MAX_RELAUNCHES: attempts after the first (default: 10). MEGAKD_HOST_WAIT: seconds to wait for hosts (1800).
set -uo pipefail
MEGAKD_LAUNCH=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/lib.sh"
hosts=()
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/hosts.sh"
[ $# -ge 2 ] || usage
verb=$1 run=$2 attempt='' stopped=''
read_settings
[ -n "${HOSTFILE:-}" ] || refuse "HOSTFILE is not set; name the file of the hosts"
read_hosts "$HOSTFILE"
export MEGAKD_STALL=${MEGAKD_STALL:-600}
LAUNCH_ID=$(date +%Y%m%d-%H%M%S)-$$ # of all attempts, so that each ends what a lost host has kept
export LAUNCH_ID
most=${MEGAKD_MAX_RELAUNCHES:-10} patience=${MEGAKD_HOST_WAIT:-1800}

stop() {
  stopped=1
  [ -z "$attempt" ] || kill -TERM "$attempt" 2>/dev/null
}

clock() { say "$(date +%T) $1"; }

wait_for_hosts() {
  local host said='' since=$SECONDS
  for host in "${hosts[@]}"; do
    until on_host "$host" true &>/dev/null; do
      [ -z "$stopped" ] || return
      [ "$said" = "$host" ] || clock "waiting for host $host"
      said=$host
      if [ $((SECONDS - since)) -ge "$patience" ]; then
        give_up "host $host did not answer for $patience s (MEGAKD_HOST_WAIT)" 1
      fi
      sleep 2
    done
  done
}

give_up() { # WHY CODE
  clock "$1"
  [ "$verb" != train ] || record_failure "$run" "$2"
  exit "$2"
}

trap stop TERM USR1 INT
for ((count = 0; ; count++)); do
  wait_for_hosts
  [ -z "$stopped" ] || exit 85
  clock "attempt $count"
  # a session of its own: Ctrl-C reaches it once, from here
  setsid bash "$MEGAKD_LAUNCH/run.sh" "$@" &
  attempt=$!
  while kill -0 "$attempt" 2>/dev/null; do wait "$attempt"; done # a signal's trap interrupts it
  wait "$attempt"
  code=$?
  case $code in
    0 | 85) exit "$code" ;;
    2) give_up "a user error, named above; correct it and start again" 2 ;;
  esac
  [ -z "$stopped" ] || exit 85
  [ "$count" -lt "$most" ] || give_up "exit code $code, after $most relaunches (MEGAKD_MAX_RELAUNCHES)" "$code"
  clock "attempt $count ended with exit code $code"
done
