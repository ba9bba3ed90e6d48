"""Wrong operands of ops are named, empty ones are no special case."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant import ops
from jaxquant.arrays.bank import Run, StackedBank
from jaxquant.errors import LayoutError
from jaxquant.nn import Linear
from jaxquant.nn.basic import MLP
from jaxquant.transforms.experts import bank_experts, plan_experts

OUT, IN = 128, 256
RNG = np.random.default_rng(0)
W = RNG.standard_normal((OUT, IN)).astype(np.float32)
X = jnp.asarray(RNG.standard_normal((4, IN)), jnp.bfloat16)
SCHEMES = ("bf16", "fp8", "fp8_b128", "w8a8", "w4a16_g128", "w4a8", "mxfp4", "nvfp4")
WEIGHTS = {scheme: jq.quantize(W, scheme, ("out", "in")) for scheme in SCHEMES}
FP8, INT4, BLOCKS = WEIGHTS["fp8"], WEIGHTS["w4a16_g128"], WEIGHTS["fp8_b128"]
CODES = ops.QActivation(
    jnp.ones((4, IN), jnp.float8_e4m3fn), jnp.ones((4, 1)), None, FP8.act, jnp.bfloat16
)


def changed(q, **fields):
    return dataclasses.replace(q, **fields)


def bank_of(q, experts=4):
    return bank_experts(plan_experts([[q] * experts]), 0, lambda _: q)


BANK = bank_of(FP8)
LAYERS = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), BANK)
SIZES = jnp.ones(4, jnp.int32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)])
def test_no_rows_give_no_rows(scheme, lead):
    x = jnp.zeros((*lead, IN), jnp.bfloat16)
    for matmul in (jq.matmul, jax.jit(jq.matmul)):
        assert matmul(x, WEIGHTS[scheme]).shape == (*lead, OUT)


def test_no_rows_of_quantized_activations_and_of_experts():
    for q in (FP8, BLOCKS):
        cells = (2, 0) if q is BLOCKS else (0, 1)
        codes = jnp.zeros((0, IN), jnp.float8_e4m3fn)
        x = ops.QActivation(codes, jnp.zeros(cells), None, q.act, jnp.bfloat16)
        assert jq.matmul(x, q).shape == (0, OUT)
        assert jq.grouped_matmul(X[:0], bank_of(q), 0 * SIZES).shape == (0, OUT)


def test_numpy_operands():
    x = np.asarray(X, np.float32)
    np.testing.assert_array_equal(jq.matmul(x, FP8), jq.matmul(jnp.asarray(x), FP8))
    wide = jq.grouped_matmul(x, BANK, np.ones(4, np.int64), source=np.arange(4))
    np.testing.assert_array_equal(wide, jq.grouped_matmul(jnp.asarray(x), BANK, SIZES))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_banks_of_numpy_leaves(scheme):
    bank = bank_of(WEIGHTS[scheme])
    got = jq.grouped_matmul(X, jax.tree.map(np.asarray, bank), SIZES)
    np.testing.assert_array_equal(got, jq.grouped_matmul(X, bank, SIZES))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepare_model_of_linears_with_numpy_leaves(scheme):
    def mlp(change):
        one, other = (jq.quantize(w, scheme, ("out", "in")) for w in (W, W.T))
        return MLP(*(Linear(jax.tree.map(change, q)) for q in (one, one, other)), "silu")

    prepared = jq.prepare_model(mlp(np.asarray))
    found, expected = (nnx.state(m) for m in (prepared, jq.prepare_model(mlp(jnp.asarray))))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


MATMULS = {
    "a list": ([[1.0] * IN], FP8),
    "nothing": (None, FP8),
    "a weight for activations": (FP8, FP8),
    "an array for a weight": (X, W),
    "a bank for a weight": (X, BANK),
    "integers": (jnp.ones((4, IN), jnp.int32), FP8),
    "bytes": (jnp.ones((4, IN), jnp.int8), WEIGHTS["w8a8"]),
    "flags": (jnp.ones((4, IN), bool), FP8),
    "float8": (X.astype(jnp.float8_e4m3fn), FP8),
    "complex numbers": (X.astype(jnp.complex64), WEIGHTS["bf16"]),
    "a number": (jnp.float32(1), FP8),
    # Both would broadcast.
    "one scale for a channel's": (X, changed(FP8, scales=(FP8.scales[0][:1],))),
    "a channel's scales for all": (X, changed(INT4, scales=(INT4.scales[0][:1],))),
    "half of the scales": (X, changed(FP8, scales=(FP8.scales[0][:64],))),
    "scales of fewer groups": (X, changed(INT4, scales=(INT4.scales[0][:, :1],))),
    "no scales": (X, changed(INT4, scales=())),
    "a short order": (X, changed(INT4, perm=jnp.arange(100))),
    "an order of floats": (X, changed(INT4, perm=jnp.zeros(IN))),
    "a short pre-scale": (X, changed(INT4, pre_scale=jnp.ones(3))),
    "codes with one scale": (changed(CODES, scale=jnp.ones((1, 1))), FP8),
    "codes with scales of another type": (changed(CODES, scale=jnp.ones((4, 1), jnp.int32)), FP8),
    "codes with zero points": (changed(CODES, zero=jnp.zeros((4, 1), jnp.int32)), FP8),
    "codes of another type": (changed(CODES, codes=X), FP8),
}


@pytest.mark.parametrize("name", MATMULS)
def test_wrong_operands_of_matmul(name):
    with pytest.raises(LayoutError, match=r"matmul: .+; .+"):
        jq.matmul(*MATMULS[name])


GROUPED = {
    "integers": {"x": jnp.ones((4, IN), jnp.int32)},
    "codes": {"x": CODES},
    "a stacked weight": {"bank": BANK.parts[0]},
    "an array": {"bank": jnp.ones((4, OUT, IN))},
    "a stack of layers": {"bank": LAYERS},
    "a bank as a stack": {"bank": StackedBank(BANK, jnp.int32(0))},
    "a layer past the last": {"bank": StackedBank(LAYERS, jnp.int32(2))},
    "a layer before the first": {"bank": StackedBank(LAYERS, jnp.int32(-1))},
    "a fraction of a layer": {"bank": StackedBank(LAYERS, jnp.float32(1))},
    "fewer experts than the run": {"bank": changed(bank_of(FP8, 3), runs=(Run(0, 4),))},
    "a run that starts late": {
        "bank": changed(BANK, runs=(Run(2, 6),)),
        "group_sizes": jnp.array([0, 0, 1, 1, 1, 1], jnp.int32),
    },
    "no parts": {"bank": jq.ExpertBank((), ())},
    "experts of several widths": {
        "bank": jq.ExpertBank(
            (*BANK.parts, *bank_of(jq.quantize(W[:64], "fp8", ("out", "in"))).parts),
            (Run(0, 4), Run(4, 8)),
        ),
        "group_sizes": jnp.array([1, 1, 1, 1, 0, 0, 0, 0], jnp.int32),
    },
    "sizes as a list": {"group_sizes": [1, 1, 1, 1]},
    "sizes of floats": {"group_sizes": SIZES * 1.0},
    "sizes of bytes": {"group_sizes": SIZES.astype(jnp.uint8)},
    "negative sizes": {"group_sizes": jnp.array([-1, 3, 1, 1])},
    "too large sizes": {"group_sizes": SIZES * 2},
    "too small sizes": {"group_sizes": SIZES * 0},
    "a row past the last": {"source": jnp.array([0, 1, 2, 4], jnp.int32)},
    "a negative row": {"source": jnp.array([0, 1, 2, -1], jnp.int32)},
    "rows as a list": {"source": [0, 1, 2, 3]},
    "rows of nothing": {"x": X[:0], "source": jnp.arange(4)},
}


@pytest.mark.parametrize("name", GROUPED)
def test_wrong_operands_of_grouped_matmul(name):
    given = {"x": X, "bank": BANK, "group_sizes": SIZES} | GROUPED[name]
    with pytest.raises(LayoutError, match=r"grouped_matmul: .+; .+"):
        jq.grouped_matmul(**given)


NORM = jnp.ones(IN)
FUSED = {
    "a short norm": lambda: ops.rms_norm(X, jnp.ones(1), 1e-6),
    "a norm of two axes": lambda: ops.rms_norm(X, jnp.ones((4, IN)), 1e-6),
    "a norm of integers": lambda: ops.rms_norm(jnp.ones((4, IN), jnp.int32), NORM, 1e-6),
    "a norm of codes": lambda: ops.rms_norm_quantize(CODES, NORM, 1e-6, [FP8]),
    "a reader of other rows": lambda: ops.rms_norm_quantize(X[:, :128], NORM[:128], 1e-6, [FP8]),
    "one reader, no list": lambda: ops.rms_norm_quantize(X, NORM, 1e-6, FP8),
    "an array that reads": lambda: ops.rms_norm_quantize(X, NORM, 1e-6, [W]),
    "half a gate": lambda: ops.silu_mul_quantize(jnp.ones((4, IN + 1)), [FP8]),
    "a gate of other rows": lambda: ops.silu_mul_quantize(X, [FP8]),
    "a gate of integers": lambda: ops.silu_mul_quantize(jnp.ones((4, 2 * IN), jnp.int32), [FP8]),
    "a linear of an array": lambda: Linear(W),
    "a linear with a list": lambda: Linear(FP8, [1.0] * OUT),
    "a linear with wrong scales": lambda: Linear(changed(FP8, scales=(FP8.scales[0][:1],))),
}


@pytest.mark.parametrize("name", FUSED)
def test_wrong_operands_of_norms_gates_and_linears(name):
    with pytest.raises(LayoutError):
        FUSED[name]()
