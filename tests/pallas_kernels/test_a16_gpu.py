"""The ops on prepacked weights on a Hopper GPU: every format against the oracle on the host."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import oracle
import pytest
from a16_cases import FORMATS, NARROW, TWO_LEVEL, WHOLE, Case

from pallas_kernels import matmul_a16, matmul_w4a8, xla_a16

pytestmark = pytest.mark.gpu

ALL = (*FORMATS, *TWO_LEVEL, *NARROW, *WHOLE)


def check(jobs: list[tuple[Case, object]]) -> None:
    """Run each (case, config) twice; fail with every job that is off or does not repeat."""

    def compile_one(job):
        case, config = job
        op = matmul_w4a8 if case.narrow else matmul_a16
        operands = jax.device_put({**case.activations(), "weight": case.pack(case.plain())})
        call = jax.jit(lambda operands: op(**operands, config=config))
        return call.lower(operands).compile(), operands

    bad, worst = {}, 0.0
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for (case, config), (call, operands) in zip(jobs, pool.map(compile_one, jobs), strict=True):
            got = np.asarray(call(operands))
            assert (got == np.asarray(call(operands))).all(), f"{case} {config}: two runs differ"
            error = oracle.relative_error(got, case.expected(case.plain()))
            relative = error / oracle.rounding(case.out)
            worst = max(worst, relative)
            if not relative < (2.5 if case.m > 32 else 2):
                bad[f"{case} {config}"] = relative
    print(f"{len(jobs)} problems, worst {worst:.2f} of the rounding error")
    assert not bad


@pytest.mark.parametrize("m", [1, 5, 13, 64, 100, 200])
def test_every_format(m):
    check([(dataclasses.replace(case, m=m), None) for case in ALL])


@pytest.mark.parametrize("wrong", ["codes", "scales", "zeros"])
def test_a_wrong_weight_is_noticed(wrong):
    """Negative control on the device."""
    case = Case(13, group=64, zero=True, k=512)
    plain = case.plain()
    changed = {**plain, wrong: np.roll(plain[wrong], 1, axis=1)}
    got = matmul_a16(**case.activations(), weight=case.pack(changed))
    assert oracle.relative_error(got, case.expected(plain)) > 20 * oracle.rounding(case.out)


def test_xla_agrees():
    case = Case(48, n=512, k=1024, group=32, zero=True)
    weight, given = case.pack(case.plain()), case.activations()
    got = matmul_a16(**given, weight=weight)
    want = xla_a16.xla_matmul_a16(**given, weight=weight)
    assert oracle.relative_error(got, want) < 4 * oracle.rounding("bfloat16")
