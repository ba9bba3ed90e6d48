#!/usr/bin/env bash
# Everything that is tested and measured on a Hopper GPU, each step in a process of its own.
# Usage: benchmarks/gpu_all.sh OUT [STEP[=SECONDS] ...]
# Steps, by default all in this order: tests peers bench sanitizer moe stack decode drift; a step
# that lasts longer than its SECONDS is ended.  OUT gets STEP.log, and STEP.json of what measures
# times.  The bench compares with the peers' times in OUT; the peers step takes vLLM's libraries
# from PEERS, a folder that benchmarks.gpu_peers.pack makes, or from vLLM where that is installed.
set -uo pipefail
out="$(mkdir -p "${1:?folder for the results}" && cd "$1" && pwd)"
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
all="tests peers bench sanitizer moe stack decode drift"
read -ra steps <<< "${*:-$all}"
for step in "${steps[@]}"; do
  [[ " $all " == *" ${step%%=*} "* ]] || { echo "no step is called ${step%%=*}: $all" >&2; exit 2; }
done

tests() { make test-gpu PYTHON=python3; }
peers() { python3 -m benchmarks.gpu_peers --json "$out/peers.json" ${PEERS:+--libraries "$PEERS"}; }
bench() {
  local against=()
  [ -f "$out/peers.json" ] && against=(--against "$out/peers.json")
  python3 -m pallas_kernels.bench --bars ${against[@]+"${against[@]}"} --json "$out/bench.json"
}
sanitizer() { LOGS="$(mktemp -d)" benchmarks/sanitize.sh "$out/sanitizer.summary" --seconds 105; }
moe() { python3 benchmarks/gpu_moe_layer.py --json "$out/moe.json"; }
stack() { python3 benchmarks/gpu_stack.py --json "$out/stack.json"; }
decode() { python3 benchmarks/gpu_decode.py --json "$out/decode.json"; }
drift() { python3 benchmarks/gpu_drift.py --json "$out/drift.json"; }

export out
export -f $all
failed=0
for step in "${steps[@]}"; do
  name="${step%%=*}" limit=1d
  [[ "$step" == *=* ]] && limit="${step#*=}"
  start=$SECONDS
  timeout -k 5 "$limit" bash -c "$name" > "$out/$name.log" 2>&1
  code=$?
  ((code == 0)) || failed=1
  echo "$name: exit status $code after $((SECONDS - start)) s"
  tail -n 5 "$out/$name.log"
done
exit "$failed"
