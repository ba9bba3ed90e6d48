"""From a config and named weights to a model: real or abstract, total, all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays.bank import Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import ConfigError
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import CausalLM, Decoder, DecoderLayer
from jaxquant.models.source import Load, Place, Source, abstract
from jaxquant.nn.attention import Attention, Heads
from jaxquant.nn.basic import MLP, Embedding, RMSNorm
from jaxquant.nn.mla import LatentAttention
from jaxquant.nn.moe import PROJECTIONS, Experts, MoE, Router
from jaxquant.nn.stack import is_stack, layer_runs, stack_layers, stack_run

DTYPES = ("float32", "bfloat16", "float16")


def build_model(
    config: ModelConfig,
    weights: Mapping[str, QTensor],
    arrays: Mapping[str, Any],
    *,
    dtype: Any = jnp.bfloat16,
    load: Load | None = None,
    place: Place | None = None,
    devices: int = 1,
    scan_layers: bool = False,
    finish: Callable[[DecoderLayer], DecoderLayer] | None = None,
) -> CausalLM:
    """Build a model from weights by module path and arrays by tensor name.

    Names are those of the module tree: ``model.layers.0.self_attn.q_proj`` (a linear),
    ``model.layers.1.mlp.experts.3.down_proj`` (one expert), ``model.norm.weight`` (an array),
    ``model.layers.0.self_attn.q_proj.bias``, ``model.layers.0.self_attn.k_scale``.  All are checked
    against the config before a value is loaded.

    Args:
        config: what to build.
        weights: QTensor ``[out, in]`` of every linear, real or abstract (``jax.ShapeDtypeStruct``
            leaves).
        arrays: every other array, real or abstract.
        dtype: compute dtype; norms, softmax and routing are float32 in any case.
        load: gives the real value of a name, called once per name in the order of the model (a
            layer's experts: once per bank position); without it values come from the mappings,
            and abstract ones give an abstract model.
        place: ``place(path, leaf)`` becomes the model's leaf; banks come whole, as
            ``...mlp.experts.gate_proj``.  By default arrays go to the default device.
        devices: ways of expert parallelism that banks are laid out for.
        scan_layers: stack runs of equal layers (see :mod:`jaxquant.nn.stack`) while loading, so
            that one layer, not the model, is in memory twice.
        finish: what becomes of each loaded layer, before it is stacked.
    Raises:
        PlanError: names missing, left over, or of another shape than the config says; every one.
        ConfigError: ``dtype`` is not one to compute in.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise ConfigError("dtype", str(dtype), f"computing is in one of {DTYPES}")
    described = {name: abstract(q) for name, q in weights.items()}
    shapes = {name: abstract(array) for name, array in arrays.items()}
    source = Source(described, shapes, devices=devices)
    model = _Builder(config, source, dtype).model()
    source.finish(config.num_layers)
    if load is None:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((weights, arrays))):
            return stack_layers(model) if scan_layers else model
        load = {**arrays, **weights}.__getitem__
    runs = layer_runs(model.model.layers) if scan_layers else None
    source = Source(described, shapes, load, place, devices)
    return _Builder(config, source, dtype, runs, finish).model()


def required_tensors(
    config: ModelConfig,
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """What a model of this config needs, without optional biases and cache scales.

    Returns:
        ``(out, in)`` of every linear by module path, and the shape of every other array by tensor
        name.
    """
    source = Source({}, {})
    _Builder(config, source, jnp.float32).model()
    return source.asked_weights, source.asked_arrays


class _Builder:
    """One pass over the module tree."""

    def __init__(
        self,
        config: ModelConfig,
        source: Source,
        dtype: Any,
        runs: Sequence[Run] | None = None,
        finish: Callable[[DecoderLayer], DecoderLayer] | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.runs = runs or tuple(Run(i, i + 1) for i in range(config.num_layers))
        self.finish = finish

    def model(self) -> CausalLM:
        config, source = self.config, self.source
        size = (config.vocab_size, config.hidden_size)
        table = source.array("model.embed_tokens.weight", size, "vocab_size, hidden_size")
        layers = list(map(self._run, self.runs))
        norm = self._norm("model.norm", config.hidden_size)
        decoder = Decoder(Embedding(table, self.dtype), layers, norm, config, self.runs)
        head = None
        if not config.tied or source.has("lm_head"):
            head = source.linear("lm_head", *size, why="vocab_size, hidden_size")
        return CausalLM(decoder, head, config, self.dtype)

    def _norm(self, path: str, features: int) -> RMSNorm:
        weight = self.source.array(f"{path}.weight", (features,))
        return RMSNorm(weight, self.config.norm_epsilon)

    def _run(self, run: Run) -> DecoderLayer:
        """The layers of a run, each made when it is asked for."""
        layers = (self._layer(f"model.layers.{i}", i) for i in range(run.start, run.stop))
        return stack_run(layers, run.stop - run.start) if is_stack(run) else next(layers)

    def _layer(self, path: str, index: int) -> DecoderLayer:
        config = self.config
        self.source.layer(path)
        attention = self._latent if config.latent is not None else self._attention
        sparse = config.moe_layers[index]
        layer = DecoderLayer(
            self._norm(f"{path}.input_layernorm", config.hidden_size),
            attention(f"{path}.self_attn", index),
            self._norm(f"{path}.post_attention_layernorm", config.hidden_size),
            self._moe(f"{path}.mlp")
            if sparse
            else self._mlp(f"{path}.mlp", config.intermediate_size),
        )
        return layer if self.finish is None else self.finish(layer)

    def _mlp(self, path: str, inner: int) -> MLP:
        hidden, bias, linear = self.config.hidden_size, self.config.mlp_bias, self.source.linear
        return MLP(
            linear(f"{path}.gate_proj", inner, hidden, bias),
            linear(f"{path}.up_proj", inner, hidden, bias),
            linear(f"{path}.down_proj", hidden, inner, bias),
            self.config.hidden_act,
        )

    def _attention(self, path: str, index: int) -> Attention:
        config, source = self.config, self.source
        hidden, dim = config.hidden_size, config.head_dim
        query, kv = config.num_heads * dim, config.num_kv_heads * dim
        q_why = f"num_attention_heads {config.num_heads} x head_dim {dim}, hidden_size"
        kv_why = f"num_key_value_heads {config.num_kv_heads} x head_dim {dim}, hidden_size"
        projections = (
            source.linear(f"{path}.q_proj", query, hidden, config.qkv_bias, q_why),
            source.linear(f"{path}.k_proj", kv, hidden, config.qkv_bias, kv_why),
            source.linear(f"{path}.v_proj", kv, hidden, config.qkv_bias, kv_why),
            source.linear(f"{path}.o_proj", hidden, query, config.output_bias),
        )
        norms = scales = None
        if config.qk_norm:
            norms = self._norm(f"{path}.q_norm", dim), self._norm(f"{path}.k_norm", dim)
        names = f"{path}.k_scale", f"{path}.v_scale"
        if any(map(source.has, names)):
            scales = source.array(names[0], None), source.array(names[1], None)
        heads = Heads(config.num_heads, config.num_kv_heads, dim, config.windows[index])
        return Attention(projections, heads, config.rope, norms, scales)

    def _latent(self, path: str, index: int) -> LatentAttention:
        config, linear = self.config, self.source.linear
        assert config.latent is not None
        h, rank, hidden = config.latent.heads, config.latent.query_rank, config.hidden_size
        bias = config.qkv_bias
        query_size, why = h.heads * (h.nope + h.rope), "num_attention_heads x qk_head_dim, in"
        if rank is None:
            query = linear(f"{path}.q_proj", query_size, hidden, why=why)
        else:
            query = (
                linear(f"{path}.q_a_proj", rank, hidden, bias),
                self._norm(f"{path}.q_a_layernorm", rank),
                linear(f"{path}.q_b_proj", query_size, rank, why=why),
            )
        joint = "kv_lora_rank + qk_rope_head_dim, hidden_size"
        expanded = "num_attention_heads x (qk_nope_head_dim + v_head_dim), kv_lora_rank"
        latent = (
            linear(f"{path}.kv_a_proj_with_mqa", h.latent + h.rope, hidden, bias, joint),
            self._norm(f"{path}.kv_a_layernorm", h.latent),
            linear(f"{path}.kv_b_proj", h.heads * (h.nope + h.value), h.latent, why=expanded),
        )
        o_proj = linear(f"{path}.o_proj", hidden, h.heads * h.value, bias)
        return LatentAttention(query, latent, o_proj, h, config.rope)

    def _moe(self, path: str) -> MoE:
        config, source = self.config, self.source
        assert config.moe is not None
        moe, hidden = config.moe, config.hidden_size
        count, inner = moe.routing.experts, moe.expert_size
        weight = source.weight(f"{path}.gate", count, hidden, "experts, hidden_size")
        correction = None
        if moe.correction:
            correction = source.array(f"{path}.gate.e_score_correction_bias", (count,))
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        (gate, up, down), plan = source.experts(f"{path}.experts", PROJECTIONS, count, shapes)
        shared = shared_gate = None
        if moe.shared_size:
            name = "shared_expert" if moe.shared_gate else "shared_experts"
            shared = self._mlp(f"{path}.{name}", moe.shared_size)
        if moe.shared_gate:
            shared_gate = source.linear(f"{path}.shared_expert_gate", 1, hidden)
        experts = Experts((gate, up, down), plan, config.hidden_act)
        return MoE(Router(weight, moe.routing, correction), experts, shared, shared_gate)
