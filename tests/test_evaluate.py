"""Perplexity against a float64 sum over the model's own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxquant import evaluate
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


def test_passes_are_queued_before_results_are_waited_for(monkeypatch):
    events: list[str] = []

    class Losses:
        def __init__(self, rows):
            self.rows = rows
            events.append("queue")

        def __array__(self, dtype=None, copy=None):
            events.append("wait")
            return np.full(len(self.rows), 9.0, np.float32)

    monkeypatch.setattr(evaluate, "_losses", lambda graph, state, rows: Losses(rows))
    found = perplexity(small_model("llama"), TOKENS, window=10, batch=1)
    assert math.isclose(found, math.e) and events.count("wait") == events.count("queue") == 7
    # At every wait other passes are under way, but for the last.
    ahead = [events[:i].count("queue") - events[:i].count("wait") for i in range(len(events))]
    waits = [n for n, event in zip(ahead, events, strict=True) if event == "wait"]
    assert waits == [3, 3, 3, 3, 3, 2, 1]


@pytest.mark.parametrize(
    ("loss", "least", "most"),
    [(709.0, 8e307, 9e307), (710.0, math.inf, math.inf), (math.inf, math.inf, math.inf)],
)
def test_a_perplexity_past_float64_is_infinite(monkeypatch, loss, least, most):
    monkeypatch.setattr(evaluate, "_losses", lambda *_: np.full(1, 9 * loss, np.float32))
    assert least <= perplexity(small_model("llama"), TOKENS[:10], window=10) <= most


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
