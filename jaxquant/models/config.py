"""ModelConfig: the typed form of a Hugging Face config.json, for the families jaxquant builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from jaxquant.errors import ConfigError
from jaxquant.nn.basic import Activation
from jaxquant.nn.mla import LatentHeads
from jaxquant.nn.moe import Routing
from jaxquant.nn.rope import Rope, yarn_mscale

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
        read = _Reader(config, family)
        layers = read.int("num_hidden_layers")
        hidden, heads = read.int("hidden_size"), read.int("num_attention_heads")
        latent = family.startswith("deepseek")
        head_dim = read.int("head_dim", hidden // heads)
        kv_heads = read.int("num_key_value_heads", heads)
        if heads % kv_heads:
            rule = f"num_key_value_heads ({kv_heads}) divides num_attention_heads"
            raise ConfigError("config.json", f"num_attention_heads {heads}", rule)
        act = config.get("hidden_act", "silu")
        if act not in get_args(Activation):
            raise ConfigError("hidden_act", repr(act), f"one of {get_args(Activation)}")
        if latent:
            interleaved = bool(config.get("rope_interleave", True))
            rope = Rope.from_hf(config, read.int("qk_rope_head_dim"), interleaved)
        else:
            rope = Rope.from_hf(config, head_dim)
        bias = bool(config.get("attention_bias", False))
        qwen2 = family in ("qwen2", "qwen2_moe")
        return cls(
            family=family,
            vocab_size=read.int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.int("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_epsilon=read.number("rms_norm_eps"),
            rope=rope,
            hidden_act=act,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bool(config.get("qkv_bias", True)) if qwen2 else bias,
            output_bias=False if qwen2 else bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            windows=_windows(config, family, layers),
            moe=_moe(read, layers),
            latent=_latent(read, rope) if latent else None,
            eos=_token_ids((generation or {}).get("eos_token_id", config.get("eos_token_id"))),
        )

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        return self.moe.layers if self.moe is not None else (False,) * self.num_layers


class _Reader:
    """Typed access to a config's numbers."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config = config
        self.family = family

    def number(self, *names: str | float) -> float:
        """The first of several spellings; a trailing number is the family's default."""
        for name in names:
            if not isinstance(name, str):
                return name
            if isinstance(value := self.config.get(name), (int, float)):
                return value
        shown = " or ".join(repr(name) for name in names)
        raise ConfigError("config.json", f"no {shown}", f"{self.family} models need it")

    def int(self, *names: str | float) -> int:
        """As ``number``, a whole number of at least 1."""
        value = self.number(*names)
        if value != int(value) or value < 1:
            raise ConfigError("config.json", f"{names[0]} is {value}", "a positive whole number")
        return int(value)


def _family(config: Mapping[str, Any]) -> str:
    """Family of a config; the architecture decides, ``model_type`` where it is absent."""
    names = config.get("architectures") or []
    by_name = {name: family for family, name in FAMILIES.items()}
    for name in names:
        if name in by_name:
            return by_name[name]
    if not names and config.get("model_type") in FAMILIES:
        return config["model_type"]
    found = names[0] if names else config.get("model_type")
    known = ", ".join(FAMILIES.values())
    raise ConfigError("architectures", repr(found), "no such architecture", f"known are: {known}")


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
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
    window = config.get("sliding_window", None if family == "mixtral" else 4096)
    if not window or (qwen and not config.get("use_sliding_window", False)):
        return none
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return (int(window),) * layers
    types, edge = config.get("layer_types"), int(config.get("max_window_layers", 28))
    if types is None and family == "qwen2_moe":
        chosen = [i % 2 == 0 and i < edge for i in range(layers)]
    elif types is None:
        chosen = [i >= edge for i in range(layers)]
    elif len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        rule = f"{layers} entries, full_attention or sliding_attention"
        raise ConfigError("layer_types", f"{len(types)} of {sorted(set(types))}", rule)
    else:
        chosen = [kind == "sliding_attention" for kind in types]
    return tuple(int(window) if slides else None for slides in chosen)


def _moe(read: _Reader, layers: int) -> MoEConfig | None:
    family, config = read.family, read.config
    if family == "mixtral":
        routing = Routing(
            read.int("num_local_experts"), read.int("num_experts_per_tok"), "softmax", True
        )
        size = read.int("intermediate_size")
        return _checked(MoEConfig(routing, size, 0, False, False, (True,) * layers))
    if family in ("qwen2_moe", "qwen3_moe"):
        routing = Routing(
            read.int("num_experts", "num_local_experts"),
            read.int("num_experts_per_tok"),
            "softmax",
            bool(config.get("norm_topk_prob", False)),
        )
        dense = set(config.get("mlp_only_layers") or ())
        every = read.int("decoder_sparse_step", 1)
        sparse = tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
        gated = family == "qwen2_moe"
        shared = read.int("shared_expert_intermediate_size") if gated else 0
        size = read.int("moe_intermediate_size")
        return _checked(MoEConfig(routing, size, shared, gated, False, sparse))
    if not family.startswith("deepseek") or config.get("n_routed_experts") is None:
        return None
    v3 = family == "deepseek_v3"
    method = config.get("topk_method", "noaux_tc" if v3 else "greedy")
    allowed = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    if method not in allowed:
        raise ConfigError("topk_method", repr(method), f"{family} has {' or '.join(allowed)}")
    normalize = bool(config.get("norm_topk_prob", v3))
    if normalize and not v3:
        rule = "published implementations of DeepSeek-V2 disagree on what it does"
        raise ConfigError("norm_topk_prob", "true", rule)
    limited = method != "greedy"
    routing = Routing(
        experts=read.int("n_routed_experts"),
        top_k=read.int("num_experts_per_tok"),
        scores="sigmoid" if v3 else "softmax",
        normalize=normalize,
        scale=read.number("routed_scaling_factor"),
        groups=read.int("n_group") if limited else 1,
        top_groups=read.int("topk_group") if limited else 1,
        group_score="top2" if v3 else "max",
    )
    every, first = read.int("moe_layer_freq", 1), int(config.get("first_k_dense_replace", 0))
    sparse = tuple(i >= first and i % every == 0 for i in range(layers))
    size = read.int("moe_intermediate_size")
    shared = size * int(config.get("n_shared_experts") or 0)
    return _checked(MoEConfig(routing, size, shared, False, v3, sparse))


def _checked(moe: MoEConfig) -> MoEConfig:
    r = moe.routing
    reachable = r.experts // r.groups * r.top_groups
    if r.experts % r.groups or r.top_groups > r.groups or r.top_k > reachable:
        found = f"{r.experts} experts, top {r.top_k}, {r.top_groups} of {r.groups} groups"
        raise ConfigError("config.json", found, "groups divide experts and hold the chosen ones")
    return moe


def _latent(read: _Reader, rope: Rope) -> LatentConfig:
    nope, rotated = read.int("qk_nope_head_dim"), read.int("qk_rope_head_dim")
    scale = (nope + rotated) ** -0.5
    scaling = read.config.get("rope_parameters") or read.config.get("rope_scaling") or {}
    if rope.kind != "default" and scaling.get("mscale_all_dim"):
        # DeepSeek scales scores by YaRN's magnitude squared instead of queries and keys.
        scale *= yarn_mscale(rope.factor, scaling["mscale_all_dim"]) ** 2
    heads = LatentHeads(
        heads=read.int("num_attention_heads"),
        nope=nope,
        rope=rotated,
        value=read.int("v_head_dim"),
        latent=read.int("kv_lora_rank"),
        scale=scale,
    )
    rank = read.config.get("q_lora_rank")
    return LatentConfig(heads, None if rank is None else int(rank))
