"""matmul_a8 on a Hopper GPU: every layout against the float64 oracle on the host."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import oracle
import pytest
from a8_cases import LAYOUTS, Case

from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.matmul_a8 import matmul_a8

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
