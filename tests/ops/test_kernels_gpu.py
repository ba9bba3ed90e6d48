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
SHAPES = [(1024, 1024), (4096, 2048)]


@pytest.mark.parametrize("scheme", A8 + PACKED)
@pytest.mark.parametrize("rows", [1, 5, 16, 64, 200, 1024])
def test_kernel_on_the_device(scheme, rows):
    for shape in SHAPES:
        rng = np.random.default_rng(rows)
        w = rng.standard_normal(shape).astype(np.float32)
        x = jnp.asarray(rng.standard_normal((rows, shape[1])), jnp.bfloat16)
        q = jq.quantize(w, scheme, ("out", "in"))
        expected = np.asarray(jq.matmul(x, q, backend="xla").astype(jnp.float32))
        packed = prepare(q)
        ours = np.asarray(jax.jit(lambda x, q: jq.matmul(x, q, backend="pallas"))(x, packed))
        assert oracle.relative(ours, expected) < 6e-3
        automatic = jq.matmul(x, packed)
        assert oracle.relative(automatic, ours) < 1e-6, "auto takes the kernel"
        assert jq.explain(packed, batch=rows).rows[0].kernel != "xla"
        wrong = prepare(jq.quantize(w[::-1], scheme, ("out", "in")))
        assert oracle.relative(jq.matmul(x, wrong), expected) > 0.5


@pytest.mark.parametrize("scheme", ["fp8", "w8a8", "w4a16_g32"])
def test_the_bundled_model_on_the_device(scheme):
    bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
    model = jq.quantize_model(jq.from_pretrained(bundled), {r".*self_attn.*": scheme})
    tokens = np.load(bundled / "eval_tokens.npy")[:4096]
    with jq.backend("xla"):
        plain = jq.perplexity(model, tokens)
    assert abs(jq.perplexity(jq.prepare_model(model), tokens) / plain - 1) < 5e-3
