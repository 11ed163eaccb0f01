#!/usr/bin/env bash
# Builds the native libraries, says what is usable, runs the GPU tests and times the kernels, in one call. Nothing is
# installed: a CUDA build of torch, nvcc, cmake, ninja and pytest have to be there.
#
#     bench/on_gpu.sh [FOLDER]      what was said and measured goes to FOLDER (default: bench/results)
#     STEPS="build check time"      the steps to run, in this order; a test that fails in check does not keep time from running
#     CHECKED=300 TIMED=300         seconds for check and for time
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-bench/results}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
failed=0

build() {
  local torch
  torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return 1
  cmake -S . -B build/gpu -G Ninja -DTORCH_ROOT="$torch" -DRIFORMER_CUDA=ON &&
    cmake --build build/gpu --target riformer_cpu riformer_cuda &&
    mkdir -p riformer_kernels/lib &&
    cp build/gpu/libriformer_cpu.so build/gpu/libriformer_cuda.so riformer_kernels/lib/
}

check() {
  timeout "${CHECKED:-300}" "$python" -m pytest tests/gpu/test_gpu.py tests/conformance -m gpu -q -p no:cacheprovider
}

measure() {
  "$python" bench/gpu.py --seconds "${TIMED:-300}" --output "$folder/gpu.jsonl"
}

step() {
  echo "== $1"
  "$2" 2>&1 | tee "$folder/gpu-$1.log"
  local status=${PIPESTATUS[0]}
  echo "== $1: exit $status after $SECONDS s"
  [ "$status" -eq 0 ] || failed=1
  return "$status"
}

for name in ${STEPS:-build check time}; do
  case $name in
    build) step build build || exit 1 ;;
    check) "$python" -m riformer_kernels info; step check check ;;
    time) step time measure ;;
    *) echo "on_gpu.sh: unknown step '$name', expected build, check or time" >&2; exit 2 ;;
  esac
done
exit "$failed"
