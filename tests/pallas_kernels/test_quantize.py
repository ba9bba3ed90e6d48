"""quantize against float64: under the interpreter, as XLA, on a GPU, and lowered to CUDA."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import KernelError, xla
from pallas_kernels.problem import H200, select
from pallas_kernels.quantize import Quantized, quantize, quantize_problem
from pallas_kernels.quantize_rows import LARGEST, QUANTIZE_KERNELS, QuantizeConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, in the words of the op's contract."""

    m: int
    k: int = 1024
    dtype: str = "float8_e4m3fn"
    layout: str = "token"
    fused: str = ""
    asymmetric: bool = False
    x: str = "bfloat16"

    def __str__(self) -> str:
        parts = (self.dtype, self.layout, self.fused, "asymmetric" * self.asymmetric, self.x)
        return f"{self.m}x{self.k}-" + "-".join(part for part in parts if part)

    @property
    def options(self) -> dict:
        """Return the keyword arguments that are no arrays."""
        return {
            "dtype": jnp.dtype(self.dtype),
            "layout": self.layout,
            "gated": self.fused == "gated",
            "symmetric": not (self.asymmetric and self.layout == "token"),
        }

    def operands(self, seed: int = 0) -> dict[str, jax.Array]:
        """Return random operands; rows differ in amplitude by up to e to the fourth."""
        rng = np.random.default_rng(seed)
        width = self.k * (2 if self.fused == "gated" else 1)
        x = rng.standard_normal((self.m, width)) * np.exp(rng.uniform(-2, 2, (self.m, 1)))
        operands = {"x": jnp.asarray(x, self.x)}
        if self.fused == "rms":
            operands["rms_weight"] = jnp.asarray(rng.uniform(0.5, 2, self.k), self.x)
        if self.layout == "tensor":
            operands["scale"] = jnp.full((1, 1), 0.02, jnp.float32)
            if self.asymmetric:
                operands["zero"] = jnp.full((1, 1), -17, jnp.int32)
        return operands


SMALL = dataclasses.replace(H200, sms=1, smem=30 * 1024)
FUSED = ("", "rms", "gated")
CASES = (
    *(
        Case(0, dtype=dtype, layout=layout, fused=fused)
        for dtype in ("float8_e4m3fn", "int8")
        for layout in ("token", "1x128", "tensor")
        for fused in FUSED
    ),
    Case(0, dtype="int8", asymmetric=True),
    Case(0, dtype="int8", asymmetric=True, layout="tensor", fused="rms"),
    Case(0, k=1536, layout="1x128"),
    Case(0, k=512, x="float16", dtype="int8", fused="gated"),
    Case(0, x="float32", fused="rms", layout="1x128"),
)


def worst_step(case: Case, operands: dict, got) -> float:
    """Return the largest error, in steps between codes (a half is the best there is)."""
    codes, scale, zero = (None if a is None else np.asarray(a) for a in got)
    assert codes.dtype == case.options["dtype"] and codes.shape == (case.m, case.k)
    arrays = {key: operands[key] for key in ("x", "rms_weight") if key in operands}
    want = oracle.fused(**arrays, gated=case.fused == "gated")
    if case.layout == "1x128":
        spread = np.repeat(scale.astype(np.float64).T[: case.m], 128, axis=1)[:, : case.k]
    else:
        spread = np.broadcast_to(scale.astype(np.float64), want.shape)
    value = (codes.astype(np.float64) - (0 if zero is None else zero)) * spread
    if case.layout == "tensor":
        top = 448 if case.dtype == "float8_e4m3fn" else 127
        low = -128 - zero if zero is not None else -top
        want = np.clip(want, low * spread, (top - (0 if zero is None else zero)) * spread)
    return float((np.abs(value - want) / (2 * oracle.largest_step(want, spread, case.dtype))).max())


def check(case: Case, got, operands: dict) -> None:
    """Half a step, and a little for float32 arithmetic before the rounding."""
    assert worst_step(case, operands, got) < 0.51
    if case.layout == "token" and not case.asymmetric:
        top = np.abs(np.asarray(got.codes, np.float32)).max(1)
        assert (top >= (448 if case.dtype == "float8_e4m3fn" else 127)).all()


def distance(case: Case, got, want) -> float:
    """Return how far the values of any row lie from those wanted, relative to the row."""
    spread = (got.scale, want.scale)
    if case.layout == "1x128":
        spread = (jnp.repeat(scale.T[: case.m], 128, axis=1) for scale in spread)
    (x, y) = (
        (q.codes.astype(jnp.float32) - (0 if q.zero is None else q.zero)) * scale
        for q, scale in zip((got, want), spread, strict=True)
    )
    return float((jnp.linalg.norm(x - y, axis=1) / jnp.linalg.norm(y, axis=1)).max())


def with_tokens(m: int) -> list[Case]:
    """Return all cases at a number of tokens."""
    return [dataclasses.replace(case, m=m) for case in CASES]


@pytest.mark.interpret
@pytest.mark.parametrize("case", with_tokens(5), ids=str)
def test_interpreted(interpret, case, monkeypatch):
    module = sys.modules["pallas_kernels.quantize"]  # the attribute of that name is the function
    monkeypatch.setattr(module, "current_device", lambda: SMALL)
    quantize.clear_cache()
    operands = case.operands()
    check(case, interpret(quantize, **operands, **case.options), operands)


SHARED = [
    Case(3, dtype="int8", asymmetric=True, fused="rms"),
    Case(3, layout="1x128", fused="rms"),
    Case(3, layout="1x128", fused="gated"),
]


@pytest.mark.interpret
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_interpreted_in_parts(interpret, case):
    """Two warpgroups of a block, or two blocks, share a row."""
    operands = case.operands()
    got = interpret(quantize, **operands, **case.options, config=QuantizeConfig(2))
    check(case, got, operands)


@pytest.mark.parametrize("m", [1, 13])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla(case, m):
    case = dataclasses.replace(case, m=m)
    operands = case.operands()
    check(case, xla.quantize(**operands, **case.options), operands)


def test_xla_takes_any_width():
    case = Case(3, k=200, layout="1x128")
    operands = case.operands()
    assert worst_step(case, operands, xla.quantize(**operands, **case.options)) < 0.51


@pytest.mark.parametrize("layout", ["token", "1x128"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_wrong_scales_are_noticed(layout, dtype):
    """Negative control: codes with the scales of a neighbour."""
    case = Case(12, dtype=dtype, layout=layout)
    operands = case.operands()
    got = xla.quantize(**operands, **case.options)
    axis = 1 if layout == "1x128" else 0
    assert worst_step(case, operands, got._replace(scale=jnp.roll(got.scale, 1, axis))) > 2


@pytest.mark.parametrize("fused", FUSED)
def test_a_forgotten_fusion_is_noticed(fused):
    """Negative control: what is quantized is not what was asked for."""
    other = "gated" if fused != "gated" else ""
    case = Case(13, fused=fused, dtype="int8")
    wrong = dataclasses.replace(case, fused=other)
    got = xla.quantize(**wrong.operands(), **wrong.options)
    assert worst_step(case, case.operands(), got) > 2


def test_zeros_stay_zeros():
    got = xla.quantize(jnp.zeros((2, 512)), dtype=jnp.int8, layout="token")
    assert (np.asarray(got.codes) == 0).all() and np.isfinite(np.asarray(got.scale)).all()


TINY_ROWS = [Case(3, layout=layout, dtype=d) for layout in ("token", "1x128") for d in LARGEST]
TINY_ROWS.append(Case(3, dtype="int8", asymmetric=True))


@pytest.mark.parametrize("run", [pytest.param("interpret", marks=pytest.mark.interpret), "xla"])
@pytest.mark.parametrize("case", TINY_ROWS, ids=str)
def test_small_rows_keep_their_values(case, run, request):
    """Rows of 1e-31 have scales of their own; those whose scale is subnormal stay finite."""
    x = case.operands()["x"]
    x = x * jnp.asarray([[1e-31], [1e-37], [1e-40]], x.dtype) / jnp.abs(x).max(1, keepdims=True)
    if run == "interpret":
        got = request.getfixturevalue("interpret")(quantize, x, **case.options)
    else:
        got = xla.quantize(x, **case.options)
    case = dataclasses.replace(case, m=1)
    first = Quantized(*(None if a is None else a[:1] for a in got))
    if case.layout == "1x128":
        first = got._replace(codes=got.codes[:1])
    assert worst_step(case, {"x": x[:1]}, first) < 0.51
    assert np.asarray(first.scale).ravel()[0] < 2.01e-31 / LARGEST[case.dtype]
    scale = np.asarray(got.scale)[..., :3] if case.layout == "1x128" else np.asarray(got.scale)
    assert (scale >= 2.0**-126).all() and np.isfinite(np.asarray(got.codes, np.float32)).all()


@pytest.mark.parametrize("m", [1, 200, pytest.param(13, marks=pytest.mark.interpret)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowers_to_cuda(lower, case, m):
    case = dataclasses.replace(case, m=m)
    assert "mosaic_gpu" in lower(lambda o: quantize(**o, **case.options), case.operands())


@pytest.mark.parametrize("k", [4096, 14336])
def test_every_candidate_lowers_to_cuda(lower, k):
    case = Case(1024, k=k, fused="gated")
    operands = {"x": jax.ShapeDtypeStruct((case.m, 2 * k), jnp.bfloat16)}
    problem = quantize_problem(**operands, **case.options)
    for config in QUANTIZE_KERNELS[0].candidates(problem):
        assert "mosaic_gpu" in lower(
            lambda o, config=config: quantize(**o, **case.options, config=config), operands
        )


@pytest.mark.parametrize(
    ("layout", "fused", "parts"),
    [
        ("token", "", (1, 2, 2)),
        ("1x128", "", (1, 2, 2)),
        ("token", "rms", (1, 2, 1)),
        ("1x128", "rms", (1, 2, 1)),
        ("token", "gated", (2, 4, 7)),
        ("1x128", "gated", (2, 4, 7)),
    ],
)
def test_default_parts_are_within_4_percent_of_the_best(layout, fused, parts):
    """For 8192 rows on an H200; docs/kernels_history.md has the times of the others."""
    for k, expected in zip((4096, 8192, 14336), parts, strict=True):
        case = Case(8192, k, layout=layout, fused=fused)
        shapes = {"x": jax.ShapeDtypeStruct((8192, k * (1 + (fused == "gated"))), jnp.bfloat16)}
        if fused == "rms":
            shapes["rms_weight"] = jax.ShapeDtypeStruct((k,), jnp.bfloat16)
        problem = quantize_problem(**shapes, **case.options)
        assert select(QUANTIZE_KERNELS, problem) == (QUANTIZE_KERNELS[0], QuantizeConfig(expected))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "tensor"},
        {"dtype": jnp.dtype("int4")},
        {"symmetric": False},
        {"scale": jnp.ones((1, 1))},
        {"rms_weight": jnp.ones((3,))},
        {"zero": jnp.ones((1, 1), jnp.int32)},
    ],
    ids=str,
)
def test_options_that_break_the_contract(changes):
    with pytest.raises(KernelError):
        quantize(**{**Case(4).operands(), **Case(4).options, **changes})


def test_refused_width():
    with pytest.raises(KernelError, match="multiple of 512"):
        quantize(**Case(4, k=640).operands(), **Case(4, k=640).options)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 13, 3000])
@pytest.mark.parametrize("k", [0, 4096, 14336])
def test_gpu(m, k):
    for case in CASES:
        case = dataclasses.replace(case, m=m, k=k or case.k)
        if k == 14336 and case.x == "float32":
            continue
        operands = case.operands()
        check(case, jax.device_get(quantize(**operands, **case.options)), operands)


# Where a row's step is a short binary fraction (255 / 32 between its extremes, say), several per
# cent of its bfloat16 values lie midway between two codes, and the last bit of the step decides all
# of them: 0.9 per cent of the row's norm.  A wrong step is off by tens of per cent.
TIES = 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_every_config(case):
    """Many rows at once, judged by the XLA twin, and the same bits each time."""
    case = dataclasses.replace(case, m=3001, k=14336)
    operands = case.operands()
    want = xla.quantize(**operands, **case.options)
    problem = quantize_problem(**operands, **case.options)
    for config in QUANTIZE_KERNELS[0].candidates(problem):
        got = quantize(**operands, **case.options, config=config)
        assert distance(case, got, want) < TIES, config
        for _ in range(3):
            again = quantize(**operands, **case.options, config=config)
            assert (again.codes.view(jnp.uint8) == got.codes.view(jnp.uint8)).all(), config


def test_distance_sees_a_wrong_row():
    """Negative control of the GPU test above: one row in 500 has the scale of another."""
    case = Case(500, k=512)
    want = xla.quantize(**case.operands(), **case.options)
    assert distance(case, want._replace(scale=want.scale.at[3].mul(1.5)), want) > 10 * TIES
    assert distance(case, want, want) == 0
