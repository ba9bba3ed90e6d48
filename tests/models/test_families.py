"""Every family against transformers' logits, and cached decoding against the full pass."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxquant.models import CausalLM
from jaxquant.nn import Cache
from tests.small_models import CONFIGS, small_model

GOLDEN = load_file(Path(__file__).parent / "golden" / "families.safetensors")
IDS = GOLDEN["input_ids"]

# Per-row lengths enter these rotations, so decoding step by step rotates early keys otherwise; the
# reference implementations differ between the two in the same way.
LENGTH_DEPENDENT = ("llama-dynamic", "llama-longrope")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str):
    logits = np.asarray(small_model(name)(IDS))
    assert np.abs(logits - GOLDEN[name]).max() < 2e-4
    # The reference is no constant: another seed's model is far away.
    assert np.abs(np.asarray(small_model(name, seed=1)(IDS)) - GOLDEN[name]).max() > 1


@nnx.jit
def step(model: CausalLM, ids: jax.Array, positions: jax.Array, cache: Cache):
    return model.step(ids, positions, cache)


def decode_in_pieces(model: CausalLM, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits of all tokens when the prompt arrives in pieces through the cache."""
    cache = model.empty_cache(ids.shape[0], ids.shape[1] + 3)
    parts, start = [], 0
    for size in pieces:
        stop = start + size
        positions = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (len(ids), size))
        logits, cache = step(model, jnp.asarray(ids[:, start:stop]), positions, cache)
        parts.append(np.asarray(logits))
        start = stop
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "name",
    ["mistral-window", "qwen3", "mixtral", "deepseek-v3-yarn"],
)
def test_cached_steps_equal_the_full_pass(name: str):
    assert name not in LENGTH_DEPENDENT
    pieced = decode_in_pieces(small_model(name), IDS[:, :12], [5, 1, 5, 1])
    assert np.abs(pieced - GOLDEN[name][:, :12]).max() < 2e-4


def test_right_padding_changes_nothing():
    model = small_model("deepseek-v3")
    padded = np.concatenate([IDS[:, :9], np.zeros((2, 7), np.int32)], axis=1)
    assert np.abs(np.asarray(model(padded))[:, :9] - GOLDEN["deepseek-v3"][:, :9]).max() < 2e-4


def test_bfloat16_model_is_near():
    logits = np.asarray(small_model("qwen3-moe", dtype=jnp.bfloat16)(IDS[:, :1]))
    expected = GOLDEN["qwen3-moe"][:, :1]
    assert logits.dtype == np.float32
    relative = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-5 < relative < 0.03
