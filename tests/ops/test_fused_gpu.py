"""A whole decoder layer on the device: fused and joined kernels against the XLA path."""

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models.decoder import DecoderLayer
from jaxquant.nn.attention import Attention
from jaxquant.nn.basic import MLP
from tests.nn.test_fused import HIDDEN, activation, layer_of, run, static
from tests.ops import oracle

pytestmark = pytest.mark.gpu


def layer_with(scheme: str, order: str = "gate up") -> DecoderLayer:
    """A layer of Qwen2's kind; "static" quantizes what q, k, v, gate and up read by one scale."""
    layer = layer_of("fp8_tensor" if scheme == "static" else scheme, biases=True)
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    if order == "up gate":
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    if scheme == "static":
        shared = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        for linear in shared:
            assert linear is not None
            linear.weight.set_value(static(linear.weight.get_value(), 0.02))
    return layer


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("scheme", ["fp8", "fp8_b128", "static", "w8a8", "w4a16_g128"])
def test_a_prepared_layer_on_the_device(scheme: str, tokens: int):
    x = activation(1, tokens, HIDDEN)
    prepared = jq.prepare_model(layer_with(scheme))
    assert len(jq.explain(prepared).rows) == 4, "joined"
    expected, got = run(layer_with(scheme), x, "xla"), run(prepared, x, "auto")
    # Rounding of the norm to bfloat16 flips codes of the activations, each by up to an eighth.
    assert oracle.relative(got, expected) < 0.08
    np.testing.assert_array_equal(run(prepared, x, "pallas"), got)
    wrong = run(jq.prepare_model(layer_with(scheme, "up gate")), x, "auto")
    assert oracle.relative(wrong, expected) > 0.3
