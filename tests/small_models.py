"""Small models of every family: configs, seeded random weights, and building them.

The weights come from a seeded generator in the order of their names, so that reference values made
elsewhere (``models/golden``) need no stored weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.models import CausalLM, ModelConfig, build_model, required_tensors

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}


def _config(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {**BASE, "architectures": [architecture], "model_type": model_type, **changes}


def _llama(**changes: Any) -> dict[str, Any]:
    return _config("LlamaForCausalLM", "llama", **changes)


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return _llama(rope_scaling={"rope_type": kind, **numbers})


YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _llama(),
    "llama-biases": _llama(attention_bias=True, mlp_bias=True),
    "llama-tied-mha": _llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-linear": _rope("linear", factor=4.0),
    "llama-dynamic": _rope("dynamic", factor=2.0) | {"max_position_embeddings": 16},
    "llama-llama3": _rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "llama-yarn": _rope("yarn", **YARN),
    "llama-yarn-sharp": _rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.5, truncate=False),
    "llama-longrope": _rope(
        "longrope",
        short_factor=[1.0, 1.1, 1.3, 1.6],
        long_factor=[1.0, 2.0, 4.0, 8.0],
        factor=4.0,
        original_max_position_embeddings=16,
    ),
    "mistral-window": _config("MistralForCausalLM", "mistral", sliding_window=7),
    "qwen2": _config("Qwen2ForCausalLM", "qwen2"),
    "qwen2-window": _config(
        "Qwen2ForCausalLM",
        "qwen2",
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", head_dim=16, tie_word_embeddings=True),
    "mixtral": _config("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": _config(
        "Qwen2MoeForCausalLM", "qwen2_moe", shared_expert_intermediate_size=24, **MOE
    ),
    "qwen3-moe": _config("Qwen3MoeForCausalLM", "qwen3_moe", norm_topk_prob=True, **MOE),
    "mixtral-window": _config(
        "MixtralForCausalLM",
        "mixtral",
        num_local_experts=4,
        num_experts_per_tok=1,
        sliding_window=6,
    ),
    "qwen2-moe-window": _config(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        **MOE,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        decoder_sparse_step=2,
    ),
    "qwen3-moe-window": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        **MOE,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3-layer-types": _config(
        "Qwen3ForCausalLM",
        "qwen3",
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3-moe-sparse": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        **MOE,
        norm_topk_prob=False,
        num_hidden_layers=3,
        mlp_only_layers=[2],
    ),
    "deepseek-v2": _config(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        **LATENT,
        q_lora_rank=None,
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
    ),
    "deepseek-v2-yarn": _config(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        **LATENT,
        q_lora_rank=24,
        topk_method="greedy",
        norm_topk_prob=False,
        rope_scaling={"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    ),
    "deepseek-v3-biases": _config(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        **LATENT,
        q_lora_rank=24,
        norm_topk_prob=False,
        attention_bias=True,
        rope_interleave=False,
        moe_layer_freq=1,
    ),
    "deepseek-v3": _config(
        "DeepseekV3ForCausalLM", "deepseek_v3", **LATENT, q_lora_rank=24, norm_topk_prob=True
    ),
    "deepseek-v3-yarn": _config(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        **LATENT,
        q_lora_rank=24,
        norm_topk_prob=True,
        rope_scaling={"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    ),
}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors under their checkpoint names (``X.weight`` for the linear ``X``)."""
    weights, arrays = required_tensors(config)
    shapes: dict[str, tuple[int, ...]] = {f"{path}.weight": s for path, s in weights.items()}
    shapes |= arrays
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        value = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * value
        elif name.endswith(("bias", "embed_tokens.weight")):
            value = 0.1 * value if "correction" in name else 0.5 * value
        else:
            value = value * (1.5 / shape[-1] ** 0.5)
        tensors[name] = value.astype(np.float32)
    return tensors


def split_tensors(
    tensors: dict[str, np.ndarray],
) -> tuple[dict[str, QTensor], dict[str, np.ndarray]]:
    """Linears by module path, everything else by tensor name."""
    weights, arrays = {}, {}
    for name, value in tensors.items():
        if name.endswith(".weight") and value.ndim == 2 and "embed_tokens" not in name:
            weights[name.removesuffix(".weight")] = dense(value)
        else:
            arrays[name] = value
    return weights, arrays


def small_model(name: str, seed: int = 0, dtype: Any = jnp.float32) -> CausalLM:
    """A model of ``CONFIGS`` with random weights."""
    config = ModelConfig.from_hf(CONFIGS[name])
    return build_model(config, *split_tensors(random_tensors(config, seed)), dtype=dtype)


def checkpoint_model(folder: Path, dtype: Any = jnp.float32) -> CausalLM:
    """A model from an unquantized checkpoint directory, weights widened to float32."""
    from safetensors.numpy import load_file

    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= {k: v.astype(np.float32) for k, v in load_file(file).items()}
    return build_model(config, *split_tensors(tensors), dtype=dtype)
