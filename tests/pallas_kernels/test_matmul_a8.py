"""matmul_a8 against float64: under the interpreter, as XLA, and lowered to CUDA."""

import dataclasses
import sys

import jax
import numpy as np
import oracle
import pytest
from a8_cases import LAYOUTS, TOKENS, Case
from covering import covering, values_of
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import KernelError, a8_prefill_sums, promote, xla
from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.matmul_a8 import A8_KERNELS, a8_problem, matmul_a8
from pallas_kernels.problem import H200, select, tuned_table

# The interpreter takes about half a second for every tile and K step, so shapes stay small; what
# differs between problems is who waits for whom, and that depends on the number of steps and tiles.
SMALL = {"n": 128, "k": 384}
TWIN = jax.jit(xla.matmul_a8, static_argnames=("w_block", "out_dtype"))


def structs(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the operands' types alone."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in case.shapes().items()
    }


def tolerance(case: Case) -> float:
    """Bound of the relative error: twice what rounding the exact result makes."""
    return 2 * oracle.rounding(case.out)


@pytest.fixture
def one_block(monkeypatch) -> None:
    """Pretend that the GPU has one SM, so that one block makes all tiles, one after the other."""
    module = sys.modules["pallas_kernels.matmul_a8"]  # the attribute of that name is the function
    monkeypatch.setattr(module, "current_device", lambda: dataclasses.replace(H200, sms=1))
    matmul_a8.clear_cache()
    yield
    matmul_a8.clear_cache()


def check_interpreted(interpret, case: Case, config=None) -> None:
    """Run one case under the interpreter and compare."""
    operands = case.operands()
    got = interpret(matmul_a8, **operands, **case.options, config=config)
    assert got.dtype == case.options["out_dtype"]
    assert oracle.relative_error(got, case.expected(operands)) < tolerance(case)


@pytest.mark.interpret
@pytest.mark.parametrize("m", TOKENS)
def test_any_number_of_tokens(interpret, m):
    check_interpreted(interpret, Case(m, **SMALL))


@pytest.mark.interpret
@pytest.mark.parametrize("m", [5, 70])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_every_layout(interpret, case, m):
    if case.n == 256:
        case = dataclasses.replace(case, n=128, k=min(case.k, 256))
    check_interpreted(interpret, dataclasses.replace(case, m=m))


# Steps that do not divide by the row of unrolled ones, and a tile across two blocks of weights.
NARROW = (
    Case(64, n=192, k=640, x_scale="1x128", w_scale="128x128"),
    PrefillConfig(bm=64, bn=96, stages=3, warpgroups=1, unroll=4),
)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (Case(16, **SMALL), DecodeConfig(bm=16, stages=4, split=2)),
        (Case(24, n=128, k=640), DecodeConfig(bm=16, stages=6, split=3)),
        (Case(16, n=128, k=512), DecodeConfig(bm=16, stages=2, channels=2, split=1)),
        (Case(16, n=64, k=1152), DecodeConfig(bm=16, stages=4, split=2)),
        (Case(8, n=128, k=512), DecodeConfig(bm=8, stages=4, atoms=2, split=2)),
        (
            Case(16, n=128, k=512, x_scale="1x128", w_scale="128x128"),
            DecodeConfig(bm=16, stages=4, channels=2, split=2),
        ),
        (Case(256, n=384, k=256), PrefillConfig(bn=128, stages=2, staging=2)),
        (Case(128, n=320, k=256), PrefillConfig(bn=192, stages=2)),
        (Case(256, n=128, k=384), PrefillConfig(bn=128, stages=2, cluster=2)),
        (Case(192, n=128, k=256), PrefillConfig(bm=192, bn=64, stages=2, warpgroups=3)),
        (Case(256, n=128, k=256), PrefillConfig(bm=256, bn=64, stages=2, minor=1, group=2)),
        (
            Case(128, n=320, k=384, x_scale="1x128", w_scale="128x128"),
            PrefillConfig(bn=192, stages=2),
        ),
        (
            Case(192, n=128, k=384, x_scale="1x128", w_scale="128x128"),
            PrefillConfig(bm=192, bn=128, stages=2, warpgroups=3),
        ),
        (
            Case(16, n=64, k=640, x_scale="1x128", w_scale="64x64"),
            DecodeConfig(bm=16, stages=2, split=1),
        ),
        (Case(40, n=128, k=256), PrefillConfig(bm=64, bn=80, stages=2, warpgroups=1)),
        NARROW,
        (
            Case(64, n=192, k=192, x_scale="token", w_scale="64x64"),
            PrefillConfig(bm=64, bn=96, stages=3, warpgroups=1, unroll=2),
        ),
        (
            Case(256, n=128, k=384, x_scale="1x128"),
            PrefillConfig(bn=128, stages=2, cluster=2, unroll=2),
        ),
    ],
    ids=str,
)
def test_every_shape_of_config(interpret, case, config):
    check_interpreted(interpret, case, config)


@pytest.mark.interpret
@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("scales", [("token", "channel"), ("1x128", "128x128")])
def test_one_block_makes_many_tiles(interpret, scales):
    case = Case(200, n=256, k=256, x_scale=scales[0], w_scale=scales[1], bias="float32")
    check_interpreted(interpret, case, PrefillConfig(bn=128, stages=3))


@pytest.mark.interpret
def test_a_product_with_the_scales_of_another_step_is_noticed(interpret, monkeypatch):
    """Negative control: two products are under way, and each must meet its own scales."""
    sum_steps = a8_prefill_sums.sum_steps

    def mixed_up(start, *args, **kwargs):
        def late(i, s):
            product, _ = start(i, s)
            return product, start(jax.lax.max(i - 1, 0), s)[1]

        return sum_steps(late, *args, **kwargs)

    monkeypatch.setattr(a8_prefill_sums, "sum_steps", mixed_up)
    matmul_a8.clear_cache()
    case, config = NARROW
    operands = case.operands()
    got = interpret(matmul_a8, **operands, **case.options, config=config)
    matmul_a8.clear_cache()
    assert oracle.relative_error(got, case.expected(operands)) > 4 * tolerance(case)


@pytest.mark.interpret
def test_a_slot_given_back_before_its_product_is_finished_is_noticed(interpret, monkeypatch):
    """Negative control: the race detector must see a refill of what is still being read."""
    sum_steps = a8_prefill_sums.sum_steps

    def hasty(start, *args, ring, **kwargs):
        def begin(i, s):
            plgpu.barrier_arrive(ring.empty.at[s])
            return start(i, s)

        return sum_steps(begin, *args, ring=ring, **kwargs)

    monkeypatch.setattr(a8_prefill_sums, "sum_steps", hasty)
    monkeypatch.setattr(promote, "release", lambda *_: None)
    matmul_a8.clear_cache()
    case, config = NARROW
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE"):
        interpret(matmul_a8, **case.operands(), **case.options, config=config)
    matmul_a8.clear_cache()


@pytest.mark.parametrize("m", [1, 13, 200])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_xla_computes_the_same(case, m):
    case = dataclasses.replace(case, m=m)
    operands = case.operands()
    got = TWIN(**operands, **case.options)
    # Scales along K round both operands to bfloat16 first.
    assert oracle.relative_error(got, case.expected(operands)) < 3 * oracle.rounding("bfloat16")


@pytest.mark.parametrize("m", [13, 200])
@pytest.mark.parametrize(
    "wrong", ["x_scale", "w_scale", "x_zero", "w_sum", "bias", "x_groups", "w_blocks"]
)
def test_a_wrong_operand_is_noticed(wrong, m):
    """Negative control: the tolerance must not hide a mistake in any one operand."""
    case = Case(m, x="int8", w="int8", zero="token", bias="float32")
    if wrong == "bias":  # next to nothing beside the sums of int8 products
        case = Case(m, bias="float32")
    if wrong in ("x_groups", "w_blocks"):
        case = Case(m, n=256, k=512, x_scale="1x128", w_scale="128x128")
    operands = case.operands()
    expected = case.expected(operands)
    name = {"x_groups": "x_scale", "w_blocks": "w_scale"}.get(wrong, wrong)
    operands[name] = np.roll(operands[name], 1, axis=-1 if wrong == "w_blocks" else 0)
    error = oracle.relative_error(TWIN(**operands, **case.options), expected)
    assert error > 4 * tolerance(case)


def lowered(lower, case: Case, config=None) -> None:
    def call(operands):
        return matmul_a8(**operands, **case.options, config=config)

    if case.x != case.w and jax.__version_info__ < (0, 11):
        with pytest.raises(KernelError, match=r"jax 0\.10"):
            lower(call, structs(case))
        return
    assert "mosaic_gpu" in lower(call, structs(case))


@pytest.mark.parametrize("m", [1, 13, 200])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_every_layout_lowers_to_cuda(lower, case, m):
    lowered(lower, dataclasses.replace(case, m=m))


KINDS = {
    "float8": Case(0),
    "int8": Case(0, x="int8", w="int8"),
    "float8 1x128 128x128": Case(0, x_scale="1x128", w_scale="128x128"),
}


def candidates(kind: str) -> list[tuple[Case, object]]:
    """Return cases of few to many tokens, each with every config worth measuring for it."""
    jobs = []
    for m in (16, 64, 128, 2048):
        case = dataclasses.replace(KINDS[kind], m=m, n=6144, k=4096)
        problem = a8_problem(**structs(case), **case.options)
        for kernel in A8_KERNELS:
            if kernel.accepts(problem) is None:
                jobs += [(case, config) for config in kernel.candidates(problem)]
    return jobs


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_lower_to_cuda(lower, kind):
    for case, config in covering(candidates(kind), lambda job: job[1]):
        lowered(lower, case, config)


def test_what_covers_leaves_out_no_value():
    jobs = [config for _, config in candidates("int8")]
    chosen = covering(jobs, lambda job: job)
    assert set().union(*map(values_of, chosen)) == set().union(*map(values_of, jobs))


TUNED = tuned_table(H200).get("matmul_a8", [])


def tuned_case(entry: dict) -> Case:
    """Return a case of an entry's kind and sizes."""
    return dataclasses.replace(KINDS[entry["kind"]], m=entry["m"], n=entry["n"], k=entry["k"])


def test_every_tuned_config_is_selected():
    assert TUNED
    for entry in TUNED:
        case = tuned_case(entry)
        kernel, config = select(A8_KERNELS, a8_problem(**structs(case), **case.options))
        assert (kernel.name, dataclasses.asdict(config)) == (entry["kernel"], entry["config"])


@pytest.mark.parametrize("kind", KINDS)
def test_tuned_configs_lower_to_cuda(lower, kind):
    cases = [tuned_case(entry) for entry in TUNED if entry["kind"] == kind]

    def config(case: Case) -> object:
        return select(A8_KERNELS, a8_problem(**structs(case), **case.options))[1]

    for case in covering(cases, config):
        lowered(lower, case)


def test_refusals_name_every_kernel():
    with pytest.raises(KernelError) as error:
        matmul_a8(**Case(16, n=100).operands())
    assert set(error.value.reasons) == {kernel.name for kernel in A8_KERNELS}
    assert "multiples of 64" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x_scale", np.ones((3, 1), np.float32)),
        ("x_scale", np.ones((13, 1), np.float16)),
        ("w_scale", np.ones((4, 4), np.float32)),
        ("bias", np.ones((5,), np.float32)),
        ("x_zero", np.ones((13, 1), np.int32)),
    ],
)
def test_operands_that_break_the_contract(name, value):
    operands = Case(13).operands()
    with pytest.raises(KernelError, match=name):
        matmul_a8(**{**operands, name: value})
