"""Perplexity after round-to-nearest quantization stays within each scheme's bar."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

CORPUS = os.environ.get("JAXQUANT_CORPUS")
BARS = {"fp8": 0.01, "w8a8": 0.01, "w4a16_g32": 0.06}


@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS, reason="JAXQUANT_CORPUS is not set")
@pytest.mark.parametrize("name", ["llama-11m", "qwen3-moe-9m"])
def test_perplexity_bars(name):
    models = Path(CORPUS).parent / "models"
    tokens = np.load(models / "eval_tokens.npy")[:8192]
    base = jq.from_pretrained(models / name, dtype=jnp.float32)
    plain = jq.perplexity(base, tokens)
    worst = jq.quantize_model(base, {r"model\.layers\..*": "w2a16_g32"})
    assert jq.perplexity(worst, tokens[:2048]) > 1.5 * plain, "two bits do harm: the measure works"
    for scheme, bar in BARS.items():
        model = jq.quantize_model(base, {r"model\.layers\..*": scheme})
        change = jq.perplexity(model, tokens) / plain - 1
        assert -0.002 < change < bar, scheme
