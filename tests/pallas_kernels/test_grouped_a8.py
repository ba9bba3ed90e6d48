"""grouped_matmul_a8 against float64: under the interpreter, as XLA, and lowered to CUDA."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from a8_cases import Case
from covering import covering
from grouped_a8_cases import LAYOUTS, GroupedCase

from pallas_kernels import KernelError, xla
from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.grouped_a8 import GROUPED_A8_KERNELS, grouped_a8_problem, grouped_matmul_a8
from pallas_kernels.problem import H200

SMALL = Case(0, n=128, k=256)
BLOCKED = Case(0, n=128, k=256, x_scale="1x128", w_scale="128x128")
DECODE = DecodeConfig(bm=16, stages=3, split=1)
SPLIT = DecodeConfig(bm=16, stages=4, split=2)
PREFILL = PrefillConfig(bn=128, stages=3)
UNTOUCHED = 7.0
TWIN = jax.jit(xla.grouped_matmul_a8, static_argnames=("w_block", "out_dtype"))


def structs(case: GroupedCase) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the operands' types alone."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in case.shapes().items()
    }


def tolerance(case: GroupedCase) -> float:
    """Bound of the relative error: twice what rounding the exact result makes."""
    return 2 * oracle.rounding(case.case.out)


@pytest.fixture
def two_blocks(monkeypatch) -> None:
    """Pretend that the GPU has two SMs, so that blocks make many tiles and meet at their edges."""
    module = sys.modules["pallas_kernels.matmul_a8"]
    monkeypatch.setattr(module, "current_device", lambda: dataclasses.replace(H200, sms=2))
    grouped_matmul_a8.clear_cache()
    yield
    grouped_matmul_a8.clear_cache()


@pytest.mark.interpret
@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("config", [DECODE, SPLIT, PREFILL], ids=["decode", "split", "prefill"])
@pytest.mark.parametrize("case", [SMALL, BLOCKED], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1,), (0, 3, 0, 5, 1, 0), (13, 0, 77, 2)], ids=["one row", "few", "skewed"]
)
def test_each_row_meets_its_expert(interpret, sizes, case, config):
    """In tiles of 128 a warpgroup takes 64 rows: with 13 one has none, with 77 both have some."""
    case = GroupedCase(sizes, case)
    if case.rows < 8 and config != PREFILL:
        config = dataclasses.replace(config, bm=8)
    operands = case.operands()
    got = interpret(grouped_matmul_a8, **operands, **case.options, config=config)
    assert oracle.relative_error(got, case.expected(operands)) < tolerance(case)


@pytest.mark.interpret
@pytest.mark.parametrize("config", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("case", LAYOUTS[1:], ids=str)
def test_every_layout(interpret, case, config):
    case = dataclasses.replace(case, n=128, k=min(case.k, 256))
    if case.x_scale == "tensor":
        case = dataclasses.replace(case, n=64)
        config = dataclasses.replace(config, **({"bn": 64} if config == PREFILL else {}))
    case = GroupedCase((5, 0, 9), case)
    operands = case.operands()
    got = interpret(grouped_matmul_a8, **operands, **case.options, config=config)
    assert oracle.relative_error(got, case.expected(operands)) < tolerance(case)


@pytest.mark.interpret
@pytest.mark.parametrize("config", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_rows_of_no_expert_are_left_alone(interpret, config):
    """No tile at all, and rows beyond the last group: nobody waits for work that does not come."""
    case = GroupedCase((3, 6), SMALL)
    operands = case.operands()
    for sizes in ((0, 0), (3, 2)):
        given = {**operands, "group_sizes": np.array(sizes, np.int32)}
        got = interpret(grouped_matmul_a8, **given, **case.options, config=config)
        live = sum(sizes)
        expected = case.expected(operands)[:live]
        assert live == 0 or oracle.relative_error(got[:live], expected) < tolerance(case)


@pytest.mark.interpret
@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(DECODE, bm=24), dataclasses.replace(SPLIT, bm=24), PREFILL],
    ids=["decode", "split", "prefill"],
)
def test_runs_of_a_bank(interpret, config):
    """Two launches into one array: experts 0 and 1, then 3; 2 has no weights, some rows no expert.

    The tile of 24 rows is no power of two, and an expert's rows fill more than one.
    """
    case = GroupedCase((5, 31, 4, 9, 2), BLOCKED)
    operands = case.operands()
    expected, live = case.expected(operands), np.zeros(case.rows, bool)
    operands["group_sizes"] = np.array([5, 31, 4, 9], np.int32)
    out = np.full((case.rows, 128), UNTOUCHED, "bfloat16")
    for first, stop in ((0, 2), (3, 4)):
        run = {**operands, **{name: operands[name][first:stop] for name in ("w", "w_scale")}}
        out = interpret(
            grouped_matmul_a8,
            **run,
            **case.options,
            first=first,
            into=jnp.asarray(out),
            config=config,
        )
        rows = slice(sum(case.sizes[:first]), sum(case.sizes[:stop]))
        live[rows] = True
    assert oracle.relative_error(out[live], expected[live]) < tolerance(case)
    assert (out[~live] == UNTOUCHED).all(), "wrote to rows of others"


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_xla_computes_the_same(case):
    case = GroupedCase((5, 0, 1, 70, 0, 9), case)
    operands = case.operands()
    got = TWIN(**operands, **case.options)
    # Scales along K round both operands to bfloat16 first.
    assert oracle.relative_error(got, case.expected(operands)) < 3 * oracle.rounding("bfloat16")


@pytest.mark.parametrize("wrong", ["x_scale", "w_scale", "group_sizes"])
@pytest.mark.parametrize("case", [SMALL, BLOCKED], ids=str)
def test_a_wrong_operand_is_noticed(case, wrong):
    """Negative control: one row given to the neighbour, or another's scales, must show."""
    case = GroupedCase((5, 0, 6, 70), case)
    operands = case.operands()
    expected = case.expected(operands)
    if wrong == "group_sizes":
        operands[wrong] = operands[wrong] + np.array([1, 0, 0, -1], np.int32)
    else:
        axis = 1 if (wrong, case.case.x_scale) == ("x_scale", "1x128") else 0
        operands[wrong] = np.roll(operands[wrong], 1, axis=axis)
    got = TWIN(**operands, **case.options)
    assert oracle.relative_error(got, expected) > 4 * tolerance(case)


def lowered(lower, case: GroupedCase, config=None) -> None:
    def call(operands):
        return grouped_matmul_a8(**operands, **case.options, config=config)

    assert "mosaic_gpu" in lower(call, structs(case))


@pytest.mark.parametrize("sizes", [(1,), (2,) * 8, (130,) * 4], ids=str)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_every_layout_lowers_to_cuda(lower, case, sizes):
    lowered(lower, GroupedCase(sizes, case))


@pytest.mark.parametrize("case", LAYOUTS[:3], ids=str)
def test_candidates_lower_to_cuda(lower, case):
    jobs = []
    for sizes in ((1,) * 8, (1,) * 128, (8,) * 128, (64,) * 128, (256,) * 128):
        grouped = GroupedCase(sizes, dataclasses.replace(case, n=3072, k=4096))
        problem = grouped_a8_problem(**structs(grouped), **grouped.options)
        for kernel in GROUPED_A8_KERNELS:
            if kernel.accepts(problem) is None:
                jobs += [(grouped, config) for config in kernel.candidates(problem)]
    for grouped, config in covering(jobs, lambda job: job[1]):
        lowered(lower, grouped, config)


def test_a_row_of_four_products_is_refused():
    """It spilled registers of products under way, and was wrong on the device."""
    case = GroupedCase((64,) * 8, BLOCKED)
    problem = grouped_a8_problem(**structs(case), **case.options)
    four = dataclasses.replace(PREFILL, unroll=4)
    assert "two steps" in (four.refuses(problem) or "")
    assert dataclasses.replace(PREFILL, unroll=2).refuses(problem) is None
    plain = GroupedCase((64,) * 8, SMALL)
    assert four.refuses(grouped_a8_problem(**structs(plain), **plain.options)) is None


def test_refusals_name_every_kernel():
    with pytest.raises(KernelError) as error:
        grouped_matmul_a8(**GroupedCase((3, 4), Case(0, n=100)).operands())
    assert set(error.value.reasons) == {kernel.name for kernel in GROUPED_A8_KERNELS}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_sizes", np.ones(1, np.int32)),
        ("group_sizes", np.ones((2, 1), np.int32)),
        ("group_sizes", np.ones(2, np.float32)),
        ("w_scale", np.ones((3, 128, 1), np.float32)),
        ("w", np.ones((128, 256), np.int8)),
        ("x_scale", np.ones((5, 1), np.float32)),
        ("into", np.ones((8, 128), "bfloat16")),
        ("into", np.ones((7, 128), np.float32)),
    ],
)
def test_operands_that_break_the_contract(name, value):
    operands = GroupedCase((3, 4), SMALL).operands()
    with pytest.raises(KernelError, match=name):
        grouped_matmul_a8(**{**operands, name: value})
