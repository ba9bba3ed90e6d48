"""The metadata of a GGUF file as the config.json that the original model had."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxquant.convert.gguf_names import FAMILIES
from jaxquant.convert.read_gguf import Gguf
from jaxquant.errors import FormatError

_SIGMOID = 2
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


class _Reader:
    """Typed access to the metadata of one architecture."""

    def __init__(self, file: Gguf) -> None:
        self.file = file
        self.arch = self.text("general.architecture")

    def error(self, key: str, found: str, rule: str) -> FormatError:
        return FormatError(f"{self.file.path}: {key}", found, rule)

    def text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if not isinstance(value, str):
            raise self.error(key, repr(value)[:80], "a string")
        return value

    def get(self, key: str) -> Any:
        """The value of ``ARCH.key``; one number of an array in which all are equal."""
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray):
            numbers = set(value.tolist())
            if len(numbers) != 1:
                found = f"differs between layers: {sorted(numbers)[:6]}"
                raise self.error(f"{self.arch}.{key}", found, "the same in all layers")
            return numbers.pop()
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise self.error(f"{self.arch}.{key}", repr(value)[:80], "a number")
        return value

    def int(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or not 0 <= value < 1 << 31:
            raise self.error(f"{self.arch}.{key}", repr(value), "a whole number of at least 0")
        return int(value)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.int(key, default)
        if not value:
            raise self.error(f"{self.arch}.{key}", "0", "at least 1")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self.error(f"{self.arch}.{key}", repr(value), "a positive number")
        return value

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.metadata


def family_of(file: Gguf) -> str:
    """The model family of a file.

    Raises:
        FormatError: the architecture is none that jaxquant builds.
    """
    read = _Reader(file)
    if read.arch not in FAMILIES:
        raise FormatError(
            f"{file.path}: general.architecture",
            repr(read.arch)[:80],
            f"models are built for {', '.join(FAMILIES)}",
            "read its tensors with read_quantized, or give names= and config=",
        )
    if read.arch in ("llama", "mistral") and read.int("expert_count", 0):
        return "mixtral"
    if read.arch == "deepseek2" and read.int("expert_gating_func", 1) == _SIGMOID:
        return "deepseek_v3"
    return FAMILIES[read.arch]


def layer_count(file: Gguf) -> int:
    """Layers of the model proper, without those for multi-token prediction."""
    read = _Reader(file)
    layers = read.int("block_count") - read.int("nextn_predict_layers", 0)
    if not 0 < layers <= len(file.tensors):
        rule = "at least one, and no more than the file has tensors"
        raise read.error(f"{read.arch}.block_count", f"{layers} layers", rule)
    return layers


def config_of(file: Gguf) -> dict[str, Any]:
    """The config.json of the model in a file, with the fields that shape it.

    Args:
        file: an open file of an architecture in :data:`FAMILIES`.
    Raises:
        FormatError: another architecture, or metadata that is missing or contradictory.
    """
    family = family_of(file)
    read = _Reader(file)
    heads, hidden = read.size("attention.head_count"), read.size("embedding_length")
    embedding = file.tensor("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        # The converter may cut or pad the vocabulary: what counts is the table itself.
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.int("feed_forward_length"),
        "num_hidden_layers": layer_count(file),
        "num_attention_heads": heads,
        "num_key_value_heads": read.size("attention.head_count_kv", heads),
        "rms_norm_eps": read.positive("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": read.int("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    if family in ("qwen2", "qwen2_moe"):
        config["qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
    for name in ("bos", "eos"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int):
            config[f"{name}_token_id"] = token
    if family.startswith("deepseek"):
        config |= _latent(read, heads)
    else:
        config["head_dim"] = read.int("attention.key_length", hidden // heads)
    config["rope_parameters"] = _rope(read, config.get("head_dim"))
    if read.int("expert_count", 0):
        config |= _experts(read, family)
    return config


def _latent(read: _Reader, heads: int) -> dict[str, Any]:
    """Sizes of latent attention.

    Files that hold ``kv_b`` split describe attention as it runs on the latent, with one key head;
    the sizes of the model are then under ``_mla``.
    """
    split = read.has("attention.key_length_mla")
    end = "_mla" if split else ""
    rotated = read.int("rope.dimension_count")
    return {
        "num_key_value_heads": heads,
        "q_lora_rank": read.int("attention.q_lora_rank")
        if read.has("attention.q_lora_rank")
        else None,
        "kv_lora_rank": read.int("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": read.int(f"attention.key_length{end}") - rotated,
        "v_head_dim": read.int(f"attention.value_length{end}"),
    }


def _rope(read: _Reader, head_dim: int | None) -> dict[str, Any]:
    """Rotary parameters; divisors of single frequencies, if any, are a tensor of the file."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": read.positive("rope.freq_base", 10000.0),
    }
    rotated = read.int("rope.dimension_count", head_dim)
    if head_dim and rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    if "rope_freqs.weight" in read.file.tensors:
        # Llama 3.1's interpolation as the converter evaluated it: exactly a divisor per frequency,
        # at every length and without a change of magnitude.
        divisors = read.file.array("rope_freqs.weight").reshape(-1)
        if divisors.size * 2 != rotated or not (np.isfinite(divisors) & (divisors > 0)).all():
            rule = f"{rotated // 2} positive numbers"
            raise read.error("rope_freqs.weight", f"{divisors[:8].tolist()}", rule)
        shared = divisors.tolist()
        return rope | {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": shared,
            "long_factor": shared,
        }
    kind = read.get("rope.scaling.type")
    if kind in (None, "none"):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": read.positive("rope.scaling.factor")}
    if kind != "yarn":
        raise read.error(f"{read.arch}.rope.scaling.type", repr(kind)[:40], "none, linear or yarn")
    rope |= {
        "rope_type": "yarn",
        "factor": read.positive("rope.scaling.factor"),
        "original_max_position_embeddings": read.int("rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if read.has(f"rope.scaling.yarn_{name}"):
            rope[name] = read.number(f"rope.scaling.yarn_{name}")
    if read.has("rope.scaling.yarn_log_multiplier"):
        # The converter stores a tenth of mscale_all_dim, to which mscale is equal in all models.
        mscale = round(10 * read.number("rope.scaling.yarn_log_multiplier"), 6)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    return rope


def _experts(read: _Reader, family: str) -> dict[str, Any]:
    """Sizes and routing of the experts."""
    count, used = read.int("expert_count"), read.int("expert_used_count")
    if family == "mixtral":
        return {"num_local_experts": count, "num_experts_per_tok": used}
    config: dict[str, Any] = {
        "num_experts_per_tok": used,
        "moe_intermediate_size": read.int("expert_feed_forward_length"),
    }
    if not family.startswith("deepseek"):
        config["num_experts"] = count
        # Qwen's files leave it out: llama.cpp has the families' own rule built in.
        normalized = read.get("expert_weights_norm")
        config["norm_topk_prob"] = family == "qwen3_moe" if normalized is None else bool(normalized)
        if family == "qwen2_moe":
            size = read.int("expert_shared_feed_forward_length")
            config["shared_expert_intermediate_size"] = size
        return config
    groups = read.int("expert_group_count", 1)
    config |= {
        "n_routed_experts": count,
        "n_shared_experts": read.int("expert_shared_count", 0),
        "first_k_dense_replace": read.int("leading_dense_block_count", 0),
        "routed_scaling_factor": read.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(read.get("expert_weights_norm")),
        "n_group": groups,
        "topk_group": read.int("expert_group_used_count", 1),
        "topk_method": "noaux_tc" if family == "deepseek_v3" else "greedy",
    }
    if family == "deepseek_v2" and groups > 1:
        config["topk_method"] = "group_limited_greedy"
    return config
