"""quantize on a Hopper GPU: every number of tokens, and random problems, against float64."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest
from test_quantize import CASES, Case, check, worst_step

from pallas_kernels.quantize import quantize

pytestmark = pytest.mark.gpu

# Scales that lie beside the rows, and transposed.
LAYOUTS = {
    "token": Case(0, k=512, dtype="int8", fused="gated"),
    "1x128": Case(0, k=512, layout="1x128", fused="rms"),
}


def defined(case: Case, got):
    """Return a result without the columns of scales that belong to no token."""
    return got._replace(scale=got.scale[:, : case.m]) if case.layout == "1x128" else got


def run_all(jobs: list[tuple[Case, dict]]) -> None:
    """Compile on all cores, run twice and check `quantize` for each (case, operands)."""

    def compile_one(job):
        case, operands = job
        call = jax.jit(lambda operands: quantize(**operands, **case.options))
        return call.lower(operands).compile()

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for (case, operands), call in zip(jobs, pool.map(compile_one, jobs), strict=True):
            got, again = (defined(case, jax.device_get(call(operands))) for _ in range(2))
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True)
            assert all(a.tobytes() == b.tobytes() for a, b in pairs), f"{case}: two runs differ"
            check(case, got, operands)


@pytest.mark.parametrize("first", range(1, 301, 100))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_of_tokens(layout, first):
    cases = [dataclasses.replace(LAYOUTS[layout], m=m) for m in range(first, first + 100)]
    run_all([(case, case.operands()) for case in cases])


def test_random_problems():
    """Every layout, type and fusion; up to a million values each."""
    rng = np.random.default_rng(0)
    jobs = []
    for i in range(3 * len(CASES)):
        groups = int(rng.integers(1, 29))
        m = int(2 ** rng.uniform(0, 20 - np.log2(512 * groups)))
        case = dataclasses.replace(CASES[i % len(CASES)], m=m, k=512 * groups)
        if case.x == "float32":  # a row must fit in registers
            case = dataclasses.replace(case, k=min(case.k, 8192))
        jobs.append((case, case.operands(i)))
    run_all(jobs)


def test_a_row_of_a_neighbour_is_noticed():
    """Negative control."""
    case = Case(40, k=512, layout="1x128")
    operands = case.operands()
    got = jax.device_get(quantize(**operands, **case.options))
    assert worst_step(case, operands, got) < 0.51
    codes = np.roll(np.asarray(got.codes).view(np.uint8), 1, 0).view(got.codes.dtype)
    assert worst_step(case, operands, got._replace(codes=codes)) > 5
