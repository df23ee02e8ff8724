#!/usr/bin/env bash
# run.sh VERB RUN [section.key=value ...]: run train, generate-logits, compress or watch on several ranks.
#   RANKS=2 launch/run.sh train runs/a                              on this machine
#   HOSTFILE=launch/hostfile.example launch/run.sh train runs/a     on the hosts of a hostfile, over ssh
# TERM, USR1, HUP or Ctrl-C: the ranks save what they have, exit code 85. When a host fails, the others are ended too.
# IFNAME: the network between hosts, or MASTER_ADDR: an address of the first host (default: its first address).
# MASTER_PORT: a free port (default: a new one for each start). LAUNCHER: pdsh (default) or openmpi, which needs IFNAME.
# DEEPSPEED_TIMEOUT: minutes that ranks wait for one that does not answer (default: 5).
# MEGAKD_STALL: seconds without output or progress after which all is ended (default: never).
# PYTHON: the interpreter (default: python). CUDA_VISIBLE_DEVICES: which GPUs of this machine.
# All hosts get cluster.env's variables, NCCL_*, GLOO_*, MEGAKD_*, HF_*, and the KEY=VALUE lines of DS_ENV_FILE.
set -uo pipefail
MEGAKD_LAUNCH=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/lib.sh"
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/hosts.sh"
help "$@"
[ $# -ge 2 ] || usage
case $1 in
  train | generate-logits | compress | watch) verb=$1 run=$2 hosts=() ;;
  *) refuse "$1: one process does it: megakd $1 $2" ;;
esac

before=$(env)
read_settings
check_python megakd deepspeed
for name in MASTER_PORT MEGAKD_STALL DEEPSPEED_TIMEOUT; do
  [ -z "${!name:-}" ] || number "$name" "${!name}"
done
[ -n "${RANKS:-}${HOSTFILE:-}" ] ||
  refuse "set RANKS, the number of ranks on this machine, or HOSTFILE, the file of the hosts"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torch warns many times a step of calls that DeepSpeed makes
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}

on_this_machine() { # ends as the launcher does; 85 where a signal stopped it
  local ranks=$RANKS port where gpus launcher code=85
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
  hosts=(localhost) id=${LAUNCH_ID:-$start} log=/dev/null # what it prints goes to the terminal
  if [ -z "$stopped" ]; then
    # a session of its own, without USR1: the launchers would end and leave the ranks, or end them before they have saved
    (
      trap '' USR1
      MEGAKD_LAUNCH_ID=$id exec setsid "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --log_level error \
        --no_local_rank --module megakd "$@"
    ) &
    launcher=$!
    watch_launcher
    kill -KILL -- "-$launcher" 2>/dev/null
    { wait "$launcher"; } 2>/dev/null # without the shell's own line on what was killed
    code=$?
    end_processes
  fi
  [ -z "$stopped" ] || [ "$code" = 0 ] || [ "$code" = 2 ] || code=85
  end "$code"
}

end() { # CODE: in words too, after what DeepSpeed says of it
  case $1 in
    2) say "exit code 2: a user error, named above; correct it, then the same command goes on" ;;
    85) say "stopped, exit code 85; the same command goes on from what is saved" ;;
  esac
  exit "$1"
}

# the first host's networks and a free port of it: "port P", and "INTERFACE ADDRESS" for each network
# shellcheck disable=SC2016 # for the bash of the hosts
NETWORKS='for try in {1..50}; do
  port=$((15000 + (RANDOM * 32768 + RANDOM) % 15000))
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
done
echo "port $port"
ip -o -4 addr show scope global up | awk "{ sub(/\/.*/, \"\", \$4); print \$2, \$4 }"'

choose_network() { # sets MASTER_ADDR and MASTER_PORT, after asking the hosts
  local host networks first='' found
  if this_machine; then
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} IFNAME=${IFNAME:-lo}
  fi
  for host in "${hosts[@]}"; do
    networks=$(on_host "$host" "$NETWORKS" 2>"$log.ssh") ||
      refuse "host $host: $(tail -n 1 "$log.ssh"); make this work: ssh -o BatchMode=yes $host true"
    first=${first:-$networks}
    ! this_machine || break
    [ -z "${IFNAME:-}" ] || grep -q "^$IFNAME " <<<"$networks" ||
      refuse "IFNAME=$IFNAME: host $host has no such network, but: $(grep -v ^port <<<"$networks" | paste -sd, -)"
    if [ -n "${MASTER_ADDR:-}" ]; then
      # shellcheck disable=SC2016 # for the bash of the host
      found=$(on_host "$host" 'getent ahostsv4 "$1"' "$MASTER_ADDR" 2>/dev/null | awk 'NR == 1 { print $1 }')
      [ -n "$found" ] || refuse "MASTER_ADDR=$MASTER_ADDR: host $host does not know this name"
      grep -v ^port <<<"$first" | grep -qx "[^ ]* ${found//./\\.}" ||
        refuse "MASTER_ADDR=$MASTER_ADDR: not an address of the first host, ${hosts[0]}: $(grep -v ^port <<<"$first" | paste -sd, -)"
    fi
  done
  MASTER_PORT=${MASTER_PORT:-$(awk '$1 == "port" { print $2 }' <<<"$first")}
  [ -z "${MASTER_ADDR:-}" ] || return 0
  MASTER_ADDR=$(awk -v name="${IFNAME:-}" '$1 != "port" && (name == "" || $1 == name) { print $2; exit }' <<<"$first")
  [ -n "$MASTER_ADDR" ] || refuse "host ${hosts[0]}: no network found (ip -o -4 addr); set MASTER_ADDR"
  [ -n "${IFNAME:-}" ] || [ "$(grep -vc ^port <<<"$first")" = 1 ] ||
    say "host ${hosts[0]} has several networks ($(grep -v ^port <<<"$first" | paste -sd, -)); IFNAME=NAME chooses another"
}

variables() { # KEY=VALUE lines of what all ranks need: what cluster.env set or changed, and what libraries read
  local read='^(OMP_|DS_ACCELERATOR=|DEEPSPEED_TIMEOUT=|NCCL_|GLOO_|MEGAKD_|HF_HOME=|HF_HUB_|TORCH_)'
  { comm -13 <(sort <<<"$before") <(env | sort) && env | grep -E "$read"; } |
    grep -E '^[A-Za-z_][A-Za-z0-9_]*=.' | grep -vE '^(_|SHLVL|PWD|PYTHON)=' | sort -u
}

write_variables() { # FILE: for DeepSpeed, which takes neither blank lines nor comments
  local name=${DS_ENV_FILE:-.deepspeed_env} given
  variables | sed 's/[\\"$`]/\\&/g' >"$1" # DeepSpeed puts values in double quotes for the shells of the hosts
  [[ $name = /* ]] && given=("$name") || given=("${HOME:-}/$name" "$name")
  cat "${given[@]}" 2>/dev/null | grep -E '^[A-Za-z_][A-Za-z0-9_]*=' >>"$1"
}

codes() { sed -nE 's/.*ssh exited with exit code ([0-9]+).*/\1/p' "$log" | sort -un; }

what_failed() {
  if [ -e "$MEGAKD_EXIT_CODE-2" ]; then
    echo "a rank met a user error"
  else
    grep 'ssh exited with exit code' "$log" | grep -v 'code 85$' | tail -n 1 |
      sed -E 's/^pdsh@[^:]*: //; /code 255$/s/^/a host failed: /; /^a host/!s/^/a rank failed: /'
  fi
}

idle() { # SECONDS: has nothing been printed or written for so long? A watcher may wait as long as a training
  [ "$verb" != watch ] || [ -n "$stopped" ] || return 1
  [ -z "$(find -L "$log" "$run" -newermt "@$(($(date +%s) - $1))" -print -quit 2>/dev/null)" ]
}

watch_launcher() { # until it has ended, or has to be ended
  local failed='' signalled=-60
  while kill -0 "$launcher" 2>/dev/null; do
    sleep 1 &>/dev/null &
    wait -n "$launcher" "$!"
    if [ -n "$stopped" ] && [ $((SECONDS - signalled)) -ge 5 ]; then
      # again and again: a rank that is about to start may have missed it
      signalled=$SECONDS
      stop_ranks
    fi
    if [ -z "$failed" ] && codes | grep -qvx 85; then
      failed=$SECONDS
      say "$(date +%T) $(what_failed); the others have 10 s to end"
    fi
    if [ -n "$failed" ] && [ $((SECONDS - failed)) -ge 10 ]; then
      return
    elif [ -n "${MEGAKD_STALL:-}${stopped:+600}" ] && idle "${MEGAKD_STALL:-600}"; then
      say "$(date +%T) no output and no progress for ${MEGAKD_STALL:-600} s; ending all ranks"
      return
    fi
  done
}

start=$(date +%Y%m%d-%H%M%S)-$$
trap '[ -n "$stopped" ] || say "stopping: the ranks save"; stopped=1' TERM USR1 INT HUP
[ -n "${HOSTFILE:-}" ] || on_this_machine "$@"
read_hosts "$HOSTFILE"
[ -z "${RANKS:-}" ] || refuse "RANKS=$RANKS and HOSTFILE=$HOSTFILE: the file's slots say how many ranks start; unset one"
if [ -n "${DS_ENV_FILE:-}" ]; then
  [ -f "$DS_ENV_FILE" ] || [ -f "$HOME/$DS_ENV_FILE" ] || refuse "DS_ENV_FILE=$DS_ENV_FILE: no such file"
fi
[ -d "$run" ] || refuse "$run: no such folder"
id=${LAUNCH_ID:-$start}
mkdir -p "$run/launch"
log=$run/launch/$start.log MEGAKD_EXIT_CODE=$run/launch/$start.exit
variables=$(realpath "$run")/launch/$start.env
trap 'rm -f "$variables" "$log.ssh"; [ -s "$log" ] || rm -f "$log"' EXIT
: >"$log"
choose_network
export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-5} MEGAKD_EXIT_CODE
if [ -n "${IFNAME:-}" ]; then
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFNAME} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$IFNAME}
fi
(umask 077 && : >"$variables") # cluster.env may hold a password
write_variables "$variables"
echo "MEGAKD_LAUNCH_ID=$id" >>"$variables"
where=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT" --master_addr "$MASTER_ADDR")
this_machine || where+=(--force_multi)
case ${LAUNCHER:-pdsh} in
  pdsh) ;;
  openmpi)
    [ -n "${IFNAME:-}" ] || refuse "LAUNCHER=openmpi: set IFNAME, the network that mpirun takes too"
    mpi="--mca btl_tcp_if_include $IFNAME --mca oob_tcp_if_include $IFNAME --bind-to none"
    [ "$(id -u)" != 0 ] || mpi+=" --allow-run-as-root"
    where+=(--launcher openmpi --launcher_args "$mpi")
    # mpirun tells its ranks their numbers, not where they meet
    printf '%s\n' "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" >>"$variables"
    ;;
  *) refuse "LAUNCHER=$LAUNCHER: expected pdsh or openmpi" ;;
esac
end_processes # of an attempt before this one
say "$verb on ${hosts[*]}, which meet at $MASTER_ADDR:$MASTER_PORT; log: $log"
say "ranks end when one has not answered for $DEEPSPEED_TIMEOUT minutes (DEEPSPEED_TIMEOUT)"
if [ -z "$stopped" ]; then
  # a session of its own: Ctrl-C must not reach the launcher, which would end all DeepSpeed jobs of the user on the hosts
  export DS_ENV_FILE=$variables PDSH_SSH_ARGS_APPEND="${SSH_OPTIONS[*]} ${PDSH_SSH_ARGS_APPEND:-}"
  MEGAKD_LAUNCH_ID=$id setsid "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --log_level warning --no_local_rank --module megakd "$@" \
    >>"$log" 2>&1 </dev/null &
  launcher=$!
  tail -n +1 -s 0.2 -f --pid="$launcher" "$log" &
  shown=$!
  watch_launcher
  kill -KILL -- "-$launcher" 2>/dev/null # not TERM, on which DeepSpeed ends all its jobs of the user
  { wait "$launcher"; } 2>/dev/null # without the shell's own line on what was killed
  code=$?
  wait "$shown"
  end_processes
else
  code=85
fi

if [ -e "$MEGAKD_EXIT_CODE-2" ]; then
  code=2
elif [ "$code" != 0 ] && [ -n "$stopped" ]; then
  code=85
elif [ "$code" = 85 ] && { [ -e "$MEGAKD_EXIT_CODE-1" ] || codes | grep -qvx 85; }; then
  code=1
fi
rm -f "$MEGAKD_EXIT_CODE"-*
end "$code"
