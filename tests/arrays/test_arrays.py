"""Codes, schemes and QTensors on their own."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import Layout
from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.arrays.scheme import ActSpec, Scheme
from jaxquant.errors import ConfigError, KernelError, LayoutError, PlanError
from jaxquant.transforms.numeric import encode_values, power_of_two_scale, quantize

NAMES = (
    "bf16 f16 f32 fp8 fp8_tensor fp8_b128 fp8a16 w8a8 w8a8_b128 nvfp4 nvfp4a16 mxfp4 mxfp4a16 "
    "mxfp8 mxfp8a16 w4a16_g128 w4a16 w4a16_g32_asym w8a16 w8a16_g64 w4a8_g128 w4afp8_g32 "
    "w3a16_g64 w2a16_asym"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_scheme_names_round_trip(name):
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert Scheme.parse(scheme) is scheme
    assert hash(scheme) == hash(Scheme.parse(name))


@pytest.mark.parametrize(
    "name", ["int5", "w9a16", "w4a16_g12", "w4a16_g0", "fp8_b64x", "", "W4A16"]
)
def test_unknown_schemes_are_refused(name):
    with pytest.raises(ConfigError) as caught:
        Scheme.parse(name)
    assert caught.value.where == "scheme"


def test_planes_add_up_to_the_bits():
    for code in CODES.values():
        assert sum(code.planes) == code.bits
        assert code.bits >= 8 or all(8 % width == 0 for width in code.planes)


def test_e2m1_rounds_ties_to_even_and_saturates():
    ties = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 100.0])
    table = np.array(CODES["e2m1"].table)
    for sign in (1, -1):
        decoded = table[np.asarray(encode_values(sign * ties, CODES["e2m1"]))]
        assert (sign * decoded).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6]
    everything = np.linspace(-7, 7, 2001).astype(np.float32)
    ours = table[np.asarray(encode_values(jnp.asarray(everything), CODES["e2m1"]))]
    theirs = everything.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(ours, theirs)


def test_fp8_saturates_instead_of_nan():
    codes = encode_values(jnp.array([1e4, -1e4, 464.0, jnp.inf]), CODES["e4m3"])
    assert codes.astype(jnp.float32).tolist() == [448, -448, 448, 448]


def test_power_of_two_scale_is_the_ocp_exponent():
    amax = jnp.array([6.0, 4.0, 7.99, 8.0, 0.3, 0.0])
    expected = [1, 1, 1, 2, 2.0**-4]
    assert power_of_two_scale(amax, CODES["e2m1"]).tolist()[:5] == expected
    assert power_of_two_scale(amax, CODES["e2m1"]).tolist()[5] > 0


@pytest.mark.parametrize(
    "scheme,limit",
    [("fp8", 0.028), ("fp8_b128", 0.028), ("w8a8", 0.008), ("w4a16_g32", 0.10), ("nvfp4", 0.11)],
)
def test_round_to_nearest_error_is_that_of_the_format(scheme, limit):
    w = np.random.default_rng(0).standard_normal((256, 320)).astype(np.float32)
    from jaxquant.transforms.numeric import dequantize

    q = quantize(w, scheme)
    error = np.linalg.norm(dequantize(q, axes=("in", "out")) - w) / np.linalg.norm(w)
    assert limit / 3 < error < limit


def test_quantize_refuses_groups_that_do_not_divide():
    with pytest.raises(ConfigError, match="must divide"):
        quantize(np.zeros((100, 64), np.float32), "w4a16_g32")
    with pytest.raises(LayoutError, match="'in' and 'out'"):
        quantize(np.zeros((64, 64), np.float32), "fp8", ("rows", "columns"))


def test_qtensor_is_a_pytree_with_a_static_layout():
    q = quantize(np.ones((64, 32), np.float32), "w4a16_g32")
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).layout == q.layout
    other = jax.tree.structure(quantize(np.ones((64, 32), np.float32), "w4a16_g64"))
    assert tree != other
    assert q.shape == (64, 32) and q.extent("in") == 64 and q.bits_per_weight == 4.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.data = ()


def test_layouts_that_break_the_rules_are_refused():
    code = CODES["int4"]
    with pytest.raises(LayoutError, match="rank"):
        Layout(("out", "in"), code, ((1, 2, 1),))
    with pytest.raises(LayoutError, match="to a byte"):
        Layout(("out", "in"), code, ((1, 4),))
    with pytest.raises(LayoutError, match="zero leaves"):
        Layout(("out", "in"), code, ((1, 2),), ((1, 32),), (), "zero_point")
    with pytest.raises(LayoutError, match="float32, float16 or bfloat16"):
        dense(np.zeros((2, 2), np.int32))


def test_static_activations_need_their_scale():
    q = quantize(np.ones((64, 32), np.float32), "fp8")
    static = ActSpec(CODES["e4m3"], "tensor", dynamic=False)
    with pytest.raises(LayoutError, match="act_scale"):
        dataclasses.replace(q, act=static).check("layers.0.q_proj")
    with pytest.raises(ConfigError, match="set together"):
        ActSpec(CODES["e4m3"], "group")


def test_errors_carry_their_parts():
    error = LayoutError("layers.0", "found", "rule", "action")
    assert (error.where, error.found, error.rule, error.action) == (
        "layers.0",
        "found",
        "rule",
        "action",
    )
    assert str(error) == "layers.0: found; rule; action"
    assert PlanError("plan", ["a", "b"]).problems == ("a", "b")
    assert "wgmma: no" in str(KernelError("matmul", [("wgmma", "no")]))
    assert isinstance(error, ValueError)


def test_repr_says_what_it_is():
    q = quantize(np.ones((64, 32), np.float32), "w4afp8_g32")
    assert repr(q) == "QTensor([64, 32] int4[in,out] scale 32x1, act e4m3 dynamic per token)"
    assert isinstance(q, QTensor)
