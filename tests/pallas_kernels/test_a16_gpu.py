"""The ops on prepacked weights on a Hopper GPU, against float64: formats, configs, token counts."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import oracle
import pytest
from a16_cases import FORMATS, NARROW, Case

from pallas_kernels import matmul_a16, matmul_w4a8, xla_a16
from pallas_kernels.matmul_a16 import A16_KERNELS, a16_problem
from pallas_kernels.matmul_w4a8 import W4A8_KERNELS, w4a8_problem

pytestmark = pytest.mark.gpu

ALL = (*FORMATS, *NARROW)


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


@pytest.mark.parametrize("case", [FORMATS[1], FORMATS[3], FORMATS[7], FORMATS[9]], ids=str)
@pytest.mark.parametrize("m", [8, 16, 64, 128, 520])
def test_every_candidate(case, m):
    case = dataclasses.replace(case, m=m, n=1792, k=2048)
    problem = a16_problem(**case.structs())
    kernels = [kernel for kernel in A16_KERNELS if kernel.accepts(problem) is None]
    check([(case, config) for kernel in kernels for config in kernel.candidates(problem)])


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_every_candidate_of_narrow_activations(case):
    case = dataclasses.replace(case, m=16, n=512, k=2048)
    problem = w4a8_problem(**case.structs())
    check([(case, config) for config in W4A8_KERNELS[0].candidates(problem)])


def test_random_problems():
    rng = np.random.default_rng(0)
    jobs = []
    for _ in range(128):
        case = ALL[rng.integers(len(ALL))]
        m = int(2 ** rng.uniform(0, 9))
        n, k = (int(64 * rng.integers(1, 40)) for _ in range(2))
        jobs.append((dataclasses.replace(case, m=m, n=n, k=k), None))
    check(jobs)


def test_every_number_of_tokens():
    check([(Case(m, n=320, k=576, zero=True, group=64), None) for m in range(1, 301)])


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
