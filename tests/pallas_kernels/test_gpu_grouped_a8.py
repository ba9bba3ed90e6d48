"""grouped_matmul_a8 on a Hopper GPU: layouts, configs and group sizes against float64."""

import concurrent.futures
import dataclasses
import itertools

import jax
import numpy as np
import oracle
import pytest
from a8_cases import Case
from grouped_a8_cases import LAYOUTS, GroupedCase

from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.grouped_a8 import GROUPED_A8_KERNELS, grouped_a8_problem, grouped_matmul_a8

pytestmark = pytest.mark.gpu

KINDS = {
    "fp8": Case(0, n=768, k=1536),
    "int8": Case(0, n=768, k=1536, x="int8", w="int8"),
    "block": Case(0, n=768, k=1536, x_scale="1x128", w_scale="128x128"),
}
# One row, one row each, odd starts, most experts empty, one expert, one expert with nearly all.
PATTERNS = {
    "one row": (0, 0, 1, 0),
    "single rows": (1,) * 8,
    "odd starts": (3, 5, 1, 9, 17, 2, 31, 8),
    "mostly empty": (0, 0, 7, 0, 0, 0, 0, 6, 0, 0),
    "one expert": (0, 300, 0),
    "skewed": (1, 0, 260, 3, 0, 0, 13, 129),
    "full tiles": (128, 256, 64, 64),
}


def errors(jobs: list[tuple[GroupedCase, object]]) -> dict[str, float]:
    """Return the relative error of each (case, config), in roundings of the result."""

    def compile_one(job):
        case, config = job
        operands = jax.device_put(case.operands())

        def call(operands):
            return grouped_matmul_a8(**operands, **case.options, config=config)

        return jax.jit(call).lower(operands).compile(), operands

    found = {}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for (case, config), (call, operands) in zip(jobs, pool.map(compile_one, jobs), strict=True):
            got = np.asarray(call(operands))
            assert (got == np.asarray(call(operands))).all(), "two runs differ"
            error = oracle.relative_error(got, case.expected(case.operands()))
            found[f"{case.sizes} {case} {config}"] = error / oracle.rounding(case.case.out)
    return found


def check(jobs: list[tuple[GroupedCase, object]]) -> None:
    """Fail with every job whose error is more than twice what rounding the result makes."""
    wrong = {name: float(error) for name, error in errors(jobs).items() if not error < 2}
    for name, error in wrong.items():
        print("wrong:", name, error)
    assert not wrong


def problem_of(case: GroupedCase):
    """Return the problem of a case."""
    operands = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in case.shapes().items()
    }
    return grouped_a8_problem(**operands, **case.options)


def candidates(case: GroupedCase) -> list[tuple[GroupedCase, object]]:
    """Return every config worth measuring for a case."""
    problem = problem_of(case)
    return [
        (case, config)
        for kernel in GROUPED_A8_KERNELS
        if kernel.accepts(problem) is None
        for config in kernel.candidates(problem)
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layout(pattern):
    layouts = [case for case in LAYOUTS if case.out != "float16"]
    check([(GroupedCase(PATTERNS[pattern], case), None) for case in layouts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_candidate(kind, pattern):
    check(candidates(GroupedCase(PATTERNS[pattern], KINDS[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern_of_empty_experts(kind):
    """One program for all 2^8 patterns: group sizes are data."""
    case = GroupedCase((3, 9, 1, 17, 8, 5, 30, 2), dataclasses.replace(KINDS[kind], n=128, k=512))
    operands = jax.device_put(case.operands())
    call = jax.jit(lambda operands: grouped_matmul_a8(**operands, **case.options))
    for filled in itertools.product([0, 1], repeat=8):
        sizes = tuple(int(s) for s in np.multiply(case.sizes, filled))
        patterned = dataclasses.replace(case, sizes=sizes)
        rows = patterned.rows
        given = {**operands, "group_sizes": np.array(sizes, np.int32)}
        got = np.asarray(call(given))[:rows]
        if rows:
            live = {name: np.asarray(x) for name, x in operands.items()}
            live["x_q"] = live["x_q"][:rows]
            error = oracle.relative_error(got, patterned.expected(live))
            assert error < 2 * oracle.rounding("bfloat16"), sizes


@pytest.mark.parametrize("kind", KINDS)
def test_every_height_of_a_tile(kind):
    """Experts that fill one tile and straddle several, for every height a config may get."""
    jobs = []
    for bm in range(8, 136, 8):
        sizes = (3, 0, bm + 5, 1, 2 * bm + 9, 17, 0, 31)
        case = GroupedCase(sizes, dataclasses.replace(KINDS[kind], n=256, k=512))
        configs = [DecodeConfig(bm, 4, 1, channels, 1) for channels in (1, 2)]
        jobs += [(case, config) for config in configs if not config.refuses(problem_of(case))]
    assert len(jobs) >= 20
    check(jobs)


def test_random_problems():
    rng = np.random.default_rng(0)
    jobs = []
    for _ in range(64):
        experts = int(rng.integers(1, 33))
        mean = 2 ** rng.uniform(-1, 7)
        sizes = rng.poisson(rng.dirichlet(np.full(experts, 0.7)) * mean * experts)
        sizes[0] += sizes.sum() == 0
        case = list(KINDS.values())[rng.integers(3)]
        n, k = (int(64 * rng.integers(2, 20)) for _ in range(2))
        case = dataclasses.replace(case, n=n, k=k)
        jobs.append((GroupedCase(tuple(int(s) for s in sizes), case), None))
    check(jobs)
