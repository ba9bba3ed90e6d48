"""Activations that travel quantized, and linears of one input as one, through whole layers."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant import ops
from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import LayoutError
from jaxquant.models.decoder import DecoderLayer
from jaxquant.nn.attention import Attention, Heads, Step
from jaxquant.nn.basic import MLP, RMSNorm
from jaxquant.nn.joined import join_linears
from jaxquant.nn.mla import LatentAttention, LatentHeads
from jaxquant.nn.prepare import is_prepared, unprepare_model
from jaxquant.nn.rope import Rope
from jaxquant.nn.stack import Layers, stack_layers, unstack_layers
from jaxquant.ops import select
from jaxquant.ops.activations import as_rows, quantize_activation
from jaxquant.ops.joined import Part, cut, join
from tests.ops import oracle

HIDDEN, INNER, HEADS = 512, 512, Heads(query=4, kv=1, dim=128)
WIDE = (64, 512)  # the narrowest input that the kernels quantize
EPSILON = 1e-5
STATIC = ActSpec(CODES["e4m3"], "tensor", dynamic=False)


quantize = jax.jit(jq.quantize, static_argnums=(1, 2))


@functools.cache
def weight(scheme: str, shape: tuple[int, int] = (64, 128), seed: int = 0) -> QTensor:
    w = np.random.default_rng(seed).standard_normal(shape, np.float32) / shape[1] ** 0.5
    return quantize(w, scheme, ("out", "in"))


def static(q: QTensor, scale: float = 0.01) -> QTensor:
    return dataclasses.replace(q, act=STATIC, act_scale=jnp.full((1, 1), scale, jnp.float32))


def layer_of(scheme: str, seed: int = 0, biases: bool = False) -> DecoderLayer:
    """A decoder layer of Llama's or, with biases, of Qwen2's kind."""
    rng = np.random.default_rng(seed)
    wide, narrow = HEADS.query * HEADS.dim, HEADS.kv * HEADS.dim
    shapes = [(wide, HIDDEN), (narrow, HIDDEN), (narrow, HIDDEN), (HIDDEN, wide)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]

    def linear(i: int, shape: tuple[int, int]) -> jq.Linear:
        bias = jnp.asarray(rng.standard_normal(shape[0])) if biases and i < 3 else None
        return jq.Linear(weight(scheme, shape, 7 * seed + i), bias)

    q, k, v, o, gate, up, down = (linear(i, shape) for i, shape in enumerate(shapes))
    norms = [
        RMSNorm(jnp.asarray(rng.uniform(0.5, 2, HIDDEN), jnp.bfloat16), EPSILON) for _ in range(2)
    ]
    rope = Rope(HEADS.dim, 10000.0)
    return DecoderLayer(
        norms[0], Attention((q, k, v, o), HEADS, rope), norms[1], MLP(gate, up, down, "silu")
    )


def activation(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def run(layer: DecoderLayer, x: jax.Array, backend: Any) -> np.ndarray:
    """What the layer adds to its input, float64."""
    step = Step.at(layer.self_attn.rope, jnp.arange(x.shape[1])[None])
    with jq.backend(backend):
        y, _ = nnx.jit(lambda layer, x, step: layer(x, step, None))(layer, x, step)
    return np.asarray(y, np.float64) - np.asarray(x, np.float64)


def same(a: Any, b: Any) -> None:
    """Equal modules: same graph, same bytes."""
    assert nnx.split(a)[0] == nnx.split(b)[0]
    leaves = (jax.tree.leaves(nnx.state(module)) for module in (a, b))
    for one, other in zip(*leaves, strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def expected(layer: DecoderLayer, x: np.ndarray, order: str = "qkvgu") -> np.ndarray:
    """What a layer of block-scaled fp8 adds to ``x`` ``[token, hidden]``, in float64.

    ``order`` names the projections that stand for q, k, v, gate and up.
    """
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    linears = dict(q=attention.q_proj, k=attention.k_proj, v=attention.v_proj)
    linears |= dict(g=mlp.gate_proj, u=mlp.up_proj)
    q_of, k_of, v_of, gate_of, up_of = (linears[name] for name in order)

    def times(x: np.ndarray, linear: jq.Linear | None) -> np.ndarray:
        assert linear is not None
        y = oracle.group_e4m3(x) @ oracle.weight(linear.weight.get_value()).T
        return y if linear.bias is None else y + np.asarray(linear.bias.get_value(), np.float64)

    def norm(module: RMSNorm, x: np.ndarray) -> np.ndarray:
        weight = np.asarray(module.weight.get_value(), np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight

    def rotated(x: np.ndarray) -> np.ndarray:
        half = HEADS.dim // 2
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    tokens = len(x)
    normed = norm(layer.input_layernorm, x)
    q = rotated(times(normed, q_of).reshape(tokens, HEADS.query, HEADS.dim))
    k = rotated(times(normed, k_of).reshape(tokens, 1, HEADS.dim))[:, 0]
    v = times(normed, v_of)
    scores = np.einsum("thd,sd->hts", q, k) * HEADS.dim**-0.5
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hts,sd->thd", weights / weights.sum(-1, keepdims=True), v)
    attended = times(mixed.reshape(tokens, -1), attention.o_proj)
    normed = norm(layer.post_attention_layernorm, x + attended)
    gate, up = times(normed, gate_of), times(normed, up_of)
    return attended + times(gate / (1 + np.exp(-gate)) * up, mlp.down_proj)


@pytest.mark.interpret
def test_a_layer_of_kernels_against_the_oracle():
    layer, x = layer_of("fp8_b128", biases=True), activation(1, 3, HIDDEN)
    prepared = jq.prepare_model(layer)
    ours = run(prepared, x, "interpret")[0]
    wide = np.asarray(x[0], np.float64)
    # What is left are codes that rounding to bfloat16 flipped, each by up to an eighth.
    assert oracle.relative(ours, expected(layer, wide)) < 0.05
    for wrong in ("qvkgu", "qkvug"):
        assert oracle.relative(ours, expected(layer, wide, wrong)) > 0.3, wrong


def launches(text: str) -> int:
    """Kernel launches of a lowered program: a function that is called twice counts twice."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"\s*func\.func \w+ @(\w+)", line):
            body = bodies.setdefault(found[1], [])
        else:
            body.append(line)

    def count(name: str) -> int:
        lines = "\n".join(bodies[name])
        called = re.findall(r"\bcall @(\w+)\(", lines.replace("custom_call @", "custom "))
        return lines.count("custom_call @mosaic_gpu") + sum(map(count, called))

    return count("main")


def test_launches_of_a_decode_step():
    """Seven matmuls and four quantizations; joined, four and four."""
    layer, x = layer_of("fp8"), jax.ShapeDtypeStruct((2, 1, HIDDEN), jnp.bfloat16)

    def lowered(layer: DecoderLayer) -> str:
        def step(state: nnx.State, x: jax.Array) -> jax.Array:
            made = nnx.merge(graph, state)
            now = Step.at(made.self_attn.rope, jnp.full((2, 1), 7))
            return made(x, now, made.self_attn.empty_cache(2, 16, jnp.bfloat16))[0]

        graph, state = nnx.split(layer)
        with jq.backend("pallas"):
            return jax.jit(step).trace(state, x).lower(lowering_platforms=("cuda",)).as_text()

    assert launches(lowered(layer)) == 11
    assert launches(lowered(jq.prepare_model(layer))) == 8


def changed(scheme: str, **fields: Any) -> QTensor:
    return dataclasses.replace(weight(scheme), **fields)


SHARED = {
    "fp8": weight("fp8"),
    "fp8_b128": weight("fp8_b128"),
    "int8 127.5": changed("w8a8", act=ActSpec(CODES["int8"], levels=127.5)),
    "int8 asymmetric": changed("w8a8", act=ActSpec(CODES["int8"], symmetric=False)),
    "static": static(weight("fp8")),
    "act-order": changed("fp8_b128", perm=jnp.arange(128, dtype=jnp.int32)[::-1]),
}


@pytest.mark.parametrize("kind", SHARED)
def test_xla_takes_codes_in_the_layout_of_kernels(kind: str):
    q, x = SHARED[kind], activation(2, 3, 128)

    @functools.partial(jax.jit, static_argnums=2)
    def two_ways(x: jax.Array, q: QTensor, factor: float) -> tuple[jax.Array, jax.Array]:
        assert q.act is not None
        made = ops.QActivation.of(as_rows(quantize_activation(x, q), q.act), x, q.act)
        assert (made.shape, made.dtype) == (x.shape, x.dtype)
        made = dataclasses.replace(made, scale=made.scale * factor)
        return jq.matmul(made, q, backend="xla"), jq.matmul(x, q, backend="xla")

    np.testing.assert_array_equal(*two_ways(x, q, 1.0))
    if kind == "fp8":
        assert not np.array_equal(*two_ways(x, q, 1.01))


def test_a_process_with_a_gpu_may_compute_on_its_cpu(monkeypatch: pytest.MonkeyPatch):
    """Codes leave the norm and the gate on the XLA path too, with the bits of the dense values."""
    monkeypatch.setattr(select, "has_gpu", lambda: True)
    q, x, norm = weight("fp8", WIDE), activation(3, 512), jnp.asarray(np.linspace(0.5, 2, 512))

    @jax.jit
    def outputs(x: jax.Array, both: jax.Array) -> list[jax.Array]:
        normed = ops.rms_norm_quantize(x, norm, EPSILON, [q, q])
        gated = ops.silu_mul_quantize(both, [q])
        assert isinstance(normed, ops.QActivation) and isinstance(gated, ops.QActivation)
        gate, up = jnp.split(both, 2, axis=-1)
        dense = ops.rms_norm(x, norm, EPSILON), jax.nn.silu(gate) * up
        return [jq.matmul(value, q, backend="xla") for value in (normed, dense[0], gated, dense[1])]

    both = activation(3, 1024)
    normed, dense_normed, gated, dense_gated = outputs(x, both)
    np.testing.assert_array_equal(normed, dense_normed)
    np.testing.assert_array_equal(gated, dense_gated)
    swapped = outputs(x, jnp.roll(both, 512, axis=-1))[2]
    assert not np.allclose(swapped, gated, atol=1e-2)


def test_codes_are_shared_only_where_all_want_the_same():
    fp8, blocks, int8 = (weight(scheme, WIDE) for scheme in ("fp8", "fp8_b128", "w8a8"))
    smooth = dataclasses.replace(fp8, pre_scale=jnp.full((1, 512), 2.0))
    levels = dataclasses.replace(int8, act=ActSpec(CODES["int8"], levels=127.5))
    x, norm = activation(3, 512), jnp.ones(512)

    def normed(readers: list[QTensor], backend: ops.Backend = "pallas") -> Any:
        def op(x: jax.Array) -> Any:
            return ops.rms_norm_quantize(x, norm, EPSILON, readers, backend=backend)

        return jax.eval_shape(op, x)

    apart: list[list[QTensor]] = [[], [fp8, blocks], [fp8, smooth], [static(fp8), static(fp8)]]
    apart += [[levels, levels], [fp8, weight("w4a16_g64", WIDE)]]
    for readers in apart:
        assert isinstance(normed(readers), jax.ShapeDtypeStruct)
    assert isinstance(normed([fp8, fp8], "xla"), jax.ShapeDtypeStruct), "no kernel to save"
    assert isinstance(normed([static(fp8)]), ops.QActivation)
    made = normed([fp8, fp8])
    for q in (blocks, smooth, weight("bf16", WIDE)):
        with pytest.raises(LayoutError, match="e4m3 dynamic per token"):
            jq.matmul(made, q)
    casting = jq.Linear(fp8, dtype=jnp.float32)
    assert MLP(casting, jq.Linear(fp8), jq.Linear(fp8), "silu").reads() == ()


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_b128", "nvfp4a16"])
def test_joined_weights_come_back(scheme: str):
    weights = [weight(scheme, (128, 128), seed) for seed in range(2)]
    joined = join(weights)
    assert joined is not None and joined.shape == (256, 128)
    back = cut(joined, [Part(128, q.layout) for q in weights])
    for one, other in zip(weights, back, strict=True):
        assert one.layout == other.layout
        assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    swapped = cut(joined, [Part(128, q.layout) for q in weights])[::-1]
    assert not np.array_equal(swapped[0].data[0], weights[0].data[0])


def test_a_prepared_layer_computes_the_same_and_comes_back():
    layer, x = layer_of("fp8_tensor", biases=True), activation(1, 2, HIDDEN)
    prepared = jq.prepare_model(layer)
    names = {row.path for row in jq.explain(prepared).rows}
    assert names == {
        "mlp.down_proj.weight",
        "mlp.gate_up_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.qkv_proj.weight",
    }
    same(unprepare_model(prepared), layer)
    assert oracle.relative(run(prepared, x, "xla"), run(layer, x, "xla")) < 1e-6
    same(jq.prepare_model(prepared), prepared)


def test_latent_attention_reads_its_input_once():
    heads = LatentHeads(heads=2, nope=16, rope=16, value=16, latent=48, scale=0.2)
    shapes = ((128, 128), (64, 128), (64, 128))
    q_a, kv_a, q_b = (jq.Linear(weight("fp8", shape, i)) for i, shape in enumerate(shapes))
    kv_b, o = jq.Linear(weight("bf16", (64, 48))), jq.Linear(weight("bf16", (128, 32)))
    norms = [RMSNorm(jnp.linspace(0.5, 2, width), EPSILON) for width in (128, 48)]
    attention = LatentAttention(
        (q_a, norms[0], q_b), (kv_a, norms[1], kv_b), o, heads, Rope(16, 10000.0)
    )
    prepared = jq.prepare_model(attention)
    assert prepared.q_a_proj is None and prepared.kv_a_proj_with_mqa is None
    x, step = activation(1, 3, 128), Step.at(attention.rope, jnp.arange(3)[None])
    np.testing.assert_array_equal(prepared(x, step)[0], attention(x, step)[0])
    same(unprepare_model(prepared), attention)


def test_static_scales_are_joined_where_they_are_equal():
    q, k = (static(weight("fp8_tensor", seed=i)) for i in range(2))
    joined = join_linears([jq.Linear(q), jq.Linear(k)])
    assert joined is not None
    x = activation(3, 128)
    both = np.concatenate([jq.matmul(x, q), jq.matmul(x, k)], -1)
    np.testing.assert_array_equal(joined(x), both)
    other = jq.Linear(static(weight("fp8_tensor", seed=1), 0.02))
    assert join_linears([jq.Linear(q), other]) is None


def test_linears_that_differ_stay_apart():
    fp8, packed = weight("fp8"), weight("w4a16_g64")

    def apart(a: QTensor, b: QTensor) -> bool:
        return join([a, b]) is None

    assert not apart(fp8, fp8) and not apart(packed, packed)
    assert apart(fp8, packed), "another layout"
    assert apart(fp8, dataclasses.replace(fp8, act=None)), "other activations"
    assert apart(weight("bf16"), weight("bf16")), "XLA's own matmul"
    assert apart(weight("w3a16_g64"), weight("w3a16_g64")), "no kernel"
    blocks = weight("fp8_b128", (192, 128))
    assert apart(blocks, blocks), "a block would cross the seam"
    orders = [jnp.arange(128, dtype=jnp.int32), jnp.arange(128, dtype=jnp.int32)[::-1]]
    sorted_, turned = (dataclasses.replace(packed, perm=perm) for perm in orders)
    assert not apart(sorted_, sorted_) and apart(sorted_, turned), "act-orders"
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    placed = jax.device_put(fp8, NamedSharding(mesh, PartitionSpec()))
    assert apart(placed, placed), "on several devices"
    assert join_linears([jq.Linear(fp8, jnp.ones(64)), jq.Linear(fp8)]) is None, "one bias"


def test_a_stack_of_joined_linears_comes_back():
    def mlp(seed: int) -> MLP:
        weights = [weight("fp8_tensor", (128, 128), 3 * seed + i) for i in range(3)]
        gate, up, down = (jq.Linear(q, jnp.full(128, seed)) for q in weights)
        return MLP(gate, up, down, "silu")

    layers = Layers([mlp(0), mlp(1)])
    stacked = stack_layers(jq.prepare_model(layers))
    (only,) = stacked.layers
    assert isinstance(only, MLP) and only.gate_up_proj is not None
    assert is_prepared(stacked) and not is_prepared(layers)
    same(unstack_layers(unprepare_model(stacked)), layers)
