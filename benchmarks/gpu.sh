#!/usr/bin/env bash
# All GPU timings in one call: benchmarks/gpu.sh OUT [WHEELS]
# Needs a Python >= 3.11 with torch >= 2.11, transformers, accelerate, peft and jaxtyping. WHEELS is
# a folder with what is missing there (diffusers), as wheels; nothing is downloaded.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [WHEELS]}
here=$(cd "$(dirname "$0")/.." && pwd)
path=$here/src
if [ -n "${2:-}" ]; then
  unpacked=$(mktemp -d)
  for wheel in "$2"/*.whl; do python3 -m zipfile -e "$wheel" "$unpacked"; done
  path=$path:$unpacked
fi
export PYTHONPATH=$path HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0
for batch in 1 4; do
  mkdir -p "$out/batch$batch"
  timeout 270 python3 "$here/benchmarks/gpu.py" --out "$out/batch$batch" --batch $batch || status=$?
done
exit $status
