#!/usr/bin/env bash
# slurm.sh up|down FOLDER: a Slurm of two nodes n1 and n2, which are the hosts that two_hosts.sh made in FOLDER, for tests of
# job files. Key, controller and ports are of FOLDER alone. `up` starts what is missing and waits until both nodes take
# jobs; `down` ends what runs on this machine. A node's daemon ends with its host. Clients: SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
what=$1 folder=$2
net=$(awk '$2 == "n1" { sub(/\.11$/, "", $1); print $1 }' "$folder/hosts")
port=$((20000 + 16#$(md5sum <<<"$folder" | cut -c1-3))) # below the ports that systems give to connections
export SLURM_CONF=$folder/slurm.conf

configure() {
  mkdir -m 711 "$folder/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  # both nodes would report the size of this machine: config_overrides lets them claim more
  cat >"$SLURM_CONF" <<CONF
ClusterName=megakd
SlurmctldHost=$(uname -n)($net.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/controller
SlurmdSpoolDir=$folder/%n/spool
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/%n/slurmd.pid
SlurmctldLogFile=$folder/controller.log
SlurmdLogFile=$folder/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# a node without power is noticed after so many seconds
SlurmdTimeout=20
KillWait=10
# what 'scontrol show job' says of a job that has ended stays for all tests
MinJobAge=3600
NodeName=n1 NodeHostname=n1 NodeAddr=$net.11 CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname=n2 NodeAddr=$net.12 CPUs=4 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=OFF
# its jobs make room for those of main: TERM, GraceTime seconds, KILL, and back into the queue
PartitionName=spare Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
CONF
  # slurmd looks for cgroups although nothing uses them, and ends where none are mounted; version 1 is not looked for
  printf 'CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\n' >"$folder/cgroup.conf"
}

runs() { # PIDFILE; what has ended and waits for its parent has no program any more
  [ -e "/proc/$(cat "$folder/$1" 2>/dev/null || echo none)/exe" ]
}

answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; } # ADDRESS PORT

start_controller() {
  if ! runs munge/pid; then
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
      --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
  fi
  runs controller.pid || slurmctld -f "$SLURM_CONF"
}

start_node() { # NUMBER
  answers "$net.1$1" "$((port + 1))" || "$folder/bin/ssh" "n$1" slurmd -N "n$1" -f "$SLURM_CONF"
}

wait_for_nodes() {
  local try
  for try in {1..240}; do
    [ "$(sinfo --noheader --Node --partition=main --states=idle,mixed,allocated 2>/dev/null | wc -l)" = 2 ] && return
    # a node that was lost is asked back
    [ $((try % 20)) != 0 ] || scontrol update NodeName=n1,n2 State=RESUME 2>/dev/null || true
    sleep 0.25
  done
  sinfo --Node --long
  tail -n 5 "$folder"/controller.log "$folder"/n?/slurmd.log
  return 1
} >&2

end() { # PIDFILE
  ! runs "$1" || kill -TERM "$(cat "$folder/$1")"
  for _ in {1..100}; do
    runs "$1" || return 0
    sleep 0.1
  done
  kill -KILL "$(cat "$folder/$1")"
}

case $what in
  up)
    [ -e "$SLURM_CONF" ] || configure
    start_controller
    for i in 1 2; do start_node "$i"; done
    wait_for_nodes
    ;;
  down)
    end controller.pid
    end munge/pid
    ;;
esac
