"""matmul on the device: every scheme through its kernel against the XLA path, and a whole model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.ops.prepared import prepare
from tests.ops import oracle
from tests.ops.test_kernels import A8, PACKED

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme", A8 + PACKED)
@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 2048)], ids=str)
def test_kernel_on_the_device(scheme, shape):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape, np.float32)
    q = jq.quantize(w, scheme, ("out", "in"))
    packed, wrong = prepare(q), prepare(jq.quantize(w[::-1], scheme, ("out", "in")))
    pallas = jax.jit(lambda x, q: jq.matmul(x, q, backend="pallas"))
    xla = jax.jit(lambda x, q: jq.matmul(x, q, backend="xla"))
    for rows in (1, 5, 64, 200, 1024):
        x = jnp.asarray(rng.standard_normal((rows, shape[1]), np.float32), jnp.bfloat16)
        expected, ours = np.asarray(xla(x, q), np.float32), pallas(x, packed)
        assert oracle.relative(np.asarray(ours, np.float32), expected) < 6e-3, rows
        assert jq.explain(packed, batch=rows).rows[0].kernel != "xla"
        other = np.asarray(pallas(x, wrong), np.float32)
        assert oracle.relative(other, expected) > 0.5, rows
    automatic = jax.jit(jq.matmul)(x, packed)
    assert (np.asarray(automatic) == np.asarray(ours)).all(), "auto takes the kernel"


@pytest.mark.parametrize("scheme", ["fp8", "w4a16_g32"])
def test_the_bundled_model_on_the_device(scheme):
    bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
    model = jq.quantize_model(jq.from_pretrained(bundled), {r".*self_attn.*": scheme})
    tokens = np.load(bundled / "eval_tokens.npy")[:4096]
    with jq.backend("xla"):
        plain = jq.perplexity(model, tokens)
    assert abs(jq.perplexity(jq.prepare_model(model), tokens) / plain - 1) < 5e-3
