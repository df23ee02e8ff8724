# shellcheck shell=bash
# lib.sh: what the job files of this folder share. They source it, and call in this order:
#   job_begin FILE "$@"       print the usage, or read cluster.env; a signal from here on is not lost
#   job_meet                  set MASTER_ADDR and MASTER_PORT, where the tasks meet
#   job_nodes RUN [WORD ...]  with TASKS_PER_NODE: set NODES, options of a step on as many nodes as the run can train on
#   job_step [SRUN OPTION ...] VERB [WORD ...]      run the verb on all tasks, then end or requeue the job
JOB=$(basename "$0") stopped='' step='' verb='' run=''
CONTAINER=() SRUN_OPTIONS=() # cluster.env may set both
NODES=()

say() { echo "$JOB: $*" >&2; }

refuse() {
  say "$1"
  exit 2
}

number() { # NAME VALUE
  case $2 in '' | 0* | *[!0-9]*) refuse "$1=$2: expected a whole number above 0" ;; esac
}

explain() { sed -n '2,/^#SBATCH\|^[^#]/s/^# //p' "$0"; } # by the comment at the head of the file

usage() {
  explain >&2
  exit 2
}

help() { # WORD ...: where one of them asks for it
  local word
  for word; do
    case $word in -h | --help) explain && exit 0 ;; esac
  done
}

job_begin() {
  JOB=$(basename "$1")
  help "${@:2}"
  [ $# -ge 2 ] || usage
  trap 'stopped=1' USR1 TERM
  read_settings
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  # torch warns many times a step of calls that DeepSpeed makes
  export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}
}

read_settings() {
  local settings=${MEGAKD_CLUSTER_ENV:-$MEGAKD_LAUNCH/cluster.env}
  if [ -f "$settings" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$settings"
    set +a
  elif [ -n "${MEGAKD_CLUSTER_ENV:-}" ]; then
    refuse "MEGAKD_CLUSTER_ENV=$MEGAKD_CLUSTER_ENV: no such file"
  fi
  export PYTHON=${PYTHON:-python}
}

check_python() { # MODULE ...: does PYTHON have them? In milliseconds, for it imports none
  local lacks
  command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON: no such program"
  lacks=$("$PYTHON" -c 'import sys; from importlib.util import find_spec
sys.exit(", ".join(name for name in sys.argv[1:] if find_spec(name) is None) or None)' "$@" 2>&1) ||
    refuse "PYTHON=$PYTHON does not have: $(tail -n 1 <<<"$lacks"); set PYTHON to the one in which MegaKD is installed"
}

job_meet() {
  local head
  head=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?start with sbatch}" | head -n 1)
  MASTER_ADDR=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }')
  # where node names do not resolve, Slurm still knows the address
  [ -n "$MASTER_ADDR" ] || MASTER_ADDR=$(scontrol show node -o "$head" | sed -nE 's/.* NodeAddr=([^ ]+).*/\1/p')
  [ -n "$MASTER_ADDR" ] ||
    refuse "Slurm's node $head: no address found by getent or scontrol; set NodeAddr in slurm.conf"
  # of this job and this attempt alone, as jobs may share the first node; below the ports that systems give to
  # connections by themselves (from 32768 on Linux)
  MASTER_PORT=$((15000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0} % 10) % 15000))
  export MASTER_ADDR MASTER_PORT
}

refuse_run() { # RUN WHY: of a training that cannot start
  record_failure "$1" 2
  refuse "$2"
}

job_nodes() {
  local tasks=${TASKS_PER_NODE:-} nodes=${SLURM_JOB_NUM_NODES:-1} fits count cpus
  [ -n "$tasks" ] || return 0
  number TASKS_PER_NODE "$tasks"
  [ -z "${SLURM_NTASKS:-}" ] ||
    refuse "TASKS_PER_NODE=$tasks: leave out --ntasks and --ntasks-per-node, with which Slurm gives the least --nodes"
  fits=$("${CONTAINER[@]}" "$PYTHON" -m megakd.train.elastic "$1" "$tasks" $((nodes * tasks)) "${@:2}")
  case $? in
    0) ;;
    2) refuse_run "$1" "$fits" ;;
    *) # a Python that is in a container of srun's alone
      fits=$((nodes * tasks))
      say "$PYTHON on this node does not say on how many ranks the run can train; all nodes train"
      ;;
  esac
  for ((count = nodes; count > 0; count--)); do
    [[ " $fits " != *" $((count * tasks)) "* ]] || break
  done
  [ "$count" -gt 0 ] || refuse_run "$1" "TASKS_PER_NODE=$tasks: the run can train on ${fits// /, } ranks"
  [ "$count" = "$nodes" ] || say "trains on $count of the $nodes nodes: the run can train on ${fits// /, } ranks"
  NODES=("--nodes=$count" "--ntasks=$((count * tasks))" "--ntasks-per-node=$tasks")
  NODES+=("--nodelist=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$count" | paste -sd ,)")
  cpus=$((${SLURM_CPUS_PER_TASK:-1} / tasks)) # a task of sbatch is a whole node here
  export OMP_NUM_THREADS=$((cpus > 0 ? cpus : 1)) SRUN_CPUS_PER_TASK=$((cpus > 0 ? cpus : 1))
  # a task that is alone is a rank all the same, and starts no others
  [ $((count * tasks)) -gt 1 ] || export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0
}

job_step() {
  local options=() code
  while [[ $1 == --* ]]; do
    options+=("$1")
    shift
  done
  verb=$1 run=${2:-.}
  [ -d "$run" ] || run=.
  # ranks that end with an error leave their code there: srun gives the highest, which is the 85 of ranks that it then ends
  export MEGAKD_EXIT_CODE=$run/.exit-${SLURM_JOB_ID:-0}
  rm -f "$MEGAKD_EXIT_CODE"-*
  # of a container, this node knows nothing
  [ -n "${CONTAINER[*]}${SRUN_OPTIONS[*]}" ] || check_python megakd
  if [ -z "$stopped" ]; then
    srun "${SRUN_OPTIONS[@]}" "${options[@]}" "${CONTAINER[@]}" "$PYTHON" -m megakd "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
      if [ -z "$stopped" ]; then
        wait "$step" # a signal's trap interrupts it
      else
        pass_on
        # again after a while: a step that is about to start may have missed it
        sleep 5 &>/dev/null &
        wait -n "$step" "$!"
      fi
    done
    wait "$step"
    code=$?
  else
    code=85
  fi
  job_end "$code"
}

pass_on() { scancel --signal=USR1 "$SLURM_JOB_ID.0" 2>/dev/null || kill -USR1 "$step" 2>/dev/null; }

job_end() { # EXIT CODE OF THE STEP
  local code=$1 most=${MEGAKD_MAX_REQUEUES:-5} count
  local file=$run/.faults-${SLURM_JOB_ID:-0} # faults in a row; a stop in between has saved, so they count from 0 again
  trap '' USR1
  trap 'exit 0' TERM # requeueing ends this shell
  [ ! -e "$MEGAKD_EXIT_CODE-1" ] || [ "$code" != 85 ] || code=1
  [ ! -e "$MEGAKD_EXIT_CODE-2" ] || code=2
  rm -f "$MEGAKD_EXIT_CODE"-*
  count=$(($(cat "$file" 2>/dev/null || echo 0) + 1))
  if [ "$code" = 0 ]; then
    rm -f "$file"
    exit 0
  elif [ "$code" = 2 ]; then
    failed "a user error, named above; correct it and submit the same job again"
  elif [ "$code" = 85 ] || [ -n "$stopped" ]; then
    rm -f "$file"
    code=85
    requeue "stopped by a signal"
  elif [ "$count" -gt "$most" ]; then
    failed "exit code $code, after $most requeues in a row (MEGAKD_MAX_REQUEUES); the job ends here"
  else
    echo "$count" >"$file"
    # a rank that was killed or does not answer, a node's fault: the next attempt goes on from what is saved
    requeue "exit code $code, fault $count of at most $most in a row"
  fi
  exit "$code"
}

requeue() { # WHY
  local id=${SLURM_JOB_ID:-0} state
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID:-$id}_$SLURM_ARRAY_TASK_ID
  state=$(squeue --noheader --jobs="$id" --format=%T 2>/dev/null)
  case $state in
    CANCELLED | COMPLETING)
      say "$1; the job was cancelled: submit it again to go on (not after a lost node: Slurm requeues it)"
      ;;
    *)
      say "$1; requeued"
      scontrol requeue "$id" || say "Slurm does not requeue this job: submit it again to go on"
      ;;
  esac
}

failed() { # WHY
  rm -f "$file"
  say "$1"
  [ "$verb" != train ] || record_failure "$run" "$code"
}

record_failure() { # RUN CODE: tell `megakd watch` that no attempt follows, where the training is not finished
  "${CONTAINER[@]}" "$PYTHON" -c 'import sys; from megakd.finish import record_failure
record_failure(*sys.argv[1:])' \
    "$1" "$2" "${SLURM_JOB_ID:-}" || say "$1: the failure could not be recorded; megakd watch does not learn of it"
}
