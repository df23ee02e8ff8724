#!/usr/bin/env bash
# Run every part of MegaKD once on one GPU, within six minutes, on a machine without network (gpu_smoke.py says what).
#
#   bash tools/bench/gpu_smoke.sh --pack FOLDER                     where a package registry is: download the wheels
#   bash tools/bench/gpu_smoke.sh --wheels FOLDER --out RESULTS     on the GPU machine
#
# The machine brings Python 3.12, torch >= 2.11 with CUDA and transformers >= 5.17, which are never changed: packages
# that it lacks are installed from the wheels into a temporary folder that comes first on PYTHONPATH.
# FOLDER must not be tracked by git: dist/wheels is ignored. PYTHON: the interpreter (default: python3).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
# what MegaKD imports beside torch, transformers and what these bring; without numba with its llvmlite (64 MB), scipy,
# pyarrow and matplotlib, which are common on GPU machines: what of them is missing shows as a part that failed
packages=(deepspeed plotly narwhals hjson msgpack py-cpuinfo einops ninja psutil zstandard accelerate
          pydantic pydantic-core annotated-types typing-inspection typing-extensions)

usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Wheels of the pinned versions for Python 3.12 on Linux; DeepSpeed has none, and is built from its source without ops.
pack() {
    local folder=$1 name pin deepspeed
    mkdir -p "$folder"
    deepspeed=$(grep '^deepspeed==' "$root/requirements.txt")
    local pins=()
    for name in "${packages[@]}"; do
        [ "$name" = deepspeed ] && continue
        pin=$("$python" - "$name" <<'PY'
import importlib.metadata, sys
try:
    print(f"{sys.argv[1]}=={importlib.metadata.version(sys.argv[1])}")
except importlib.metadata.PackageNotFoundError:
    print(sys.argv[1])
PY
)
        pins+=("$pin")
    done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_26_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
        --dest "$folder" "${pins[@]}"
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
        --wheel-dir "$folder" "$deepspeed"
    du -sh "$folder"
    local bytes
    bytes=$(cat "$folder"/*.whl | wc -c)
    [ "$bytes" -le $((60 * 1000 * 1000)) ] || { echo "gpu_smoke: $bytes bytes of wheels, at most 60 MB" >&2; exit 1; }
}

# The wheels whose package this Python does not have.
missing() {
    "$python" - "$1" <<'PY'
import importlib.metadata, pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PY
}

wheels="" arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --pack) [ $# -ge 2 ] || { usage >&2; exit 2; }; pack "$2"; exit ;;
        --wheels) [ $# -ge 2 ] || { usage >&2; exit 2; }; wheels=$2; shift 2 ;;
        -h | --help) usage; exec "$python" "$here/gpu_smoke.py" --help ;;
        *) arguments+=("$1"); shift ;;
    esac
done
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "gpu_smoke: --wheels $wheels: no such folder; make it with --pack" >&2; exit 2; }
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    mapfile -t files < <(missing "$wheels")
    if [ ${#files[@]} -gt 0 ]; then
        echo "gpu_smoke: installing $(printf '%s ' "${files[@]##*/}")" >&2
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${files[@]}" >&2
    fi
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" "$here/gpu_smoke.py" "${arguments[@]}"
