#!/usr/bin/env bash
# Every kernel on small problems under compute-sanitizer (CUDA toolkit): memcheck and racecheck.
# Usage: benchmarks/sanitize.sh [LOG_DIRECTORY] [options of sanitize.py]
set -uo pipefail
cd "$(dirname "$0")/.."
logs="${1:-benchmarks/results}"
shift || true
export PYTHONPATH="$PWD" XLA_PYTHON_CLIENT_PREALLOCATE=false
# An allocation for each array, so that memcheck sees where it ends; kernels launched one by one,
# because those of a recorded graph are not told apart.
export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS="--xla_gpu_enable_command_buffer="

check() {
  local log="$logs/sanitizer_$1.log"
  compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 20 \
    python3 benchmarks/sanitize.py "${@:2}" > "$log" 2>&1
  local status=$?
  echo "$1: $(grep -c ' ran$' "$log") problems ran; $(grep 'SUMMARY' "$log" | tail -1)"
  return $status
}

check memcheck "$@" &
memcheck=$!
check racecheck "$@"
racecheck=$?
wait "$memcheck" && exit "$racecheck"
