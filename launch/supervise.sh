#!/usr/bin/env bash
# supervise.sh VERB RUN [section.key=value ...]: run.sh on the hosts of HOSTFILE, started again after every fault.
#   HOSTFILE=launch/hostfile.example launch/supervise.sh train runs/a
#   MEGAKD_MIN_HOSTS=2 HOSTFILE=launch/hostfile.example launch/supervise.sh train runs/a
# It waits until all hosts answer, and starts a new attempt after a crash, a host without power, or MEGAKD_STALL seconds
# (default: 600) without output or progress. Every attempt goes on from what is saved. A user error ends it (exit code
# 2), as do TERM, USR1, HUP or Ctrl-C: the ranks save what they have, exit code 85. Variables of run.sh, and:
# MEGAKD_MAX_RELAUNCHES: attempts after a fault (default: 10). MEGAKD_HOST_WAIT: seconds to wait for hosts (1800).
# MEGAKD_MIN_HOSTS: go on with so many hosts (default: all) when others have not answered for MEGAKD_HOST_GRACE seconds
# (120). They are asked every MEGAKD_HOST_POLL seconds (60); when one has answered twice, all ranks save, and the next
# attempt starts on all that answer.
set -uo pipefail
MEGAKD_LAUNCH=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/lib.sh"
hosts=()
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/hosts.sh"
help "$@"
[ $# -ge 2 ] || usage
verb=$1 run=$2 attempt='' stopped=''
read_settings
# shellcheck disable=SC2034 # lib.sh reads it; ranks over ssh start outside of a container, as this file does
CONTAINER=()
[ -n "${HOSTFILE:-}" ] || refuse "HOSTFILE is not set; name the file of the hosts"
read_hosts "$HOSTFILE"
for name in MEGAKD_MAX_RELAUNCHES MEGAKD_HOST_WAIT MEGAKD_MIN_HOSTS MEGAKD_HOST_GRACE MEGAKD_HOST_POLL; do
  [ -z "${!name:-}" ] || number "$name" "${!name}"
done
check_python megakd deepspeed
export MEGAKD_STALL=${MEGAKD_STALL:-600}
LAUNCH_ID=$(date +%Y%m%d-%H%M%S)-$$ # of all attempts, so that each ends what a lost host has kept
export LAUNCH_ID
most=${MEGAKD_MAX_RELAUNCHES:-10} patience=${MEGAKD_HOST_WAIT:-1800} least=${MEGAKD_MIN_HOSTS:-${#hosts[@]}}
# answering, missing: of the file's hosts. chosen: those of an attempt. fits: numbers of ranks, where not all will do
answering=() missing=() chosen=() fits=''
declare -A why # of each missing host
# returned: hosts that answered when they were last asked. grown: whether some ended an attempt by that
returned='' grown='' started=''

stop() {
  stopped=1
  [ -z "$attempt" ] || kill -TERM "$attempt" 2>/dev/null
}

clock() { say "$(date +%T) $1"; }

give_up() { # WHY CODE
  clock "$1"
  [ "$verb" != train ] || [ -z "$started" ] || record_failure "$run" "$2"
  exit "$2"
}

check_least() { # VERB RUN WORD...: refuses a MEGAKD_MIN_HOSTS that does not fit the run or the launch; sets fits
  local ranks all
  [ "$least" -le "${#hosts[@]}" ] || refuse "MEGAKD_MIN_HOSTS=$least: HOSTFILE=$HOSTFILE has ${#hosts[@]} hosts"
  [ "$least" -lt "${#hosts[@]}" ] || return 0
  [ -z "${MASTER_ADDR:-}" ] ||
    refuse "MEGAKD_MIN_HOSTS=$least and MASTER_ADDR=$MASTER_ADDR, a host that may be lost; set IFNAME in its place"
  [ "$verb" = train ] || return 0
  ranks=$(ranks_on "${hosts[@]}")
  fits=$("$PYTHON" -m megakd.train.elastic "$run" "$(least_ranks "$least")" $((ranks - 1)) "${@:3}") ||
    refuse "MEGAKD_MIN_HOSTS=$least: $fits"
  all=$("$PYTHON" -m megakd.train.elastic "$run" "$ranks" "$ranks" "${@:3}") || refuse "$all"
  fits+=" $all"
}

misses() { # HOST FOLDER: why the host cannot train, in words; nothing where it can
  local said
  # shellcheck disable=SC2016 # for the bash of the hosts
  said=$(on_host "$1" 'cd "$1" 2>/dev/null || exit 3; command -v "$2" || exit 4' "$2" "$PYTHON" 2>&1 >/dev/null)
  case $? in
    0) ;;
    3) echo "no folder $2" ;;
    4) echo "no $PYTHON" ;;
    *) tail -n 1 <<<"${said:-no answer}" | sed 's/\r$//; s/^ssh: //' ;;
  esac
}

ask() { # HOST ...: adds those that answer, see the run and have Python to answering; sets missing to the others, and why
  local host folder reason
  folder=$(realpath "$run")
  missing=()
  while read -r host reason; do
    why[$host]=$reason
  done < <(for host; do echo "$host $(misses "$host" "$folder")" & done && wait)
  for host; do
    if [ -z "${why[$host]-no answer}" ]; then answering+=("$host"); else missing+=("$host"); fi
  done
}

refuse_wrong_hosts() { # where waiting does not help: a name that does not exist, a key that the host refuses
  local host
  for host in "${missing[@]}"; do
    case ${why[$host]} in
      *'Could not resolve hostname'* | *'Permission denied'* | *'Host key verification failed'*)
        refuse "host $host: ${why[$host]}; correct $HOSTFILE, or make this work: ssh -o BatchMode=yes $host true"
        ;;
    esac
  done
}

reasons() { # of all missing hosts
  local host
  for host in "${missing[@]}"; do echo "host $host (${why[$host]})"; done | paste -sd, - | sed 's/,host /, host /g'
}

choose() { # sets chosen: of the hosts that answer, from the file's first on, as many as the run's ranks allow
  local host
  chosen=()
  for host in "${hosts[@]}"; do
    [[ " ${answering[*]} " != *" $host "* ]] || chosen+=("$host")
  done
  while [ -n "$fits" ] && [ "${#chosen[@]}" -gt 0 ] && [[ " $fits " != *" $(ranks_on "${chosen[@]}") "* ]]; do
    unset 'chosen[-1]'
  done
}

choose_hosts() { # GRACE: all hosts, or GRACE seconds later those that answer, if they are enough
  local grace=$1 said='' since=$SECONDS host
  answering=() missing=("${hosts[@]}")
  while true; do
    ask "${missing[@]}"
    choose
    [ -z "$stopped" ] || return 0
    [ -n "$started$said" ] || refuse_wrong_hosts
    if [ "${#missing[@]}" = 0 ] || { [ "${#chosen[@]}" -ge "$least" ] && [ $((SECONDS - since)) -ge "$grace" ]; }; then
      break
    fi
    [ "$said" = "${missing[*]}" ] || clock "waiting for $(reasons)"
    said=${missing[*]}
    if [ $((SECONDS - since)) -ge "$patience" ]; then
      give_up "${missing[*]} did not answer for $patience s (MEGAKD_HOST_WAIT)" 1
    fi
    sleep 2
  done
  for host in "${hosts[@]}"; do
    if [[ " ${missing[*]} " = *" $host "* ]]; then
      clock "going on without host $host (${why[$host]})"
    elif [[ " ${chosen[*]} " != *" $host "* ]]; then
      clock "going on without host $host: the run can train on ${fits// /, } ranks"
    fi
  done
}

wait_for_lock() { # a host that does not answer may still train; nothing is lost while it waits for the other ranks
  local said='' since=$SECONDS
  until flock --nonblock "$run/train.lock" true; do
    [ -z "$stopped" ] || return 0
    [ -n "$said" ] || clock "waiting for $run/train.lock, which a rank on a host that does not answer still holds"
    said=1
    [ $((SECONDS - since)) -lt "$patience" ] || give_up "$run/train.lock was held for $patience s (MEGAKD_HOST_WAIT)" 1
    sleep 2
  done
}

look_for_hosts() { # ends the attempt where a host has answered twice in a row, with which more ranks can train
  local reached=("${answering[@]}") lost=("${missing[@]}") now=("${chosen[@]}") before=" $returned " back=() host
  answering=()
  ask "${lost[@]}"
  returned=${answering[*]}
  for host in "${answering[@]}"; do
    [[ $before != *" $host "* ]] || back+=("$host")
  done
  answering=("${reached[@]}" "${back[@]}") missing=("${lost[@]}")
  choose
  if [ "$(ranks_on "${chosen[@]}")" -gt "$(ranks_on "${now[@]}")" ]; then
    clock "${back[*]} answers again: the ranks save, to go on with ${chosen[*]}"
    grown=1
    kill -TERM "$attempt" 2>/dev/null
  fi
  answering=("${reached[@]}") chosen=("${now[@]}")
}

start_attempt() { # VERB RUN WORD...: run.sh on the chosen hosts, to its end; sets code, and grown where hosts came back
  local hostfile=$HOSTFILE nap
  grown='' returned=''
  if [ "${#chosen[@]}" -lt "${#hosts[@]}" ]; then
    hostfile=$run/launch/$LAUNCH_ID.hosts
    mkdir -p "$run/launch"
    hostfile_of "${chosen[@]}" >"$hostfile"
    [ "$verb" != train ] || wait_for_lock
  fi
  started=1
  # a session of its own: Ctrl-C reaches it once, from here
  HOSTFILE=$hostfile setsid bash "$MEGAKD_LAUNCH/run.sh" "$@" &
  attempt=$!
  while kill -0 "$attempt" 2>/dev/null; do
    if [ "${#missing[@]}" = 0 ] || [ -n "$grown$stopped" ]; then
      wait "$attempt" # a signal's trap interrupts it
    else
      sleep "${MEGAKD_HOST_POLL:-60}" &
      nap=$!
      wait -n "$attempt" "$nap"
      if kill -0 "$nap" 2>/dev/null; then
        kill "$nap"
      elif [ -z "$stopped" ]; then
        look_for_hosts
      fi
    fi
  done
  wait "$attempt"
  code=$?
  [ "$hostfile" = "$HOSTFILE" ] || rm -f "$hostfile"
}

all_answer() { # HOST ...
  answering=()
  ask "$@"
  [ "${#missing[@]}" = 0 ]
}

trap stop TERM USR1 INT HUP
check_least "$@"
grace=${MEGAKD_HOST_GRACE:-120} faults=0
for ((count = 0; ; count++)); do
  choose_hosts "$grace"
  [ -z "$stopped" ] || exit 85
  clock "attempt $count on ${chosen[*]}"
  start_attempt "$@"
  [ "$code" != 0 ] || exit 0
  [ -z "$stopped" ] || exit 85
  grace=${MEGAKD_HOST_GRACE:-120}
  if [ "$code" = 85 ]; then
    [ -n "$grown" ] || exit 85
    grace=0 # those that are still missing were waited for already
  elif [ "$code" = 2 ] && all_answer "${chosen[@]}"; then
    give_up "a user error, named above; correct it and start again" 2
  elif [ "$faults" -ge "$most" ]; then
    give_up "exit code $code, after $most relaunches (MEGAKD_MAX_RELAUNCHES)" "$code"
  else
    ((faults += 1))
  fi
  clock "attempt $count ended with exit code $code"
done
