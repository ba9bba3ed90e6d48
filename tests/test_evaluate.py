"""Perplexity against a float64 sum over the model's own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxquant.errors import ConfigError
from jaxquant.evaluate import perplexity
from tests.small_models import small_model

TOKENS = np.random.default_rng(0).integers(0, 64, 77).astype(np.uint16)


def expected(window: int, windows: int) -> float:
    model, losses = small_model("llama"), []
    for i in range(windows):
        row = TOKENS[i * window : (i + 1) * window].astype(np.int32)
        logits = np.asarray(model(row[None]), np.float64)[0]
        for t in range(window - 1):
            losses.append(np.log(np.exp(logits[t]).sum()) - logits[t, row[t + 1]])
    return math.exp(np.mean(losses))


def test_windows_batches_and_tail():
    model = small_model("llama")
    seen: list[tuple[int, int]] = []
    found = perplexity(
        model, TOKENS, window=10, batch=3, progress=lambda done, of: seen.append((done, of))
    )
    assert math.isclose(found, expected(10, 7), rel_tol=1e-5)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert math.isclose(
        perplexity(model, TOKENS, window=10, windows=2), expected(10, 2), rel_tol=1e-5
    )
    assert not math.isclose(expected(10, 2), expected(10, 7), rel_tol=1e-3)


@pytest.mark.parametrize(
    "tokens, settings, words",
    [
        (TOKENS[:9], {"window": 10}, "at least one full window"),
        (TOKENS, {"window": 1}, "a whole number from 2"),
        (TOKENS + 10, {"window": 10}, "the vocabulary is 0 to 63"),
        (TOKENS, {"window": 10, "windows": 0}, "a whole number from 1"),
    ],
)
def test_bad_input(tokens: np.ndarray, settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        perplexity(small_model("llama"), tokens, **settings)
