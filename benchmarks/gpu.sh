#!/usr/bin/env bash
# All GPU timings in one call of at most nine minutes:
#   benchmarks/gpu.sh OUT [WHEELS]      records into OUT
#   benchmarks/gpu.sh --tiny OUT        the same commands on a tiny model and a CPU, to try them,
#                                       however long they take
# Needs a Python >= 3.11 with torch >= 2.11, transformers, accelerate, peft and jaxtyping. WHEELS is
# a folder with what is missing there (diffusers), as wheels; nothing is downloaded.
set -uo pipefail
tiny=
if [ "${1:-}" = --tiny ]; then tiny=1; shift; fi
out=${1:?usage: benchmarks/gpu.sh [--tiny] OUT [WHEELS]}
here=$(cd "$(dirname "$0")/.." && pwd)
path=$here/src
if [ -n "${2:-}" ]; then
  unpacked=$(mktemp -d)
  for wheel in "$2"/*.whl; do python3 -m zipfile -e "$wheel" "$unpacked"; done
  path=$path:$unpacked
fi
export PYTHONPATH=$path HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0
time_it() {  # seconds at most (0: any), then what `shiva-dit benchmark` takes
  local limit=$1
  shift
  timeout "$limit" python3 -m shiva_dit.cli benchmark "$@" --out "$out" || status=$?
}
if [ -n "$tiny" ]; then
  small="--mode eager --dtype float32 --repeats 1 --threads 1"
  python3 "$here/benchmarks/graphs.py" --tiny --out "$out" || status=$?
  time_it 0 sd3-tiny $small --batch 4 --forwards 2 --keep 0.8 0.6 --size 64
  exit $status
fi
timeout 90 python3 "$here/benchmarks/graphs.py" --out "$out" || status=$?
time_it 100 sd35-medium --device cuda --mode graphs --batch 1 --repeats 7
time_it 60 sd35-medium --device cuda --batch 1 --repeats 5 --forwards 14
time_it 100 sd35-medium --device cuda --batch 4 --repeats 5 --forwards 14
time_it 100 flux-dev --device cuda --mode graphs --keep 0.8 0.6 --repeats 5 --forwards 7
time_it 90 flux-dev --device cuda --keep 0.8 0.6 --size 2048 --repeats 3 --forwards 2
exit $status
