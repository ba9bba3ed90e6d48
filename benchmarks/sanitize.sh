#!/usr/bin/env bash
# Every kernel on small problems under compute-sanitizer (CUDA toolkit): memcheck, racecheck and
# synccheck, each in several processes at once, and then two kernels that are wrong on purpose, in
# which the tools have to find it.
# Usage: benchmarks/sanitize.sh [SUMMARY] [options of sanitize.py]
# SHARDS is the number of processes of each tool; what they print stays in the folder LOGS.
set -uo pipefail
cd "$(dirname "$0")/.."
summary="${1:-benchmarks/results/sanitizer.log}"
shift || true
logs="${LOGS:-$(mktemp -d)}"
cores=$(nproc)
shards="${SHARDS:-$((cores > 6 ? (cores - 1) / 3 : 1))}"
export PYTHONPATH="$PWD" XLA_PYTHON_CLIENT_PREALLOCATE=false
# An allocation for each array, so that memcheck sees where it ends; kernels launched one by one,
# because those of a recorded graph are not told apart.
export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS="--xla_gpu_enable_command_buffer="
tools="memcheck racecheck synccheck"
mkdir -p "$logs"

# Each process has ports and a folder for sockets of its own: of twelve that shared them all crashed,
# and leaves out the assembler that a compilation starts.
port=49152
watch() { # TOOL LOG options of sanitize.py
  mkdir -p "$logs/tmp_$2"
  TMPDIR="$logs/tmp_$2" compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 20 --port "$port" \
    --max-connections 16 --target-processes application-only \
    python3 -m benchmarks.sanitize "${@:3}" > "$logs/$2.log" 2>&1
}

total() { # PATTERN FILES: the sum of the first number after a pattern
  local pattern="$1"
  shift
  cat "$@" | sed -n "s/.*$pattern \([0-9]*\).*/\1/p" | awk '{ n += $1 } END { print n + 0 }'
}

start=$SECONDS
for tool in $tools; do
  for ((i = 0; i < shards; i++)); do
    watch "$tool" "${tool}_$i" --shard "$i" "$shards" "$@" &
    port=$((port + 16))
  done
done
wait
for tool in memcheck racecheck; do
  watch "$tool" "fault_$tool" --fault "$tool" &
  port=$((port + 16))
done
wait
seconds=$((SECONDS - start))

{
  echo "compute-sanitizer over the kernels: benchmarks/sanitize.sh $*"
  echo "$(date -u +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)," \
    "jax $(python3 -c 'import jax; print(jax.__version__)')," \
    "$(compute-sanitizer --version | grep -o 'Version .*' | head -1)," \
    "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  echo "$((3 * shards)) processes, $seconds s"
} > "$summary"
failed=0
for tool in $tools; do
  files=("$logs/$tool"_*.log)
  ran=$(cat "${files[@]}" | grep -c ' ran$')
  left=$(cat "${files[@]}" | grep -c ' no time left$')
  ended=$(grep -l '^shard ended$' "${files[@]}" | xargs -r grep -l ' SUMMARY: ' | wc -l)
  errors=$(total 'ERROR SUMMARY:' "${files[@]}")
  [ "$tool" = racecheck ] && errors=$(total 'RACECHECK SUMMARY:' "${files[@]}")
  line="$tool: $ran problems ran, $left had no time left, $errors errors"
  ((ended == shards)) || line="$line, $((shards - ended)) processes broke off"
  ((ran > 0 && left == 0 && errors == 0 && ended == shards)) || failed=1
  echo "$line" >> "$summary"
done
for fault in 'memcheck Invalid __global__ write' 'racecheck Race reported between'; do
  tool="${fault%% *}"
  if grep -q "${fault#* }" "$logs/fault_$tool.log"; then
    echo "$tool: found the planted error: $(grep -o "${fault#* }.*" "$logs/fault_$tool.log" | head -1)"
  else
    echo "$tool: DID NOT FIND the planted error"
    failed=1
  fi >> "$summary"
done
grep -h ' ran$' "$logs"/memcheck_*.log | sed 's/ ran$//' | sort -k1,1 -k2,2n |
  awk '{ if ($1 != name) { if (name) print line; name = $1; line = "  " $1 ":" } line = line " " $2 }
       END { print line }' > "$logs/problems"
{
  echo "problems of memcheck, by numbers of tokens:"
  cat "$logs/problems"
  ((failed)) && echo "FAILED: see $logs" || echo "passed"
} >> "$summary"
sed '/^problems/,/^  [^ ]*$/{/^  /d}' "$summary"
exit "$failed"
