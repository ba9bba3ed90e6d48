"""The complete suite of a Hopper GPU: all token counts, 10 000 random problems, tuned configs.

Operands, results and float64 references stay on the device (`on_device`).  `make test-gpu` runs it
on all cores; it is the compilation of some 1500 programs that takes the time.
"""

import concurrent.futures
import dataclasses
import functools
import zlib

import jax
import numpy as np
import pytest
from a8_cases import LAYOUTS
from a8_cases import Case as A8
from a16_cases import FORMATS, NARROW, TUNED_TWO_LEVEL, TUNED_WHOLE, WHOLE
from a16_cases import TUNED as A16_TUNED
from a16_cases import Case as A16
from on_device import Trial, draw, judge, runner, trial_of

from pallas_kernels import (
    A8_KERNELS,
    A16_KERNELS,
    W4A8_KERNELS,
    a8_problem,
    a16_problem,
    w4a8_problem,
)
from pallas_kernels.problem import current_device, tuned_table

on_gpu = pytest.mark.gpu

# One body each: plain and promoted 8-bit products, weights decoded to 16 and to 8 bits, with sums
# scaled by the group or made over all of k.
FAMILIES = {
    "fp8": A8(304, n=320, k=768),
    "fp8 block": A8(304, n=320, k=768, x_scale="1x128", w_scale="128x128"),
    "w4a16": A16(304, n=320, k=576, zero=True, group=64),
    "w4a8": A16(304, n=320, k=576, x="int8", group=32, zero=True),
    "qserve": A16(304, n=320, k=576, x="int8", scale="int8", zero=True),
}
OTHERS = {
    "int8": A8(0, x="int8", w="int8", zero="token", bias="bfloat16"),
    "fp8a16": A16(0, code="float8_e4m3fn", block=128, scale="float32"),
}
# Every kind of problem that the ops take; a kernel for another kind adds its cases here.
KINDS = {f"{type(case).__module__} {case}": case for case in (*LAYOUTS, *FORMATS, *NARROW, *WHOLE)}
# 41 kinds x 10 sizes x 26 problems.
SIZES, PROBLEMS = 10, 26
# op -> kernels, and kind of the tuned table -> case.
TUNED = {
    "matmul_a8": (
        A8_KERNELS,
        {
            "float8": A8(0),
            "float8 1x128 128x128": A8(0, x_scale="1x128", w_scale="128x128"),
            "int8": A8(0, x="int8", w="int8"),
        },
    ),
    "matmul_a16": (
        A16_KERNELS,
        {**A16_TUNED, **TUNED_TWO_LEVEL},
    ),
    "matmul_w4a8": (W4A8_KERNELS, TUNED_WHOLE),
}


def check(trial: Trial, programs, seeds=(0,)) -> None:
    """Run (sizes, configs) programs twice for each seed; fail with every problem that is off."""
    structs = jax.eval_shape(functools.partial(draw, trial), 0)

    def build(program):
        return jax.jit(runner(trial, *program)).lower(structs).compile()

    errors = {}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        compiled = list(pool.map(build, programs))
    for (sizes, configs), run in zip(programs, compiled, strict=True):
        for seed in seeds:
            operands = draw(trial, seed)
            names = [(size, config, seed) for size in sizes for config in configs]
            for name, got, again in zip(names, run(operands), run(operands), strict=True):
                errors[name] = judge(trial, operands, got, again, name[0])
    errors = {name: float(error) for name, error in errors.items()}
    print(f"{len(programs)} programs, {len(errors)} problems, worst {max(errors.values()):.2f}")
    wrong = {name: e for name, e in errors.items() if not e < trial.at(name[0]).bound}
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


@on_gpu
@pytest.mark.parametrize("first", range(0, 300, 50))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_tokens(family, first):
    """1 to 300 tokens; a program makes the eight counts that are padded to the same."""
    case = FAMILIES[family]
    tokens = range(first + 1, first + 51)
    by_padded = [[m for m in tokens if -(-m // 8) == eights] for eights in range(40)]
    sizes = [[(m, case.n, case.k) for m in ms] for ms in by_padded if ms]
    check(trial_of(case), [(group, (None,)) for group in sizes])


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_random_problems(kind):
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    sizes = [
        (int(2 ** rng.uniform(0, 9.3)), *(int(64 * rng.integers(1, 41)) for _ in range(2)))
        for _ in range(SIZES)
    ]
    trial = trial_of(KINDS[kind]).at((640, 2560, 2560))
    check(trial, [([size], (None,)) for size in sizes], range(PROBLEMS))


def entries() -> dict[str, list[dict]]:
    """Return "op, kind, layer" -> tuned entries of this card; two levels run in `test_a16_gpu`."""
    groups: dict[str, list[dict]] = {}
    for op, found in tuned_table(current_device()).items():
        for entry in found if op in TUNED else ():
            groups.setdefault(f"{op} {entry['kind']} {entry['n']}x{entry['k']}", []).append(
                {**entry, "op": op}
            )
    return groups


ENTRIES = entries()


def config_of(entry: dict) -> tuple[Trial, object]:
    """Return the trial of an entry at its own size, and its config."""
    kernels, cases = TUNED[entry["op"]]
    kernel = next(kernel for kernel in kernels if kernel.name == entry["kernel"])
    trial = trial_of(cases[entry["kind"]]).at((entry["m"], entry["n"], entry["k"]))
    return trial, kernel.config_type(**entry["config"])


@pytest.mark.parametrize("layer", ENTRIES)
def test_every_tuned_config_has_a_case_that_it_can_run(layer):
    for entry in ENTRIES[layer]:
        trial, config = config_of(entry)
        case = trial.case
        if isinstance(case, A8):
            shapes = {n: jax.ShapeDtypeStruct(*value) for n, value in case.shapes().items()}
            problem = a8_problem(**shapes, **case.options)
        else:
            problem = (w4a8_problem if case.narrow else a16_problem)(**case.structs())
        assert problem.kind == entry["kind"]
        assert config.refuses(dataclasses.replace(problem, m=max(entry["m"], 8))) is None


@on_gpu
@pytest.mark.parametrize(
    "layer", [name for name, group in ENTRIES.items() if group[0]["kind"] not in TUNED_TWO_LEVEL]
)
def test_every_tuned_config(layer):
    """Each on the problem that it was tuned for, in full."""
    group = ENTRIES[layer]
    largest = max(group, key=lambda entry: entry["m"])
    trial, _ = config_of(largest)
    programs = [([(entry["m"], entry["n"], entry["k"])], (config_of(entry)[1],)) for entry in group]
    check(trial, programs)


@on_gpu
@pytest.mark.parametrize("m", [8, 64, 520])
@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_every_candidate(kind, m):
    case = dataclasses.replace({**FAMILIES, **OTHERS}[kind], m=m, n=1536, k=2048)
    if isinstance(case, A8):
        shapes = {n: jax.ShapeDtypeStruct(*value) for n, value in case.shapes().items()}
        kernels, problem = A8_KERNELS, a8_problem(**shapes, **case.options)
    elif case.narrow:
        kernels, problem = W4A8_KERNELS, w4a8_problem(**case.structs())
    else:
        kernels, problem = A16_KERNELS, a16_problem(**case.structs())
    configs = [
        config
        for kernel in kernels
        if kernel.accepts(problem) is None
        for config in kernel.candidates(problem)
    ]
    size = (m, case.n, case.k)
    check(trial_of(case), [([size], (config,)) for config in configs])


@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_the_judge_notices(family):
    """Negative controls: a neighbour's row, runs that differ, no number, other operands."""
    case = FAMILIES[family]
    trial, size = trial_of(case), (13, case.n, case.k)
    operands = draw(trial, 0)
    (got,) = jax.jit(runner(trial, [size]))(operands)
    shifted = got.at[:13].set(jax.numpy.roll(got[:13], 1, 0))
    assert float(judge(trial, operands, got, got, size)) < 2
    assert float(judge(trial, operands, shifted, shifted, size)) > 50
    assert float(judge(trial, operands, got, shifted, size)) == np.inf
    broken = got.at[12, -1].set(np.nan)
    assert not float(judge(trial, operands, broken, broken, size)) < 2
    wrong = draw(trial, 1)
    assert float(judge(trial, wrong, got, got, size)) > 50
