"""matmul_a8 on a Hopper GPU: every layout, config and token count against float64."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import oracle
import pytest
from a8_cases import LAYOUTS, Case

from pallas_kernels.a8_configs import DecodeConfig, PrefillConfig
from pallas_kernels.matmul_a8 import A8_KERNELS, a8_problem, matmul_a8

pytestmark = pytest.mark.gpu

KINDS = {
    "fp8": Case(0),
    "int8": Case(0, x="int8", w="int8", zero="token", bias="bfloat16"),
    "block": Case(0, x_scale="1x128", w_scale="128x128"),
}


def errors(jobs: list[tuple[Case, object]], seed: int = 0) -> dict[str, float]:
    """Return the relative error of each (case, config); compilation runs in parallel."""

    def compile_one(job):
        case, config = job
        operands = jax.device_put(case.operands(seed))

        def call(operands):
            return matmul_a8(**operands, **case.options, config=config)

        return jax.jit(call).lower(operands).compile(), operands

    found = {}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for (case, config), (call, operands) in zip(jobs, pool.map(compile_one, jobs), strict=True):
            got = call(operands)
            again = call(operands)
            assert (np.asarray(got) == np.asarray(again)).all(), "two runs differ"
            error = oracle.relative_error(got, case.expected(case.operands(seed)))
            found[f"{case} {config}"] = error / oracle.rounding(case.out)
    return found


def check(jobs: list[tuple[Case, object]]) -> None:
    """Fail with every job whose error is more than twice what rounding the result makes.

    The tensor cores add fp8 products in reduced precision, which shows once the result has the
    eleven bits of float16: six times its rounding is allowed there.
    """
    found = errors(jobs)
    print(f"{len(found)} problems, worst {max(found.values()):.2f} of the rounding error")
    wrong = {
        name: float(error)
        for name, error in found.items()
        if not error < (6 if "float8" in name and "float16 " in name else 2)
    }
    for name, error in wrong.items():
        print("wrong:", name, error)
    assert not wrong


@pytest.mark.parametrize("m", [1, 5, 13, 64, 100, 200])
def test_every_layout(m):
    check([(dataclasses.replace(case, m=m), None) for case in LAYOUTS])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [8, 16, 64, 128, 520])
def test_every_candidate(kind, m):
    case = dataclasses.replace(KINDS[kind], m=m, n=1536, k=2048)
    operands = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in case.shapes().items()
    }
    problem = a8_problem(**operands, **case.options)
    check(
        [
            (case, config)
            for kernel in A8_KERNELS
            if kernel.accepts(problem) is None
            for config in kernel.candidates(problem)
        ]
    )


def test_random_problems():
    rng = np.random.default_rng(0)
    jobs = []
    for _ in range(96):
        case = LAYOUTS[rng.integers(len(LAYOUTS))]
        m = int(2 ** rng.uniform(0, 9.5))
        n, k = (int(64 * rng.integers(1, 40)) for _ in range(2))
        jobs.append((dataclasses.replace(case, m=m, n=n, k=k), None))
    check(jobs)


def test_tiles_beyond_the_edge():
    """The last tiles of rows and columns stick out, and a decode tile is taller than the input."""
    jobs = [
        (dataclasses.replace(case, m=m, n=n, k=1152), config)
        for case in KINDS.values()
        for m, n in ((136, 192), (200, 192), (520, 64))
        for config in (PrefillConfig(bn=64, stages=6), PrefillConfig(bn=128, stages=4))
        if config.bn <= n
    ]
    tall = DecodeConfig(bm=128, stages=4, split=2)
    jobs += [(dataclasses.replace(case, m=72, n=64, k=1152), tall) for case in KINDS.values()]
    check(jobs)


@pytest.mark.slow
def test_every_number_of_tokens():
    check([(Case(m, n=512, k=1024), None) for m in range(1, 301)])
