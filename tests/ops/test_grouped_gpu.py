"""grouped_matmul and a layer of experts on the device: kernels against the XLA path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.nn.moe import Experts
from jaxquant.nn.prepare import prepare_model
from jaxquant.ops.prepared_bank import prepare_bank
from jaxquant.transforms.experts import bank_experts, plan_experts
from tests.ops import oracle
from tests.ops.test_grouped_kernels import MIXED, bank_of, weight

pytestmark = pytest.mark.gpu
OUT, IN = 256, 512
UNIFORM = ("w4a16_g128", "w4a16_g64_asym", "w8a16", "fp8a16", "fp8", "fp8_b128", "w8a8", "static")


@pytest.mark.parametrize("kinds", [MIXED, *((kind,) * 8 for kind in UNIFORM)], ids=str)
def test_banks_on_the_device(kinds):
    bank = bank_of(kinds, (OUT, IN))
    packed = prepare_bank(bank)
    calls = {
        name: jax.jit(functools.partial(jq.grouped_matmul, backend=name))
        for name in ("xla", "pallas", "auto")
    }
    for count in (1, 50, 1000):
        rng = np.random.default_rng(count)
        x = jnp.asarray(rng.standard_normal((count, IN)), jnp.bfloat16)

        def run(name, weights, sizes, x=x):
            return np.asarray(calls[name](x, weights, sizes).astype(jnp.float32))

        for share in (rng.dirichlet(np.full(8, 0.5)), np.full(8, 1 / 8), np.eye(8)[count % 8]):
            sizes = jnp.asarray(rng.multinomial(count, share), jnp.int32)
            expected, got = run("xla", bank, sizes), run("pallas", packed, sizes)
            assert oracle.relative(got, expected) < 8e-3
            # Activations on a tie between two codes may be rounded either way; a row of a neighbour
            # or of nobody would be off by all of it.
            row = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert row.max() < 0.04
            np.testing.assert_array_equal(run("auto", packed, sizes), got)
            if count > 1 and sizes.max() < count:
                wrong = run("pallas", packed, jnp.roll(sizes, 1))
                assert oracle.relative(wrong, expected) > 0.1


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_a_mixed_layer_on_the_device(tokens):
    shapes = ((OUT, IN), (OUT, IN), (IN, OUT))
    columns = [
        [weight(kind, 10 * p + i, shape) for i, kind in enumerate(MIXED)]
        for p, shape in enumerate(shapes)
    ]
    plan = plan_experts(columns)
    gate, up, down = (bank_experts(plan, p, column.__getitem__) for p, column in enumerate(columns))
    experts = Experts((gate, up, down), plan, "silu")
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((tokens, IN)) / 8, jnp.bfloat16)
    ids = jnp.asarray([rng.permutation(8)[:2] for _ in range(tokens)], jnp.int32)
    weights = jnp.asarray(rng.random((tokens, 2)), jnp.float32)
    call = jax.jit(Experts.__call__)
    with jq.backend("xla"):
        expected = call(experts, x, ids, weights)
    got = call(prepare_model(experts), x, ids, weights)
    assert oracle.relative(got.astype(jnp.float32), expected.astype(jnp.float32)) < 2e-2
    with jq.backend("xla"):
        wrong = call(experts, x, (ids + 1) % 8, weights)
    assert oracle.relative(wrong.astype(jnp.float32), expected.astype(jnp.float32)) > 0.1
