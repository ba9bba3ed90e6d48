"""ModelConfig: the typed form of a Hugging Face config.json, for the families jaxquant builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from jaxquant.errors import ConfigError
from jaxquant.fields import Fields
from jaxquant.nn.basic import Activation
from jaxquant.nn.mla import LatentHeads
from jaxquant.nn.moe import Routing
from jaxquant.nn.rope import Rope, yarn_mscale

# Far beyond any model, and few enough to count through.
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS, MAX_HEAD_DIM, MAX_STOP_TOKENS = (
    4096,
    1 << 16,
    1 << 14,
    1 << 16,
    1 << 12,
)
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The expert layers of a model.

    Attributes:
        routing: how tokens choose experts.
        expert_size: inner width of a routed expert.
        shared_size: inner width of the shared expert, 0 for none.
        shared_gate: the shared expert has a learnt gate (Qwen2-MoE).
        correction: the router has an ``e_score_correction_bias`` (DeepSeek-V3).
        layers: for each layer whether it has experts.
    """

    routing: Routing
    expert_size: int
    shared_size: int
    shared_gate: bool
    correction: bool
    layers: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Latent attention of a model.

    Attributes:
        heads: static shape of every layer.
        query_rank: width of the compressed query, None where queries are not compressed.
    """

    heads: LatentHeads
    query_rank: int | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a model; frozen and hashable.

    Attributes:
        family: a key of ``FAMILIES``.
        vocab_size, hidden_size, intermediate_size, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: attention sizes (head_dim unused with ``latent``).
        norm_epsilon: of every RMSNorm.
        rope: rotary embedding.
        hidden_act: gate activation.
        tied: the output projection is the embedding.
        qkv_bias, output_bias, mlp_bias: which linears have biases.
        qk_norm: per-head norms of queries and keys.
        windows: sliding window of each layer, or None.
        moe: expert layers, or None.
        latent: latent attention, or None.
        eos: token ids that end a text.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope: Rope
    hidden_act: str
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    moe: MoEConfig | None
    latent: LatentConfig | None
    eos: tuple[int, ...]

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Read a config.json.

        Args:
            config: its parsed content; keys that do not shape the model are not looked at.
            generation: content of the generation_config.json beside it; its stop tokens, often
                more than those of config.json, are the ones that count.
        Raises:
            ConfigError: an unknown architecture, or a number that is missing or contradictory.
        """
        family = _family(config)
        read = Fields(config, "config.json", needs=f"{family} models")
        layers = read.count("num_hidden_layers", most=MAX_LAYERS)
        hidden = read.count("hidden_size")
        heads = read.count("num_attention_heads", most=MAX_HEADS)
        latent = family.startswith("deepseek")
        head_dim = read.count("head_dim", default=hidden // heads, most=MAX_HEAD_DIM)
        kv_heads = read.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            rule = f"num_key_value_heads ({kv_heads}) divides num_attention_heads"
            raise read.error("num_attention_heads", str(heads), rule)
        act = read.get("hidden_act")[1] or "silu"
        if not isinstance(act, str) or act not in get_args(Activation):
            raise read.error("hidden_act", repr(act)[:80], f"one of {get_args(Activation)}")
        if latent:
            rotated = read.count("qk_rope_head_dim", most=MAX_HEAD_DIM)
            rope = Rope.from_hf(config, rotated, read.flag("rope_interleave", True))
        else:
            rope = Rope.from_hf(config, head_dim)
        bias = read.flag("attention_bias", False)
        qwen2 = family in ("qwen2", "qwen2_moe")
        return cls(
            family=family,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_epsilon=read.positive("rms_norm_eps"),
            rope=rope,
            hidden_act=act,
            tied=read.flag("tie_word_embeddings", False),
            qkv_bias=read.flag("qkv_bias", True) if qwen2 else bias,
            output_bias=False if qwen2 else bias,
            mlp_bias=read.flag("mlp_bias", False),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            windows=_windows(read, family, layers),
            moe=_moe(read, family, layers),
            latent=_latent(read, rope) if latent else None,
            eos=_token_ids(read, generation),
        )

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        return self.moe.layers if self.moe is not None else (False,) * self.num_layers


def _family(config: Mapping[str, Any]) -> str:
    """Family of a config; the architecture decides, ``model_type`` where it is absent."""
    if not isinstance(config, Mapping):
        raise ConfigError("config.json", type(config).__name__, "an object is needed")
    names, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError("config.json: architectures", repr(names)[:80], "a list of names")
    by_name = {name: family for family, name in FAMILIES.items()}
    for name in names:
        if name in by_name:
            return by_name[name]
    if not names and isinstance(kind, str) and kind in FAMILIES:
        return kind
    found = names[0] if names else kind
    known = ", ".join(FAMILIES.values())
    raise ConfigError(
        "config.json: architectures",
        repr(found)[:80],
        "no such architecture",
        f"known are: {known}",
    )


def _token_ids(read: Fields, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Tokens that end a text."""
    name = "eos_token_id"
    if generation and generation.get(name) is not None:
        read = Fields(generation, "generation_config.json")
    value = read.get(name)[1]
    if isinstance(value, list | tuple):
        return read.counts(name, MAX_STOP_TOKENS)
    return () if value is None else (read.count(name, least=0),)


def _windows(read: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer.

    Mistral, Mixtral and Qwen3-MoE have one for all layers; Qwen2 and Qwen3 from layer
    ``max_window_layers`` on, Qwen2-MoE for every other layer before it, unless ``layer_types`` says
    it layer by layer.  Qwen turns all of them on with a flag.  Absent numbers are those that
    transformers' config classes take.
    """
    none: tuple[int | None, ...] = (None,) * layers
    qwen = family.startswith("qwen")
    if family not in ("mistral", "mixtral") and not qwen:
        return none
    absent = family == "mixtral" or "sliding_window" in read.values
    window = read.count("sliding_window", default=0 if absent else 4096, least=0)
    if not window or (qwen and not read.flag("use_sliding_window", False)):
        return none
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * layers
    types = read.get("layer_types")[1]
    edge = read.count("max_window_layers", default=28, least=0)
    known = ("full_attention", "sliding_attention")
    if types is None and family == "qwen2_moe":
        chosen = [i % 2 == 0 and i < edge for i in range(layers)]
    elif types is None:
        chosen = [i >= edge for i in range(layers)]
    elif not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise read.error("layer_types", repr(types), f"{layers} entries, {' or '.join(known)}")
    else:
        chosen = [kind == "sliding_attention" for kind in types]
    return tuple(window if slides else None for slides in chosen)


def _moe(read: Fields, family: str, layers: int) -> MoEConfig | None:
    if family == "mixtral":
        experts = read.count("num_local_experts", most=MAX_EXPERTS)
        routing = Routing(experts, read.count("num_experts_per_tok"), "softmax", True)
        size = read.count("intermediate_size")
        return _checked(read, MoEConfig(routing, size, 0, False, False, (True,) * layers))
    if family in ("qwen2_moe", "qwen3_moe"):
        routing = Routing(
            read.count("num_experts", "num_local_experts", most=MAX_EXPERTS),
            read.count("num_experts_per_tok"),
            "softmax",
            read.flag("norm_topk_prob", False),
        )
        dense = set(read.counts("mlp_only_layers", MAX_LAYERS))
        every = read.count("decoder_sparse_step", default=1)
        sparse = tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
        gated = family == "qwen2_moe"
        shared = read.count("shared_expert_intermediate_size") if gated else 0
        size = read.count("moe_intermediate_size")
        return _checked(read, MoEConfig(routing, size, shared, gated, False, sparse))
    if not family.startswith("deepseek") or read.get("n_routed_experts")[1] is None:
        return None
    v3 = family == "deepseek_v3"
    method = read.get("topk_method")[1] or ("noaux_tc" if v3 else "greedy")
    allowed = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    if method not in allowed:
        raise read.error("topk_method", repr(method)[:80], f"{family} has {' or '.join(allowed)}")
    normalize = read.flag("norm_topk_prob", v3)
    if normalize and not v3:
        rule = "published implementations of DeepSeek-V2 disagree on what it does"
        raise read.error("norm_topk_prob", "true", rule)
    limited = method != "greedy"
    routing = Routing(
        experts=read.count("n_routed_experts", most=MAX_EXPERTS),
        top_k=read.count("num_experts_per_tok"),
        scores="sigmoid" if v3 else "softmax",
        normalize=normalize,
        scale=read.positive("routed_scaling_factor"),
        groups=read.count("n_group") if limited else 1,
        top_groups=read.count("topk_group") if limited else 1,
        group_score="top2" if v3 else "max",
    )
    every = read.count("moe_layer_freq", default=1)
    first = read.count("first_k_dense_replace", default=0, least=0)
    sparse = tuple(i >= first and i % every == 0 for i in range(layers))
    size = read.count("moe_intermediate_size")
    shared = size * read.count("n_shared_experts", default=0, least=0)
    return _checked(read, MoEConfig(routing, size, shared, False, v3, sparse))


def _checked(read: Fields, moe: MoEConfig) -> MoEConfig:
    r = moe.routing
    reachable = r.experts // r.groups * r.top_groups
    if r.experts % r.groups or r.top_groups > r.groups or r.top_k > reachable:
        found = f"{r.experts} experts, top {r.top_k}, {r.top_groups} of {r.groups} groups"
        raise read.error("experts", found, "groups divide experts and hold the chosen ones")
    return moe


def _latent(read: Fields, rope: Rope) -> LatentConfig:
    nope = read.count("qk_nope_head_dim", most=MAX_HEAD_DIM)
    rotated = read.count("qk_rope_head_dim", most=MAX_HEAD_DIM)
    scale = (nope + rotated) ** -0.5
    scaling = Fields(read.object("rope_parameters", "rope_scaling"), "config.json: rope")
    mscale = scaling.number("mscale_all_dim", default=0.0, least=0)
    if rope.kind != "default" and mscale:
        # DeepSeek scales scores by YaRN's magnitude squared instead of queries and keys.
        scale *= yarn_mscale(rope.factor, mscale) ** 2
    heads = LatentHeads(
        heads=read.count("num_attention_heads"),
        nope=nope,
        rope=rotated,
        value=read.count("v_head_dim", most=MAX_HEAD_DIM),
        latent=read.count("kv_lora_rank"),
        scale=scale,
    )
    compressed = read.get("q_lora_rank")[1] is not None
    return LatentConfig(heads, read.count("q_lora_rank") if compressed else None)
