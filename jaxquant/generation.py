"""Batch generation: ragged prompts, one compiled prefill and one compiled decode loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxquant.arguments import instance, real, token_ids, whole
from jaxquant.errors import ConfigError
from jaxquant.models.decoder import CausalLM
from jaxquant.nn.cache import Cache

SMALLEST_BUCKET = 16
SMALLEST_TEMPERATURE = 1e-6
MOST_NEW = 1 << 24


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What of sampling is compiled in; the numbers themselves are arguments of the program.

    Attributes:
        greedy: take the most likely token.
        filtered: cut the distribution by rank or by mass first.
    """

    greedy: bool
    filtered: bool


@overload
def generate(
    model: CausalLM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
) -> list[str]: ...
@overload
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
) -> list[list[int]]: ...
def generate(
    model: CausalLM,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
) -> list[Any]:
    """Continue prompts of any lengths.

    Prompt length and ``max_new_tokens`` are rounded up to powers of two, and each such bucket is
    compiled once; the decode loop runs on the device and stops when every row has ended.  A row's
    tokens do not depend on the other rows, but for weights whose checkpoint asks for one computed
    activation scale for all of them (compressed-tensors: dynamic, strategy "tensor").

    Args:
        model: a causal language model.
        prompts: token id lists, or texts where ``model.tokenizer`` is set.
        max_new_tokens: most tokens to add to each prompt.
        temperature: 0 takes the most likely token; from 1e-6 on, logits are divided by it and
            sampled.
        top_k: sample among so many most likely tokens only.
        top_p: then among the fewest most likely tokens that hold this share of the probability.
        seed: of 64 bits with a sign; same seed, prompts and settings give the same tokens; rows
            draw independently.
        eos: token id or ids that end a row; None takes the checkpoint's, ``()`` none.
    Returns:
        For each prompt its new tokens, the ending one included; for texts, the new text.
    Raises:
        ConfigError: an empty prompt, ids past the vocabulary, texts without a tokenizer, or a
            number out of range.
    """
    instance("generate", model, CausalLM, "a CausalLM is needed", "see jaxquant.from_pretrained")
    vocabulary = model.config.vocab_size
    max_new_tokens = whole("max_new_tokens", max_new_tokens, most=MOST_NEW)
    seed = whole("seed", seed, -(2**63), 2**63 - 1)
    top_k = None if top_k is None else min(whole("top_k", top_k), vocabulary)
    temperature, top_p = _sampled(temperature, top_p)
    many = isinstance(prompts, Sequence) or (
        isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim
    )
    if not many or isinstance(prompts, str | bytes):
        found = f"one {type(prompts).__name__}"
        raise ConfigError("prompts", found, "a list of texts or of token lists is needed")
    texts = any(isinstance(prompt, str) for prompt in prompts)
    rows = _encode(model, prompts) if texts else list(prompts)
    if not rows:
        return []
    rows = [_row(i, row, vocabulary) for i, row in enumerate(rows)]
    ids, lengths = _pad(rows)
    stops = np.asarray(model.config.eos, np.int32)
    if eos is not None:
        stops = np.atleast_1d(token_ids("eos", eos, vocabulary))
        if stops.ndim > 1:
            raise ConfigError("eos", f"shape {stops.shape}", "a token id, or a list of them")
    graph, state = model.split()
    room = _bucket(max_new_tokens)
    logits, cache = _prefill(graph, state, ids, lengths, ids.shape[1] + room)
    sampling = Sampling(temperature == 0, top_k is not None or top_p is not None)
    numbers = (
        jnp.float32(temperature or 1.0),
        jnp.int32(top_k or vocabulary),
        jnp.float32(top_p or 1.0),
    )
    out, counts, _ = _decode(
        graph,
        state,
        sampling,
        room,
        logits,
        cache,
        lengths,
        jnp.int32(max_new_tokens),
        jnp.asarray(stops, jnp.int32),
        _key(seed),
        numbers,
    )
    out, counts = np.asarray(out), np.asarray(counts)
    new = [row[:count].tolist() for row, count in zip(out, counts, strict=True)]
    return [model.tokenizer.decode(tokens) for tokens in new] if texts else new


def _sampled(temperature: float, top_p: float | None) -> tuple[float, float | None]:
    temperature = real("temperature", temperature)
    # Quotients by less leave float32.
    if temperature != 0 and not SMALLEST_TEMPERATURE <= temperature < float("inf"):
        raise ConfigError("temperature", str(temperature), f"0, or {SMALLEST_TEMPERATURE} or more")
    top_p = None if top_p is None else real("top_p", top_p)
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError("top_p", str(top_p), "above 0, at most 1")
    return temperature, top_p


def _key(seed: int) -> jax.Array:
    """A key of all 64 bits of a seed; JAX by itself takes the lower 32."""
    high, low = divmod(seed % 2**64, 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def _row(i: int, row: Any, vocabulary: int) -> np.ndarray:
    """The token ids of one prompt."""
    where = f"prompt {i}"
    ids = token_ids(where, row, vocabulary)
    if ids.ndim != 1 or not ids.size:
        found = "no tokens" if not ids.size else f"shape {ids.shape}"
        raise ConfigError(where, found, "a list of at least one token id")
    return ids


def _encode(model: CausalLM, prompts: Sequence[str]) -> list[list[int]]:
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError("prompts", "not a list of one kind", "texts only, or token lists only")
    if model.tokenizer is None:
        action = "pass token ids, or set model.tokenizer"
        raise ConfigError("prompts", "texts", "the model carries no tokenizer", action)
    return [model.tokenizer.encode(prompt) for prompt in prompts]


def _bucket(n: int) -> int:
    """The next power of two, at least ``SMALLEST_BUCKET``."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _pad(rows: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Right-padded ids ``[batch, bucket]`` and lengths ``[batch]``, int32."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), _bucket(int(lengths.max()))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return jnp.asarray(ids), jnp.asarray(lengths)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(
    graph: nnx.GraphDef[CausalLM],
    state: nnx.State,
    ids: jax.Array,
    lengths: jax.Array,
    capacity: int,
) -> tuple[jax.Array, Cache | None]:
    """Run the prompts; gives the logits after each one's last token, and the filled cache."""
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    cache = model.empty_cache(ids.shape[0], capacity)
    return model.step(ids, positions, cache, last=lengths - 1, fresh=True)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), donate_argnums=5)
def _decode(
    graph: nnx.GraphDef[CausalLM],
    state: nnx.State,
    sampling: Sampling,
    room: int,
    logits: jax.Array,
    cache: Cache,
    lengths: jax.Array,
    limit: jax.Array,
    stops: jax.Array,
    key: jax.Array,
    numbers: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, Cache]:
    """The token loop, wholly on the device: tokens ``[batch, room]`` and counts ``[batch]``.

    The cache comes back too: only an output can reuse a donated argument's memory.
    """
    model = nnx.merge(graph, state)
    batch = logits.shape[0]
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def pick(logits: jax.Array, index: jax.Array) -> jax.Array:
        drawn = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        return sample(logits, drawn, sampling, *numbers)

    def ends(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == stops[None, :], axis=-1)

    def unfinished(carry: Any) -> jax.Array:
        index, _, done, *_ = carry
        return (index < limit) & ~jnp.all(done)

    def body(carry: Any) -> Any:
        index, token, done, counts, out, cache = carry
        positions = (lengths + index - 1)[:, None]
        logits, cache = model.step(token[:, None], positions, cache, jnp.zeros_like(lengths))
        token = jnp.where(done, token, pick(logits, index))
        out = out.at[:, index].set(token)
        return index + 1, token, done | ends(token), counts + ~done, out, cache

    token = pick(logits, jnp.int32(0))
    out = jnp.zeros((batch, room), jnp.int32).at[:, 0].set(token)
    counts = jnp.ones(batch, jnp.int32)
    start = (jnp.int32(1), token, ends(token), counts, out, cache)
    _, _, _, counts, out, cache = lax.while_loop(unfinished, body, start)
    return out, counts, cache


def sample(
    logits: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Choose one token for each row.

    Args:
        logits: float32 ``[batch, vocab]``.
        keys: one random key for each row.
        sampling: greedy or not, filtered or not.
        temperature: above 0.
        top_k: ranks that stay.
        top_p: share of what ``top_k`` left that stays, from the most likely down; the most likely
            token always stays.
    Returns:
        int32 ``[batch]``.
    """
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if not sampling.filtered:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    # In order of rank a cut is a prefix, and ties are cut like any other tokens.
    ranked, order = lax.top_k(logits, logits.shape[-1])
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
