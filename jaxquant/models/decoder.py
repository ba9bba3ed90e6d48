"""One decoder for all families; attribute paths are the names checkpoints use."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.arguments import known_values, token_ids
from jaxquant.arrays.bank import ExpertBank, Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import ConfigError
from jaxquant.models.config import ModelConfig
from jaxquant.nn.attention import Attention, Entries, Step
from jaxquant.nn.basic import MLP, Embedding, RMSNorm
from jaxquant.nn.cache import Cache, Slot
from jaxquant.nn.linear import Linear
from jaxquant.nn.mla import LatentAttention
from jaxquant.nn.moe import MoE
from jaxquant.nn.stack import Layers, is_stack, scan_run
from jaxquant.ops.sharded import Sharded
from jaxquant.ops.sharded_bank import run_shapes


class DecoderLayer(nnx.Module):
    """Attention and MLP (or experts), each behind a norm and beside a residual."""

    def __init__(
        self,
        input_layernorm: RMSNorm,
        self_attn: Attention | LatentAttention,
        post_attention_layernorm: RMSNorm,
        mlp: MLP | MoE,
    ) -> None:
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, step: Step, cache: Entries | None
    ) -> tuple[jax.Array, Entries | None]:
        """``[batch, token, hidden]`` to the same and the layer's updated cache."""
        normed = self.input_layernorm.quantized(x, self.self_attn.reads())
        mixed, cache = self.self_attn(normed, step, cache)
        x = x + mixed
        norm, mlp = self.post_attention_layernorm, self.mlp
        if isinstance(mlp, MoE):  # its router takes the input as it is
            return x + mlp(norm(x)), cache
        return x + mlp(norm.quantized(x, mlp.reads())), cache


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: jax.Array,
    step: Step,
    cache: Entries | None,
) -> tuple[jax.Array, Entries | None]:
    """One layer as a function of its own: layers that differ in values only are traced once."""
    return nnx.merge(graph, state)(x, step, cache)


class Decoder(Layers):
    """Embedding, layers (see :class:`jaxquant.nn.stack.Layers`), final norm."""

    def __init__(
        self,
        embed_tokens: Embedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        config: ModelConfig,
        runs: Sequence[Run] | None = None,
    ) -> None:
        super().__init__(layers, runs)
        self.layers: nnx.List[DecoderLayer]
        self.embed_tokens = embed_tokens
        self.norm = norm
        self.config = config

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        cache: Cache | None,
        length: jax.Array | None = None,
        fresh: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """``[batch, token]`` int32 to hidden states ``[batch, token, hidden]`` and the cache.

        ``length`` ``[batch]`` is how many positions each row uses; None stands for no padding.
        ``fresh`` as for :meth:`CausalLM.step`.
        """
        x = self.embed_tokens(input_ids)
        step = Step.at(self.config.rope, positions, length, fresh)
        entries: list[Any] = [None] * len(self.runs) if cache is None else list(cache.layers)
        for i, (run, layer) in enumerate(zip(self.runs, self.layers, strict=True)):
            if is_stack(run):
                x, entries[i] = scan_run(_stacked_layer(step), layer, (x, entries[i]))
            else:
                x, entries[i] = _layer(*nnx.split(layer), x, step, entries[i])
        return self.norm(x), None if cache is None else Cache(tuple(entries))

    def empty_cache(self, batch: int, capacity: int, dtype: Any) -> Cache:
        """A cache for ``batch`` rows of up to ``capacity`` positions."""

        def entries(graph: Any, state: Any) -> tuple[QTensor, QTensor]:
            return nnx.merge(graph, state).empty_cache(batch, capacity, dtype)

        layers: list[tuple[QTensor, QTensor]] = []
        for run, layer in zip(self.runs, self.layers, strict=True):
            graph, state = nnx.split(layer.self_attn)
            one = functools.partial(entries, graph)
            layers.append((jax.vmap(one) if is_stack(run) else one)(state))
        return Cache(tuple(layers))


def _stacked_layer(step: Step) -> Any:
    """One layer of a stack as the body of :func:`jaxquant.nn.stack.scan_run`."""

    def body(graph: Any, state: Any, index: jax.Array, carry: Any) -> Any:
        x, stacks = carry
        if stacks is None:
            return _layer(graph, state, x, step, None)[0], None
        slots = tuple(Slot(stack, index) for stack in stacks)
        x, slots = _layer(graph, state, x, step, slots)
        return x, tuple(slot.stack for slot in slots)

    return body


class CausalLM(nnx.Module):
    """A decoder with its output projection.

    Attributes:
        model: the decoder.
        lm_head: output projection, None where it is tied to the embedding.
        config: static.
        dtype: compute dtype.
        tokenizer: for prompts given as text, or None; see :mod:`jaxquant.tokenize`.
        report: what loading did, or None for a model that was not loaded.
        published: text of the ``config.json`` it was loaded with, or None.
    """

    def __init__(
        self, model: Decoder, lm_head: Linear | None, config: ModelConfig, dtype: Any
    ) -> None:
        self.model = model
        self.lm_head = lm_head
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Any = nnx.static(None)
        self.report: Any = nnx.static(None)
        self.published: Any = nnx.static(None)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Logits of every token; compiled once per shape.

        Args:
            input_ids: int32 ``[batch, token]``, right-padded where rows are shorter.
        Returns:
            float32 ``[batch, token, vocab]``.
        Raises:
            ConfigError: another shape or type, or (outside of jit) ids past the vocabulary.
        """
        graph, state = self.split()
        ids = input_ids
        if not isinstance(ids, jax.Array):
            ids = jnp.asarray(token_ids("input_ids", ids, self.config.vocab_size))
        elif (known := known_values(ids)) is not None:
            token_ids("input_ids", known, self.config.vocab_size)
        if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
            found = f"{ids.dtype} of shape {ids.shape}"
            rule = "integers [batch, token] are needed, one at least"
            raise ConfigError("input_ids", found, rule)
        return _logits(graph, state, ids.astype(jnp.int32))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and arrays, also of an abstract model."""
        leaves = jax.tree.leaves(nnx.state(self))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def num_weights(self) -> int:
        """Number of weights: elements of linears and arrays, whatever they are packed in."""
        total = 0
        for _, variable in nnx.to_flat_state(nnx.state(self)):
            value = variable.get_value()
            if isinstance(value, Sharded) and isinstance(value.parts, ExpertBank):
                shapes = run_shapes(value)
            else:
                tensors = value.parts if isinstance(value, ExpertBank) else (value,)
                shapes = [tensor.shape for tensor in tensors]
            total += sum(map(math.prod, shapes))
        return total

    def split(self) -> tuple[nnx.GraphDef[CausalLM], nnx.State]:
        """Graph and state for a jitted function.

        Without the tokenizer and whatever else a loader attached: those would make every loaded
        model a compilation of its own.
        """
        return nnx.split(CausalLM(self.model, self.lm_head, self.config, self.dtype))

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for ``batch`` rows of up to ``capacity`` positions."""
        return self.model.empty_cache(batch, capacity, self.dtype)

    def step(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        cache: Cache | None,
        last: jax.Array | None = None,
        fresh: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """One traced pass over new tokens: prefill or decode.

        Rows may have different lengths: their tokens stand at their own positions, and padding
        after a row's end is neither seen by its tokens nor kept once later tokens are written.

        Args:
            input_ids: int32 ``[batch, token]``.
            positions: int32 ``[batch, token]``.
            cache: earlier positions, updated; None for a pass that stands alone.
            last: ``[batch]`` the last token of each row, whose logits alone are wanted; None for
                all, and for rows without padding.
            fresh: the cache is empty and positions count from 0 in every row, so that only the
                new tokens need to be looked at, not the whole cache.
        Returns:
            float32 ``[batch, token, vocab]`` (``[batch, vocab]`` with ``last``), and the cache.
        """
        length = None
        if last is not None:
            length = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
        hidden, cache = self.model(input_ids, positions, cache, length, fresh)
        if last is not None:
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        head = self.model.embed_tokens.attend if self.lm_head is None else self.lm_head
        return head(hidden).astype(jnp.float32), cache


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef[CausalLM], state: nnx.State, input_ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
    return nnx.merge(graph, state).step(input_ids, positions, None)[0]
