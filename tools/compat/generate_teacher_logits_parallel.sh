#!/usr/bin/env bash
# Cache a teacher's logits with N workers, one per GPU of this machine:
#     tools/compat/generate_teacher_logits_parallel.sh N [flags and key=value of generate_teacher_logits.py]
set -euo pipefail
[ $# -gt 0 ] || { echo "$0: say how many workers, one per GPU, like: $0 4" >&2; exit 2; }
exec "${PYTHON:-python}" "$(dirname "$0")/generate_teacher_logits.py" --num_gpus "$1" "${@:2}"
