#!/usr/bin/env bash
# pipeline.sh [--dry-run] RUN: submit what a run lacks as a chain of Slurm jobs, and print their table.
#   launch/pipeline.sh --dry-run runs/a                    the sbatch lines alone
#   LOGITS_OPTIONS="--array=0-15 --gpus-per-task=1" TRAIN_OPTIONS="--ntasks-per-node=8 --gpus-per-node=8" \
#     launch/pipeline.sh runs/a
# tokenize -> compress, logits -> train, watch -> finish (evaluate, export, report). TOKENIZE_OPTIONS, COMPRESS_OPTIONS,
# LOGITS_OPTIONS, TRAIN_OPTIONS, WATCH_OPTIONS and FINISH_OPTIONS are options of sbatch for these stages, here or in
# cluster.env; logits is a job array with --array in its options, else one job. WATCH=no: no watch.
# The same command goes on: stages that are finished, or whose job is in the queue, are not submitted again. Where a
# stage fails, the jobs after it are cancelled. Logs are RUN/slurm/; job ids RUN/pipeline.jobs.
set -euo pipefail
MEGAKD_LAUNCH=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$MEGAKD_LAUNCH/lib.sh"
help "$@"
dry=''
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
[ $# -ge 1 ] || usage
[ $# = 1 ] || refuse "$2: expected RUN alone; change settings before: megakd run RUN --until tokenize $2"
run=$1
read_settings
export MEGAKD_LAUNCH

say "asking MegaKD what $run lacks; this takes some seconds"
states=$("${CONTAINER[@]}" "$PYTHON" -m megakd run "$run" --dry-run) || exit 2
lacks() { awk -v verb="$1" '$1 == verb && $2 == "runs" { found = 1 } END { exit !found }' <<<"$states"; }
submitted=$run/pipeline.jobs
[ -n "$dry" ] || mkdir -p "$run/slurm"
declare -A job
table=()

after() { # KIND STAGE...: what of a dependency these stages' jobs make, if they have any
  local kind=$1 stage ids=''
  for stage in "${@:2}"; do
    [ -z "${job[$stage]:-}" ] || ids+=:${job[$stage]}
  done
  [ -z "$ids" ] || echo "$kind$ids"
}

submit() { # STAGE DEPENDENCY "OPTIONS" WORD...
  local stage=$1 dependency=$2 options id log='%x-%j.out' line
  read -ra options <<<"$3"
  id=$(awk -v stage="$stage" '$1 == stage { id = $2 } END { print id }' "$submitted" 2>/dev/null || true)
  if [ -n "$id" ] && [ -n "$(squeue --noheader --jobs="$id" 2>/dev/null)" ]; then
    job[$stage]=$id
    table+=("$stage|$id|in the queue already")
    return
  fi
  [[ $3 != *--array* ]] || log='%x-%A_%a.out'
  line=(sbatch --parsable --kill-on-invalid-dep=yes --job-name="$stage-megakd" --output="$run/slurm/$log")
  [ -z "$dependency" ] || line+=(--dependency="$dependency")
  line+=("${options[@]}" "${@:4}")
  if [ -n "$dry" ]; then
    job[$stage]=JOB_OF_${stage^^}
    printf '%q ' "${line[@]}"
    echo
    return
  fi
  id=$("${line[@]}") || refuse "$stage could not be submitted; correct that, then the same command goes on"
  job[$stage]=${id%%;*}
  echo "$stage ${job[$stage]}" >>"$submitted"
  table+=("$stage|${job[$stage]}|${dependency:-at once}")
}

L=$MEGAKD_LAUNCH
if lacks tokenize; then submit tokenize '' "${TOKENIZE_OPTIONS:-}" "$L/job.sbatch" tokenize "$run"; fi
if lacks compress; then
  submit compress "$(after afterok tokenize)" "${COMPRESS_OPTIONS:-}" "$L/compress.sbatch" "$run"
fi
if lacks generate-logits; then
  capture=("$L/job.sbatch" generate-logits)
  [[ ${LOGITS_OPTIONS:-} != *--array* ]] || capture=("$L/generate_logits.sbatch")
  submit logits "$(after afterok tokenize)" "${LOGITS_OPTIONS:-}" "${capture[@]}" "$run"
fi
if lacks train; then
  submit train "$(after afterok tokenize compress logits)" "${TRAIN_OPTIONS:-}" "$L/train.sbatch" "$run"
  if [ "${WATCH:-yes}" != no ]; then
    submit watch "$(after after train)" "${WATCH_OPTIONS:-}" "$L/watch.sbatch" "$run"
    # so that watch ends when the training was cancelled or never started, which its own job does not record
    # shellcheck disable=SC2016 # for the bash of that job
    record='grep -qx "train $2" "$1/pipeline.jobs" && . "$0/lib.sh" && read_settings && record_failure "$1" 1'
    submit failed "$(after afternotok train)" "--cpus-per-task=1 --time=10" \
      --wrap "bash -c ${record@Q} ${L@Q} ${run@Q} ${job[train]}"
  fi
fi
if lacks train || lacks evaluate || lacks export || lacks report; then
  ready=$(after afterok train) watched=$(after afterany watch)
  submit finish "$ready${watched:+,$watched}" "${FINISH_OPTIONS:-}" "$L/job.sbatch" run "$run"
fi

[ -z "$dry" ] || exit 0
[ ${#table[@]} -gt 0 ] || { echo "$run: finished" && exit 0; }
printf '%-10s %-10s %s\n' stage job starts
for row in "${table[@]}"; do
  IFS='|' read -r stage id when <<<"$row"
  printf '%-10s %-10s %s\n' "$stage" "$id" "$when"
done
echo "squeue --me shows them; logs: $run/slurm/"
