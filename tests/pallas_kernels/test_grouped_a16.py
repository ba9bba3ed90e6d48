"""grouped_matmul_a16 against float64: interpreted, as XLA, and lowered to CUDA."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from a16_cases import FORMATS, NVFP4, Case
from grouped_cases import Groups, patterns, structs

from pallas_kernels import KernelError
from pallas_kernels.a16_configs import ExactConfig, RoundedConfig
from pallas_kernels.grouped_a16 import (
    GROUPED_A16_KERNELS,
    grouped_a16_problem,
    grouped_matmul_a16,
)
from pallas_kernels.problem import select
from pallas_kernels.xla_a16 import xla_grouped_matmul_a16

PLAIN = [dataclasses.replace(f, bias="", perm=False) for f in FORMATS]
PLAIN += [NVFP4, dataclasses.replace(NVFP4, factor=64)]
UNTOUCHED = 7.0
TWIN = jax.jit(xla_grouped_matmul_a16, static_argnames="first")
TILES = (
    ExactConfig(8, cs=2, records=2),
    ExactConfig(8, kw=4),
    ExactConfig(24, nw=2, records=2, ring=3),
    RoundedConfig(48, ring=2, lag=0),
    RoundedConfig(80, nw=4, ring=4),
    RoundedConfig(256, nw=2, ring=2, lag=0),
)


def error(groups: Groups, got: np.ndarray) -> float:
    """Return the relative error of the rows that the weight's experts have."""
    assert got.dtype.name == groups.case.out
    return oracle.relative_error(got[groups.mine], groups.expected()[groups.mine])


def tolerance(groups: Groups, rounded: bool = False) -> float:
    """Bound of the relative error, as for a single weight."""
    return (4 if rounded else 2) * oracle.rounding(groups.case.out)


def check_interpreted(interpret, groups: Groups, config) -> None:
    """Run under the interpreter into an array whose other rows must keep their values."""
    into = jnp.full((groups.case.m, groups.case.n), UNTOUCHED, groups.case.out)
    got = interpret(
        grouped_matmul_a16,
        weight=groups.weight(),
        into=into,
        config=config,
        **groups.operands(),
    )
    assert (got[~groups.mine] == UNTOUCHED).all(), "wrote to rows of others"
    rounded = isinstance(config, RoundedConfig)
    assert error(groups, got) < tolerance(groups, rounded)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ((3, 0, 9, 1), ExactConfig(8)),
        ((0, 0, 13, 0), ExactConfig(8, kw=2)),
        ((1, 1, 1, 1, 1, 1, 1, 1), ExactConfig(8, cs=2, records=2)),
        ((5, 0, 20, 17), ExactConfig(16, nw=2, ring=2, lag=0)),
        ((30, 0, 0, 3), ExactConfig(24, nw=2, ring=2, lag=0)),
        ((0, 130, 0, 65), RoundedConfig(96, nw=2, ring=2, lag=0)),
        ((64, 1, 63, 0), RoundedConfig(64, kw=2, ring=2, lag=0)),
    ],
    ids=str,
)
def test_groups_under_the_interpreter(interpret, sizes, config):
    case = Case(sum(sizes) + 3, n=128, k=512, zero=True)
    check_interpreted(interpret, Groups(case, sizes), config)


@pytest.mark.interpret
@pytest.mark.parametrize("case", [PLAIN[i] for i in (2, 8, -2, -1)], ids=str)
def test_formats_under_the_interpreter(interpret, case):
    case = dataclasses.replace(case, m=12, n=64, k=384)
    check_interpreted(interpret, Groups(case, (3, 0, 8)), ExactConfig(8, kw=2))


@pytest.mark.interpret
def test_runs_of_a_bank_under_the_interpreter(interpret):
    """Two launches into one array: two layouts side by side, and rows of no expert."""
    sizes = (2, 0, 9, 4, 0, 6)
    wide = Case(24, n=64, k=256, code="int8", scale="float32")
    runs = [Groups(wide, sizes, 0, 3), Groups(Case(24, n=64, k=256), sizes, 3, 6)]
    out = jnp.full((24, 64), UNTOUCHED, jnp.bfloat16)
    config = ExactConfig(8)
    for run in runs:
        given = {"weight": run.weight(), "config": config, **run.operands()}
        out = interpret(grouped_matmul_a16, into=jnp.asarray(out), **given)
    for run in runs:
        assert error(run, out) < tolerance(run)
    assert (out[sum(sizes) :] == UNTOUCHED).all()


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_xla_computes_the_same(case):
    groups = Groups(dataclasses.replace(case, m=210), (3, 0, 150, 1, 40), 1, 5)
    got = np.asarray(TWIN(weight=groups.weight(), **groups.operands()))
    assert error(groups, got) < tolerance(groups, rounded=True)


def test_xla_takes_every_pattern_of_empty_experts():
    case = Case(60, n=64, k=128)
    first = Groups(case, (0,) * 8)
    weight, x = first.weight(), first.operands()["x"]
    for sizes in patterns(8, (1, 2, 7)):
        groups = Groups(case, tuple(map(int, sizes)))
        got = np.asarray(TWIN(x, weight, jnp.asarray(sizes, jnp.int32)))
        assert not got[~groups.mine].any()
        if groups.mine.any():
            assert error(groups, got) < tolerance(groups, rounded=True)


@pytest.mark.parametrize("wrong", ["sizes", "experts"])
def test_a_wrong_operand_is_noticed(wrong):
    """Negative control: a row given to a neighbour, experts exchanged."""
    groups = Groups(Case(40, group=64), (3, 0, 20, 17))
    weight, given = groups.weight(), groups.operands()
    if wrong == "sizes":
        given["group_sizes"] = jnp.asarray((4, 0, 19, 17), jnp.int32)
    else:
        weight = dataclasses.replace(weight, records=jnp.roll(weight.records, 1, 0))
    got = np.asarray(TWIN(weight=weight, **given))
    assert error(groups, got) > 4 * tolerance(groups, rounded=True)


def lowered(lower, case: Case, config=None) -> None:
    text = lower(lambda *operands: grouped_matmul_a16(*operands, config=config), *structs(case, 8))
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("case", "m"), zip(PLAIN, itertools.cycle([13, 400]), strict=False), ids=str
)
def test_every_format_lowers_to_cuda(lower, case, m):
    lowered(lower, dataclasses.replace(case, m=m))


@pytest.mark.parametrize("config", TILES, ids=str)
def test_every_kind_of_tile_lowers_to_cuda(lower, config):
    lowered(lower, Case(100, n=1024, k=2048), config)


def test_the_output_of_a_run_takes_over_a_buffer(lower):
    case = Case(16)
    text = lower(
        lambda x, w, s, into: grouped_matmul_a16(x, w, s, into=into),
        *structs(case, 8),
        jax.ShapeDtypeStruct((16, case.n), jnp.bfloat16),
    )
    assert "output_operand_alias" in text


@pytest.mark.parametrize("m", [1, 8, 100, 1000, 30000])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_problem_has_a_config(case, m):
    for n, k in ((64, 192), (768, 2048), (4096, 7168)):
        given = structs(dataclasses.replace(case, m=m, n=n, k=k, group=case.group or None), 16)
        problem = grouped_a16_problem(*given)
        _, config = select(GROUPED_A16_KERNELS, problem)
        assert config.refuses(problem) is None


def test_few_blocks_share_out_k():
    """One token in a third of a layer's experts, in all of them, and 16 tokens."""
    for n, k, expected in ((3072, 4096, (2, 2, 1)), (4096, 1536, (2, 1, 1))):
        clusters = []
        for rows, experts in ((8, 43), (8, 128), (128, 128)):
            x, weight, _ = structs(Case(rows, n=n, k=k), experts)
            sizes = jax.ShapeDtypeStruct((128,), jnp.int32)
            problem = grouped_a16_problem(x, weight, sizes)
            clusters.append(select(GROUPED_A16_KERNELS, problem)[1].cs)
        assert tuple(clusters) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((3, 64), np.float16)}, r"\[M, 256\]"),
        ({"x": np.ones((3, 256), np.float32)}, "bfloat16 or float16"),
        ({"group_sizes": np.ones(2, np.float32)}, "int32"),
        ({"first": 1}, "needs a size"),
        ({"into": np.ones((3, 128), np.float32)}, r"\(3, 128\) bfloat16"),
        ({"out_dtype": "float32"}, "out_dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_operands_that_break_the_contract(change, message):
    groups = Groups(Case(3), (1, 2))
    with pytest.raises(KernelError, match=message):
        grouped_matmul_a16(**{"weight": groups.weight(), **groups.operands(), **change})


def test_a_single_weight_is_refused():
    case = Case(3)
    with pytest.raises(KernelError, match="an axis of experts is needed"):
        grouped_matmul_a16(case.activations()["x"], case.pack(case.plain()), jnp.ones(1, jnp.int32))
