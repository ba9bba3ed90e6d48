"""What compute-sanitizer is given to watch, and that its script sees what is wrong in the logs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.sanitize_faults import FAULTS
from benchmarks.sanitize_problems import case_operands, works
from pallas_kernels.bench.cases import CASES
from pallas_kernels.grouped_a8 import GROUPED_A8_KERNELS
from pallas_kernels.problem import select

ROOT = Path(__file__).parents[2]
TOKENS = (5, 64, 200)
SANITIZER = """#!/bin/bash
[ "$1" = --version ] && { echo "Version 2025.3.1.0 (build 1)"; exit; }
summary="ERROR SUMMARY"
[ "$2" = racecheck ] && summary="RACECHECK SUMMARY"
case "$*" in
  *--fault\\ memcheck) [ "$WRONG" = "no fault" ] || echo "Invalid __global__ write of size 4" ;;
  *--fault\\ racecheck) echo "Error: Race reported between Write access" ;;
  *)
    echo "fp8 5 ran"
    [ "$WRONG" = "late" ] && echo "fp8 200 no time left"
    [ "$WRONG" = "broken off" ] && [ "$2" = synccheck ] && exit 1
    echo "shard ended"
    errors=0
    [ "$WRONG" = "$2" ] && errors=3
    echo "========= $summary: $errors errors" ;;
esac
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_errors_lower_to_cuda(lower, fault):
    assert "mosaic_gpu" in lower(FAULTS[fault])


def test_every_kernel_is_chosen_by_a_problem():
    chosen = set()
    for case in CASES:
        for tokens in TOKENS:
            operands = jax.eval_shape(lambda case=case, m=tokens: case_operands(case, m))
            chosen.add(select(case.kernels, case.problem(operands))[0].name)
    everything = {kernel.name for case in CASES for kernel in case.kernels}
    assert {kernel.name for kernel in GROUPED_A8_KERNELS} < everything
    assert chosen == everything


@pytest.mark.parametrize("name", [name for name in works() if "a8_" in name])
def test_problems_without_a_row_in_the_bench_lower_to_cuda(lower, name):
    make, call = works()[name]
    for tokens in TOKENS:
        operands = jax.eval_shape(lambda make=make, m=tokens: make(m))
        assert "mosaic_gpu" in lower(call, operands)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("", "passed"),
        ("memcheck", "memcheck: 2 problems ran, 0 had no time left, 6 errors"),
        ("racecheck", "racecheck: 2 problems ran, 0 had no time left, 6 errors"),
        ("late", "synccheck: 2 problems ran, 2 had no time left, 0 errors"),
        (
            "broken off",
            "synccheck: 2 problems ran, 0 had no time left, 0 errors, 2 processes broke",
        ),
        ("no fault", "memcheck: DID NOT FIND the planted error"),
    ],
)
def test_the_script_reads_its_logs(tmp_path, wrong, says):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (
        ("compute-sanitizer", SANITIZER),
        ("nvidia-smi", "#!/bin/bash\necho NVIDIA H200, 580\n"),
        ("python3", f'#!/bin/bash\nexec {sys.executable} "$@"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "LOGS": str(tmp_path / "logs"),
        "SHARDS": "2",
        "WRONG": wrong,
    }
    summary = tmp_path / "summary.log"
    script = ROOT / "benchmarks" / "sanitize.sh"
    done = subprocess.run(["bash", script, summary], env=environment, capture_output=True)
    assert done.returncode == (wrong != "")
    assert says in summary.read_text()
    assert "fp8: 5" in summary.read_text()
