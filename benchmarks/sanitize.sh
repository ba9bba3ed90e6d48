#!/usr/bin/env bash
# Every kernel on small problems under compute-sanitizer (CUDA toolkit): memcheck, then racecheck.
# Usage: benchmarks/sanitize.sh [LOG_DIRECTORY] [options of sanitize.py]
set -uo pipefail
cd "$(dirname "$0")/.."
logs="${1:-benchmarks/results}"
shift || true
export PYTHONPATH="$PWD" XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform
# Kernels are launched one by one: recorded into a graph they would be checked as one.
export XLA_FLAGS="--xla_gpu_enable_command_buffer="
status=0
for tool in memcheck racecheck; do
  log="$logs/sanitizer_$tool.log"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
    python3 benchmarks/sanitize.py "$@" > "$log" 2>&1 || status=1
  echo "$tool: $(grep -c ' ran$' "$log") problems; $(grep 'SUMMARY' "$log" | tail -1)"
done
exit $status
