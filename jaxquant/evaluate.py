"""Perplexity of a model on a token stream."""

from __future__ import annotations

import collections
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.arguments import instance, token_ids, whole
from jaxquant.errors import ConfigError
from jaxquant.models.decoder import CausalLM

# Passes that are queued before the results of an earlier one are waited for.
AHEAD = 2
# From here on exp leaves float64.
LARGEST = math.log(sys.float_info.max)


def perplexity(
    model: CausalLM,
    tokens: Any,
    *,
    window: int = 256,
    batch: int = 8,
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity over consecutive windows that do not see each other.

    Each window's first token is context only, so a window of 256 has a loss on 255 positions; a
    last window that is not full is left out.

    Args:
        model: a causal language model.
        tokens: token ids ``[token]``, any integer type.
        window: tokens of a window.
        batch: windows to a pass.
        windows: how many windows to use, from the start; None uses all.
        progress: called with windows done and windows in all.
    Returns:
        ``exp`` of the mean negative log likelihood, infinite where that is above 709.
    Raises:
        ConfigError: too few tokens, a window below 2, or ids past the vocabulary.
    """
    instance("perplexity", model, CausalLM, "a CausalLM is needed", "see jaxquant.from_pretrained")
    batch = whole("batch", batch)
    stream = token_ids("tokens", tokens, model.config.vocab_size).reshape(-1)
    count = window_count(len(stream), window, windows)
    rows = stream[: count * window].reshape(count, window)
    graph, state = model.split()
    total, batch = 0.0, min(batch, count)
    running: collections.deque[tuple[jax.Array, range]] = collections.deque()

    def fetch() -> float:
        losses, done = running.popleft()
        summed = float(np.asarray(losses)[: len(done)].sum(dtype=np.float64))
        if progress is not None:
            progress(done.stop, count)
        return summed

    for start in range(0, count, batch):
        part = rows[start : start + batch]
        # A short last batch is filled up, so that one compiled program serves all.
        filled = np.zeros((batch, window), np.int32)
        filled[: len(part)] = part
        done = range(start, start + len(part))
        running.append((_losses(graph, state, jnp.asarray(filled)), done))
        if len(running) > AHEAD:
            total += fetch()
    while running:
        total += fetch()
    mean = total / (count * (window - 1))
    return math.inf if mean > LARGEST else math.exp(mean)


def window_count(tokens: int, window: int, windows: int | None) -> int:
    """How many windows :func:`perplexity` uses of so many tokens; needs no model.

    Raises:
        ConfigError: a window below 2, no windows, or too few tokens for one.
    """
    window = whole("window", window, 2)
    count = tokens // window
    count = count if windows is None else min(count, whole("windows", windows))
    if count < 1:
        found = f"{tokens} tokens for windows of {window}"
        raise ConfigError("tokens", found, "at least one full window", "use a smaller window")
    return count


@functools.partial(jax.jit, static_argnums=0)
def _losses(graph: nnx.GraphDef[CausalLM], state: nnx.State, rows: jax.Array) -> jax.Array:
    """Summed negative log likelihood of each row: ``[batch]`` float32."""
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
    logits, _ = nnx.merge(graph, state).step(rows, positions, None)
    chosen = jnp.take_along_axis(logits[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen, axis=-1)
