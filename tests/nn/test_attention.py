"""Latent attention in both forms, the fp8 cache, rotary configs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import ConfigError
from jaxquant.models import ModelConfig, build_model
from jaxquant.nn.attention import Step, attend
from jaxquant.nn.cache import empty_entry, read, write
from jaxquant.nn.linear import Linear, QWeight
from jaxquant.nn.rope import Rope, frequencies
from jaxquant.nn.stack import stack_layers
from jaxquant.transforms.numeric import dequantize, quantize
from tests.small_models import CONFIGS, random_tensors, small_model, split_tensors


def relative(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("scheme", ["f32", "fp8a16", "w4a16_g8", "w4a16_asym"])
def test_plain_and_absorbed_forms_agree(scheme: str):
    attention = small_model("deepseek-v3-yarn").model.layers[0].self_attn
    kv_b = attention.kv_b_proj
    quantized: QTensor = quantize(dequantize(kv_b.weight.get_value()), scheme, ("out", "in"))
    kv_b.weight = QWeight(quantized)
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    step = Step.at(attention.rope, jnp.broadcast_to(jnp.arange(9), (2, 9)))
    plain, _ = attention(x, step, absorbed=False)
    absorbed, _ = attention(x, step, absorbed=True)
    assert relative(absorbed, plain) < 1e-5
    # The expansion matters: another kv_b gives another output.
    kv_b.weight = QWeight(jax.tree.map(lambda a: a[::-1], quantized))
    assert relative(attention(x, step, absorbed=True)[0], plain) > 0.1


@pytest.mark.parametrize("extra", ["pre_scale", "bias"])
def test_the_absorbed_form_has_all_of_the_expansion(extra: str):
    attention = small_model("deepseek-v3-yarn").model.layers[0].self_attn
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    step = Step.at(attention.rope, jnp.broadcast_to(jnp.arange(9), (2, 9)))
    without, _ = attention(x, step, absorbed=False)
    kv_b, rng = attention.kv_b_proj, np.random.default_rng(1)
    q = kv_b.weight.get_value()
    if extra == "bias":
        attention.kv_b_proj = Linear(q, jnp.asarray(rng.normal(size=q.shape[0]), jnp.float32))
    else:
        pre_scale = jnp.asarray(rng.uniform(0.5, 2, (1, q.shape[1])), jnp.float32)
        kv_b.weight = QWeight(dataclasses.replace(q, pre_scale=pre_scale))
    plain, _ = attention(x, step, absorbed=False)
    assert relative(plain, without) > 0.1
    assert relative(attention(x, step, absorbed=True)[0], plain) < 1e-5


@pytest.mark.parametrize("tokens", [8, 9, 16])
def test_long_prompts_go_in_blocks_of_queries(tokens: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, tokens, heads, 4)), jnp.float32) for heads in (4, 2, 2)
    )
    positions = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
    mask = Step(positions, q, q).mask(None, 5)
    whole = attend(q, k, v, mask, 0.5)
    monkeypatch.setattr("jaxquant.nn.attention.QUERY_BLOCK", 4)
    assert np.allclose(attend(q, k, v, mask, 0.5), whole, atol=1e-6)


def test_cache_rows_are_written_at_positions_and_dropped_past_the_end():
    entry = empty_entry(2, 4, 1, 3, jnp.float32)
    values = jnp.arange(12, dtype=jnp.float32).reshape(2, 2, 1, 3) + 1
    entry = write(entry, values, jnp.asarray([[0, 3], [2, 4]], jnp.int32))
    rows = np.asarray(read(entry, 4, jnp.float32))[:, :, 0, 0]
    assert rows.tolist() == [[1, 0, 0, 4], [0, 0, 7, 0]]
    assert np.array_equal(read(entry, 2, jnp.float32)[:, :, 0, 0], rows[:, :2])


@pytest.mark.parametrize("scale", [[0.5], [0.5, 0.25]])
def test_fp8_cache_codes(scale: list[float]):
    entry = empty_entry(1, 2, 2, 4, jnp.bfloat16, jnp.asarray(scale))
    assert entry.data[0].dtype == jnp.float8_e4m3fn
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 4)) * 50, jnp.float32)
    back = read(write(entry, values, jnp.asarray([[0, 1]], jnp.int32)), 2, jnp.float32)
    per_head = np.resize(np.asarray(scale), 2)[None, None, :, None]
    expected = (np.asarray(values) / per_head).clip(-448, 448)
    expected = expected.astype(jnp.float8_e4m3fn).astype(np.float32) * per_head
    assert np.array_equal(back, expected)


def fp8_cache_model(k_scale: object, v_scale: object) -> nnx.Module:
    config = ModelConfig.from_hf(CONFIGS["llama"])
    weights, arrays = split_tensors(random_tensors(config))
    for i in range(config.num_layers):
        arrays[f"model.layers.{i}.self_attn.k_scale"] = np.asarray(k_scale, np.float32)
        arrays[f"model.layers.{i}.self_attn.v_scale"] = np.asarray(v_scale, np.float32)
    return build_model(config, weights, arrays, dtype=jnp.float32)


def test_fp8_cache_model_is_the_same_with_and_without_a_cache():
    model = fp8_cache_model(0.02, [0.03])
    ids = np.random.default_rng(0).integers(0, 64, (2, 10)).astype(np.int32)
    full = model(ids)
    step = nnx.jit(lambda m, ids, at, cache: m.step(ids, at, cache))
    cache = model.empty_cache(2, 12)
    assert cache.layers[0][0].data[0].dtype == jnp.float8_e4m3fn
    parts = []
    for start, stop in ((0, 5), (5, 10)):
        at = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, 5))
        logits, cache = step(model, jnp.asarray(ids[:, start:stop]), at, cache)
        parts.append(logits)
    assert np.abs(np.concatenate(parts, 1) - full).max() < 1e-3
    # The codes are felt, and so is a wrong scale.
    exact = small_model("llama")(ids)
    assert 1e-3 < relative(full, exact) < 0.1
    assert relative(fp8_cache_model(2.0, 3.0)(ids), full) > 0.02


def prompt_step(model: nnx.Module, capacity: int, fresh: bool):
    """A prompt of 9 tokens and one token more: logits and caches."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 10)), jnp.int32)

    @nnx.jit
    def run(model, ids):
        at = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
        cache = model.empty_cache(2, capacity)
        prompt, cache = model.step(ids[:, :9], at, cache, fresh=fresh)
        return prompt, cache, model.step(ids[:, 9:], at[:, :1] + 9, cache)[0]

    return run, ids


@pytest.mark.parametrize("name", ["mistral-window", "deepseek-v3-yarn", "fp8 cache"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_prompt_looks_at_its_own_rows_of_the_cache_only(name: str, stacked: bool):
    model = fp8_cache_model(0.02, 0.03) if name == "fp8 cache" else small_model(name)
    model = stack_layers(model) if stacked else model
    (fresh, ids), (whole, _) = (prompt_step(model, 24, value) for value in (True, False))
    for got, want in zip(
        jax.tree.leaves(fresh(model, ids)), jax.tree.leaves(whole(model, ids)), strict=True
    ):
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=1e-5)

    def work(capacity: int, value: bool) -> float:
        run, ids = prompt_step(model, capacity, value)
        prompt = nnx.jit(lambda model, ids: run(model, ids)[0])
        return prompt.lower(model, ids).cost_analysis()["flops"]

    more = {value: work(2048, value) - work(16, value) for value in (True, False)}
    assert more[True] < 0.3 * more[False]


def test_per_head_scales_of_attn_head_strategy():
    heads = np.asarray([0.02, 0.02], np.float32).reshape(2, 1, 1)
    ids = np.random.default_rng(0).integers(0, 64, (1, 6)).astype(np.int32)
    assert np.array_equal(fp8_cache_model(heads, heads)(ids), fp8_cache_model(0.02, 0.02)(ids))


def test_rope_config_spellings():
    old = Rope.from_hf({"rope_theta": 5e5, "max_position_embeddings": 64}, 8)
    new = Rope.from_hf(
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "max_position_embeddings": 64,
        },
        8,
    )
    assert old == new
    legacy = Rope.from_hf({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8)
    assert np.allclose(frequencies(legacy), frequencies(dataclasses.replace(legacy, factor=1)) / 2)
    assert Rope.from_hf({"partial_rotary_factor": 0.5}, 8).dim == 4


def test_rope_errors():
    with pytest.raises(ConfigError, match="spiral"):
        Rope.from_hf({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, 8)
    with pytest.raises(ConfigError, match="low_freq_factor"):
        scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
        Rope.from_hf({"rope_scaling": scaling}, 8)
