"""matmul_a16 and matmul_w4a8 against float64: interpreted, as XLA, and lowered to CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from a16_cases import (
    FORMATS,
    NARROW,
    QSERVE_CHANNEL,
    QSERVE_GROUP,
    TUNED,
    TUNED_TWO_LEVEL,
    TWO_LEVEL,
    WHOLE,
    Case,
)
from covering import covering

from pallas_kernels import KernelError, matmul_a16, matmul_w4a8, unpack
from pallas_kernels.a16_configs import ExactConfig, RoundedConfig
from pallas_kernels.matmul_a16 import A16_KERNELS, a16_problem
from pallas_kernels.matmul_w4a8 import W4A8_KERNELS, w4a8_problem
from pallas_kernels.problem import H200, select, tuned_table
from pallas_kernels.xla_a16 import xla_matmul_a16, xla_matmul_w4a8

ALL = (*FORMATS, *TWO_LEVEL, *NARROW, *WHOLE)


def tolerance(case: Case, rounded: bool = False) -> float:
    """Bound of the relative error: twice what rounding the exact result makes.

    Rounding scales into the operand adds errors of the operand's type, which partly average out.
    """
    bound = 2 * oracle.rounding(case.out)
    return 2 * bound if rounded else bound


def check_interpreted(interpret, case: Case, config=None, rounded: bool = False) -> None:
    """Run one case under the interpreter and compare."""
    plain = case.plain()
    op = matmul_w4a8 if case.narrow else matmul_a16
    got = interpret(op, **case.activations(), weight=case.pack(plain), config=config)
    assert got.dtype.name == case.out
    assert oracle.relative_error(got, case.expected(plain)) < tolerance(case, rounded)


def xla(case: Case, plain: dict, given: dict) -> np.ndarray:
    """Return the result of the XLA twin."""
    op = jax.jit(xla_matmul_w4a8 if case.narrow else xla_matmul_a16)
    return op(**given, weight=case.pack(plain))


@pytest.mark.interpret
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_format_under_the_interpreter(interpret, case):
    config = (RoundedConfig if case in WHOLE else ExactConfig)(8, kw=2)
    plain = not case.narrow and case.scale != "uint8"
    if plain and (case.code, case.group) == ("uint4", 32):  # rounded, within the bound of exact
        config = RoundedConfig(8, kw=2)
    case = dataclasses.replace(case, m=5, n=64, k=case.k if case.k % 128 else 384)
    check_interpreted(interpret, case, config, case in TWO_LEVEL)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "case",
    [Case(16, n=64, k=1024), Case(16, n=64, k=1024, group=32), Case(3, n=64, x="int8")],
    ids=str,
)
def test_chosen_configs_under_the_interpreter(interpret, case):
    check_interpreted(interpret, case)


@pytest.mark.interpret
@pytest.mark.parametrize("case", [FORMATS[1], FORMATS[4], FORMATS[8], FORMATS[9]], ids=str)
def test_rounded_scales_under_the_interpreter(interpret, case):
    case = dataclasses.replace(case, m=70, n=128, k=384)
    check_interpreted(interpret, case, RoundedConfig(64, nw=2, ring=2, lag=0), rounded=True)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 64, 512, ExactConfig(8, slots=2)),
        (13, 128, 512, ExactConfig(16, slots=2, records=2)),
        (16, 64, 640, ExactConfig(16, kw=2, slots=3)),
        (16, 128, 1024, ExactConfig(16, nw=2, ring=3, lag=1)),
        (16, 128, 768, ExactConfig(16, nw=2, records=2, ring=2, lag=0)),
        (16, 128, 512, ExactConfig(16, nw=2, ring=4, lag=0)),
        (64, 64, 256, ExactConfig(64, slots=1)),
        (100, 64, 256, RoundedConfig(128, ring=2, lag=0)),
        (128, 128, 1152, RoundedConfig(64, nw=2, ring=3, lag=1, snake=2)),
        (64, 64, 896, RoundedConfig(64, kw=2, ring=3, lag=1)),
        (200, 64, 512, RoundedConfig(256, ring=2, lag=0)),
        (16, 64, 896, RoundedConfig(16, kw=2, slots=2)),
        (5, 128, 768, RoundedConfig(8, slots=3, records=2)),
    ],
    ids=str,
)
def test_every_shape_of_config(interpret, m, n, k, config):
    rounded = isinstance(config, RoundedConfig)
    group = 32 if rounded and m <= 32 else 128
    check_interpreted(interpret, Case(m, n, k, group=group, zero=True), config, rounded)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (dataclasses.replace(QSERVE_CHANNEL, m=1), RoundedConfig(8)),
        (dataclasses.replace(QSERVE_GROUP, m=70), RoundedConfig(64, nw=2, ring=2, lag=0)),
        (dataclasses.replace(QSERVE_CHANNEL, m=70), RoundedConfig(128, ring=3, lag=1)),
    ],
    ids=str,
)
def test_int8_operands_of_one_and_of_many_tokens_under_the_interpreter(interpret, case, config):
    check_interpreted(interpret, dataclasses.replace(case, n=128, k=384), config)


@pytest.mark.parametrize("m", [13, 200])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_xla_computes_the_same(case, m):
    case = dataclasses.replace(case, m=m)
    plain = case.plain()
    got = xla(case, plain, case.activations())
    assert got.dtype == case.out
    assert oracle.relative_error(got, case.expected(plain)) < tolerance(case, rounded=True)


def swap_nibbles(plain):
    return {"codes": plain["codes"] >> 4 | plain["codes"] << 4}


def shift_groups(plain):
    return {"scales": np.roll(plain["scales"], 1, axis=1)}


def shift_channels(plain):
    return {"scales": np.roll(plain["scales"], 1, axis=0)}


def wrong_zero(plain):
    return {"zeros": plain["zeros"] ^ 1}


@pytest.mark.parametrize("wrong", [swap_nibbles, shift_groups, shift_channels, wrong_zero])
@pytest.mark.parametrize("x", ["bfloat16", "int8"])
def test_a_wrong_weight_is_noticed(wrong, x):
    """Negative control: the tolerance must not hide a mistake in the weight."""
    case = Case(13, group=64, zero=True, x=x)
    plain = case.plain()
    expected = case.expected(plain)
    got = xla(case, {**plain, **wrong(plain)}, case.activations())
    assert oracle.relative_error(got, expected) > 4 * tolerance(case, rounded=True)


def wrong_offset(plain):
    return {"zeros": np.roll(plain["zeros"], 1, axis=0)}


def wrong_factor(plain):
    fine, tops = plain["scales"]
    return {"scales": (fine, np.roll(tops, 1, axis=0))}


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (QSERVE_GROUP, swap_nibbles),
        (QSERVE_GROUP, wrong_zero),
        (QSERVE_GROUP, wrong_factor),
        (QSERVE_CHANNEL, swap_nibbles),
        (QSERVE_CHANNEL, shift_channels),
        (QSERVE_CHANNEL, wrong_offset),
    ],
)
def test_a_wrong_weight_of_int8_operands_is_noticed(case, wrong):
    case = dataclasses.replace(case, m=13)
    plain = case.plain()
    got = xla(case, {**plain, **wrong(plain)}, case.activations())
    assert oracle.relative_error(got, case.expected(plain)) > 4 * tolerance(case, rounded=True)


@pytest.mark.parametrize("wrong", ["bias", "perm", "x_scale"])
def test_a_wrong_vector_is_noticed(wrong):
    case = (
        Case(13, bias="float32", x="int8")
        if wrong == "x_scale"
        else Case(13, bias="float32", perm=True)
    )
    plain, given = case.plain(), case.activations()
    expected = case.expected(plain)
    given[wrong] = np.roll(given[wrong], 1, axis=0)
    error = oracle.relative_error(xla(case, plain, given), expected)
    assert error > 4 * tolerance(case, rounded=True)


def lowered(lower, case: Case, config=None) -> None:
    op = matmul_w4a8 if case.narrow else matmul_a16
    text = lower(lambda operands: op(**operands, config=config), case.structs())
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("m", [13, 200])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_format_lowers_to_cuda(lower, case, m):
    lowered(lower, dataclasses.replace(case, m=m))


@pytest.mark.parametrize("narrow", [False, True], ids=["16 bits", "8 bits"])
def test_candidates_lower_to_cuda(lower, narrow):
    if narrow:
        cases = [Case(16, n=4096, k=4096, x="int8", group=32)]
    else:
        cases = [Case(m, n=28672, k=4096, bias="bfloat16") for m in (16, 64, 512)]
    kernels, problem_of = (W4A8_KERNELS, w4a8_problem) if narrow else (A16_KERNELS, a16_problem)
    jobs = []
    for case in cases:
        problem = problem_of(**case.structs())
        for kernel in kernels:
            if kernel.accepts(problem) is None:
                jobs += [(case, config) for config in kernel.candidates(problem)]
    for case, config in covering(jobs, lambda job: job[1]):
        lowered(lower, case, config)


CASES = {**TUNED, **TUNED_TWO_LEVEL}
ENTRIES = tuned_table(H200).get("matmul_a16", [])


def test_every_tuned_kind_has_a_case():
    assert {entry["kind"] for entry in ENTRIES} == set(CASES)


@pytest.mark.parametrize("kind", CASES)
def test_tuned_configs_are_chosen_and_lower_to_cuda(lower, kind):
    jobs = []
    for entry in ENTRIES:
        if entry["kind"] == kind:
            sizes = {name: entry[name] for name in ("m", "n", "k")}
            case = dataclasses.replace(CASES[kind], **sizes)
            kernel, config = select(A16_KERNELS, a16_problem(**case.structs()))
            assert (kernel.name, dataclasses.asdict(config)) == (entry["kernel"], entry["config"])
            jobs.append((case, config))
    for case, _ in covering(jobs, lambda job: job[1]):
        lowered(lower, case)


def test_untuned_types_use_the_configs_of_tuned_ones(lower):
    for case in (
        Case(16, n=28672, k=4096, zero=True, group=32),
        Case(16, n=28672, k=4096, x="float16"),
        Case(2048, n=8192, k=8192, code="float8_e4m3fn", scale="float32"),
    ):
        lowered(lower, case)


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_scales_are_exact_for_few_tokens_but_of_4_bits_in_groups_of_32(case):
    expected = "a16_prefill" if (case.code, case.group) == ("uint4", 32) else "a16_decode"
    for m in (1, 5, 32):
        for k in (192, 1024, 4096):
            problem = a16_problem(**dataclasses.replace(case, m=m, k=k).structs())
            assert select(A16_KERNELS, problem)[0].name == expected


def test_refusals_name_every_kernel():
    case = Case(16)
    other = ExactConfig(16, nw=8)
    with pytest.raises(KernelError) as error:
        matmul_a16(**case.activations(), weight=case.pack(case.plain()), config=other)
    assert set(error.value.reasons) == {kernel.name for kernel in A16_KERNELS}
    assert "no multiple of 512 channels" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.ones((3, 64), np.float16), r"\[M, 256\]"),
        ("x", np.ones((3, 256), np.float32), "bfloat16 or float16"),
        ("bias", np.ones((5,), np.float32), "bias"),
        ("perm", np.ones((256,), np.int64 if jax.config.jax_enable_x64 else np.int8), "perm"),
        ("out_dtype", "float32", "out_dtype"),
    ],
)
def test_operands_that_break_the_contract(name, value, message):
    case = Case(13)
    given = {**case.activations(), "weight": case.pack(case.plain()), name: value}
    with pytest.raises(KernelError, match=message):
        matmul_a16(**given)


def test_a_weight_packed_for_the_other_op_is_refused():
    wide, narrow = Case(4), Case(4, x="int8")
    with pytest.raises(KernelError, match="operand=16"):
        matmul_a16(**wide.activations(), weight=narrow.pack(narrow.plain()))
    with pytest.raises(KernelError, match="operand=8"):
        matmul_w4a8(**narrow.activations(), weight=wide.pack(wide.plain()))
    group = dataclasses.replace(QSERVE_GROUP, m=4)
    given = Case(4, x="float8_e4m3fn").activations()
    with pytest.raises(KernelError, match="int8 operands"):
        matmul_w4a8(**given, weight=group.pack(group.plain()))


def test_a_stack_is_refused_and_scanned():
    case = Case(4)
    stack = case.pack(jax.tree.map(lambda *a: np.stack(a), case.plain(0), case.plain(1)))
    x = case.activations()["x"]
    with pytest.raises(KernelError, match="stacked"):
        matmul_a16(x, stack)
    _, both = jax.lax.scan(lambda carry, w: (carry, xla_matmul_a16(x, w)), 0, stack)
    for layer in range(2):
        alone = xla_matmul_a16(x, case.pack(case.plain(layer)))
        np.testing.assert_array_equal(both[layer], alone)
    assert unpack(stack).codes.dtype == jnp.uint8
