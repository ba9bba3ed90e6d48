"""matmul of every scheme against the float64 oracle, with a negative control for each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant.ops as ops
from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import ConfigError, KernelError, LayoutError
from jaxquant.ops.activations import quantize_activation
from jaxquant.transforms.leading import stack
from jaxquant.transforms.numeric import dequantize, quantize
from jaxquant.transforms.structure import to_axes
from tests.ops import oracle

ACTS = {
    "fp8": oracle.token_e4m3,
    "fp8_tensor": oracle.token_e4m3,
    "fp8_b128": oracle.group_e4m3,
    "w8a8": oracle.token_int8,
    "w8a8_b128": oracle.group_int8,
    "w4a8_g64": oracle.token_int8,
    "w4afp8_g32": oracle.token_e4m3,
}
WEIGHT_ONLY = ["f32", "fp8a16", "w4a16_g32", "w4a16_g64_asym", "w4a16", "w8a16_g64", "w3a16_g64"]
WEIGHT_ONLY += [
    "w2a16_g32_asym",
    "w5a16_g64",
    "w6a16",
    "w7a16_g64",
    "nvfp4a16",
    "mxfp4a16",
    "mxfp8a16",
]
SHAPE = (192, 576)
_quantize = jax.jit(quantize, static_argnames=("scheme", "axes"))
_matmul = jax.jit(ops.matmul)


def case(scheme, seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32) * rng.lognormal(size=(shape[0], 1)).astype(
        np.float32
    )
    x = rng.standard_normal((13, shape[1])).astype(np.float32)
    x[:, 7] *= 20
    return x, _quantize(w, scheme, ("out", "in"))


@pytest.mark.parametrize("scheme", [*ACTS, *WEIGHT_ONLY])
def test_matmul_against_float64(scheme):
    x, q = case(scheme)
    seen = ACTS.get(scheme, lambda a: a)(x.astype(np.float64))
    expected = seen @ oracle.weight(q).T
    y = _matmul(x, q)
    assert y.dtype == jnp.float32 and y.shape == (13, SHAPE[0])
    # A code that sits on a rounding boundary may fall either way in float32; it is rare.
    tolerance = 2e-3 if scheme in ACTS else 1e-6
    assert oracle.relative(y, expected) < tolerance
    turned = _matmul(x, to_axes(q, ("in", "out")))
    assert oracle.relative(turned, expected) < tolerance
    half = _matmul(jnp.asarray(x, jnp.bfloat16), q)
    assert half.dtype == jnp.bfloat16 and oracle.relative(half.astype(jnp.float32), expected) < 0.02


@pytest.mark.parametrize("scheme", [*ACTS, *WEIGHT_ONLY])
def test_a_broken_weight_is_noticed(scheme):
    x, q = case(scheme)
    seen = ACTS.get(scheme, lambda a: a)(x.astype(np.float64))
    expected = seen @ oracle.weight(q).T
    if q.scales:
        leaf = q.scales[0]
        axis = 0 if leaf.shape[0] > 1 else 1
        rolled = (
            jnp.roll(leaf.astype(jnp.float32), 1, axis).astype(leaf.dtype)
            if leaf.size > 1
            else leaf * 2
        )
        broken = dataclasses.replace(q, scales=(rolled, *q.scales[1:]))
    else:
        broken = dataclasses.replace(q, data=(jnp.roll(q.data[0], 1, 0),))
    assert oracle.relative(ops.matmul(x, broken), expected) > 5e-3


def with_act(scheme, spec, **leaves):
    x, q = case(scheme)
    leaves = {name: jnp.full((1, 1), value, jnp.float32) for name, value in leaves.items()}
    return x, dataclasses.replace(q, act=spec, **leaves).check()


def test_static_per_tensor_fp8():
    spec = ActSpec(CODES["e4m3"], "tensor", dynamic=False)
    x, q = with_act("fp8_tensor", spec, act_scale=0.01)
    seen = oracle.round_e4m3(x.astype(np.float64) / np.float32(0.01)) * np.float32(0.01)
    expected = seen @ oracle.weight(q).T
    assert np.abs(x).max() / 0.01 > 448, "saturation is part of the case"
    assert oracle.relative(ops.matmul(x, q), expected) < 1e-5
    with pytest.raises(LayoutError, match="static activations without act_scale"):
        dataclasses.replace(q, act_scale=None).check()


def test_static_asymmetric_int8_has_the_zero_point_correction():
    spec = ActSpec(CODES["int8"], "tensor", dynamic=False, symmetric=False)
    x, q = with_act("w8a8", spec, act_scale=0.05, act_zero=-31)
    scale = float(np.float32(0.05))
    codes = np.clip(np.round(x.astype(np.float64) / scale - 31), -128, 127)
    expected = (codes + 31) * scale @ oracle.weight(q).T
    assert oracle.relative(ops.matmul(x, q), expected) < 1e-5
    uncorrected = codes * scale @ oracle.weight(q).T
    assert oracle.relative(uncorrected, expected) > 0.05


def test_dynamic_asymmetric_int8():
    x, q = with_act("w8a8", ActSpec(CODES["int8"], symmetric=False))
    x = np.abs(x)
    expected = oracle.token_int8_asymmetric(x.astype(np.float64)) @ oracle.weight(q).T
    assert oracle.relative(ops.matmul(x, q), expected) < 2e-3
    assert (
        oracle.relative(oracle.token_int8(x.astype(np.float64)) @ oracle.weight(q).T, expected)
        > 2e-3
    )


def test_codes_minus_zero_points_leave_int8(monkeypatch):
    """Other devices than CPUs multiply operands of 8 bits."""

    def other_device(*operands, default, **_):
        return default(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", other_device)
    x, q = case("w8a16_asym")
    code, zeros = CODES["int8"], np.asarray(q.zeros[0], np.int16) - 128
    data = np.asarray(q.data[0], np.int16) - 128
    assert np.abs(data - zeros).max() > 127
    q = dataclasses.replace(
        q,
        data=(data.astype(np.int8),),
        zeros=(zeros.astype(np.int8),),
        layout=dataclasses.replace(q.layout, code=code),
        act=ActSpec(code),
    ).check()
    expected = oracle.token_int8(x.astype(np.float64)) @ oracle.weight(q).T
    assert oracle.relative(ops.matmul(jnp.asarray(x), q), expected) < 1e-5


def test_act_order_gathers_the_activations():
    x, q = case("w4a16_g64_asym")
    perm = np.random.default_rng(3).permutation(SHAPE[1]).astype(np.int32)
    q = dataclasses.replace(q, perm=jnp.asarray(perm))
    assert (
        oracle.relative(jax.jit(ops.matmul)(x, q), x.astype(np.float64) @ oracle.weight(q).T) < 1e-6
    )
    static = dataclasses.replace(q, act=ActSpec(CODES["int8"]))
    expected = oracle.token_int8(x.astype(np.float64)) @ oracle.weight(q).T
    assert oracle.relative(ops.matmul(x, static), expected) < 2e-3


def test_pre_scale_multiplies_the_activation_first():
    x, q = case("w4a16_g64")
    pre = np.random.default_rng(4).uniform(0.5, 2, (1, SHAPE[1])).astype(np.float32)
    q = dataclasses.replace(q, pre_scale=jnp.asarray(pre)).check()
    assert (
        oracle.relative(ops.matmul(x, q), (x * pre).astype(np.float64) @ oracle.weight(q).T) < 1e-6
    )


def test_zero_rows_give_zeros_not_nan():
    for scheme in ACTS:
        _, q = case(scheme)
        assert not np.asarray(ops.matmul(jnp.zeros((3, SHAPE[1])), q)).any()


@pytest.mark.parametrize("scheme", [*ACTS, "w4a16_g64", "w4a16_g64_asym", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("largest", [1e-35, 1e-36, 3e-38])
def test_rows_and_cells_whose_scale_would_be_subnormal(scheme, largest):
    """Divided by the largest code they leave the normal numbers, which devices flush to zero."""
    x, q = case(scheme)
    assert np.isfinite(np.asarray(_matmul(x * np.float32(largest / np.abs(x).max()), q))).all()
    weight = np.asarray(dequantize(q))
    tiny = weight * np.float32(largest / np.abs(weight).max())
    tiny_q = _quantize(tiny, scheme, ("out", "in"))
    error = np.abs(np.asarray(dequantize(tiny_q)) - tiny).max()
    assert error <= max(np.abs(tiny).max() / 4, 448 * 2.0**-126)
    assert np.isfinite(np.asarray(_matmul(x, tiny_q))).all()


@pytest.mark.parametrize("scheme", [*ACTS, "nvfp4", "mxfp4", "mxfp8"])
def test_rows_do_not_depend_on_each_other(scheme):
    x, q = case(scheme)
    loud = np.concatenate([x[:3], 1e4 * x[3:]])
    for beside in (loud, x[:3]):
        np.testing.assert_array_equal(
            quantize_activation(jnp.asarray(beside), q).dequantize()[:3],
            quantize_activation(jnp.asarray(x), q).dequantize()[:3],
        )


def test_asymmetric_rows_whose_scale_would_be_subnormal():
    act = ActSpec(CODES["int8"], symmetric=False)
    x, q = case("w8a8")
    tiny = x * np.float32(1e-36 / np.abs(x).max())
    assert np.isfinite(np.asarray(_matmul(tiny, dataclasses.replace(q, act=act)))).all()


def test_no_dense_weight_leaves_the_program():
    _, q = case("w4a16_g64")
    closed = jax.make_jaxpr(ops.matmul)(jnp.zeros((4, SHAPE[1])), q)
    assert [v.aval.shape for v in closed.jaxpr.outvars] == [(4, SHAPE[0])]
    compiled = jax.jit(ops.matmul).lower(jnp.zeros((4, SHAPE[1])), q).compile()
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments < SHAPE[0] * SHAPE[1] + 4 * 4 * SHAPE[1]


def test_bad_shapes_are_named():
    x, q = case("fp8")
    with pytest.raises(LayoutError, match="in = 576"):
        ops.matmul(x[:, :-1], q)
    with pytest.raises(LayoutError, match="no leading axes"):
        ops.matmul(x, stack([q, q]))


def test_backend_is_part_of_the_jit_key_and_strict():
    x, q = case("fp8")
    run = jax.jit(lambda a: ops.matmul(a, q))
    run(x)
    with ops.backend("pallas"), pytest.raises(KernelError) as caught:
        run(x)
    assert caught.value.reasons
    with pytest.raises(ConfigError, match="no such backend"):
        ops.matmul(x, q, backend="triton")
    with pytest.raises(ConfigError), ops.backend("cuda"):
        pass
