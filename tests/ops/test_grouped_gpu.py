"""grouped_matmul and a layer of experts on the device: kernels against the XLA path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
import pallas_kernels as pk
from jaxquant.arrays.bank import StackedBank
from jaxquant.nn.moe import Experts
from jaxquant.nn.prepare import prepare_model
from jaxquant.ops.prepared_bank import prepare_bank
from jaxquant.transforms.experts import bank_experts, plan_experts
from tests.ops import oracle
from tests.ops.test_grouped_kernels import MIXED, bank_of, weight

pytestmark = pytest.mark.gpu
OUT, IN = 256, 512
UNIFORM = (
    "w4a16_g128",
    "w4a16_g64_asym",
    "w8a16",
    "fp8a16",
    "fp8",
    "fp8_b128",
    "w8a8",
    "static",
    "bf16",
)


# GPTQ and AWQ in a layer with fp8: the first two are one run.
KIN = ("w4a16_g128", "fp8_b128", "w4a16_g128_asym", "w4a16_g128") * 2


@pytest.mark.parametrize("kinds", [MIXED, KIN, *((kind,) * 8 for kind in UNIFORM)], ids=str)
def test_banks_on_the_device(kinds):
    bank = bank_of(kinds, (OUT, IN))
    packed = prepare_bank(bank)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf[::-1], leaf]), packed)
    stacked = StackedBank(stack, jnp.int32(1))
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
            np.testing.assert_array_equal(run("pallas", stacked, sizes), got)
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


def test_rows_survive_what_xla_does_to_slices():
    """XLA fuses slices that a call reads into it; the rows of the array it takes over must stay."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((50, IN)), jnp.bfloat16)
    stack = jnp.asarray(rng.standard_normal((3, 4, OUT, IN)), jnp.bfloat16)
    sizes = jnp.asarray((5, 0, 9, 11, 3, 7, 8, 7), jnp.int32)
    matmul = pk.grouped_matmul_dense

    def looped(x, stack, sizes):
        """Into a slice of a loop's result."""

        def body(i, rows):
            return lax.dynamic_update_slice_in_dim(rows, jnp.full((8, OUT), i, x.dtype), 3 * i, 0)

        made = lax.fori_loop(1, sizes[0], body, jnp.zeros((58, OUT), x.dtype))
        return matmul(x, stack[0], sizes, first=4, into=made[:50])

    def scanned(x, stack, sizes):
        """Of weights that a loop cuts out of a stack."""

        def body(total, w):
            y = matmul(x, w[:2], sizes, first=0)
            y = matmul(x, w[2:], sizes, first=2, into=y)
            return total + matmul(x, w, sizes, first=4, into=y), None

        return lax.scan(body, jnp.zeros((50, OUT), x.dtype), stack)[0]

    def plain(w):
        owner = np.repeat(np.arange(8) % 4, np.asarray(sizes))
        return np.einsum("rk,rnk->rn", np.asarray(x, np.float64), np.asarray(w, np.float64)[owner])

    made = np.zeros((50, OUT))
    for i in range(1, 5):
        made[3 * i : 3 * i + 8] = i
    made[25:] = plain(stack[0])[25:]
    for call, expected in ((looped, made), (scanned, sum(map(plain, stack)))):
        got = np.asarray(jax.jit(call)(x, stack, sizes), np.float64)
        row = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected + 1e-9, axis=1)
        assert row.max() < 0.02, (call.__name__, np.flatnonzero(row > 0.02))
