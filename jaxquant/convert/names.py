"""Checkpoint names to the names of the module tree, and tensors that carry nothing.

The module tree mirrors Hugging Face's names, so the tables only hold what differs.
Source of the names: the families' published checkpoints and transformers' modules.
"""

from __future__ import annotations

import re

from jaxquant.models import ModelConfig

# A multimodal wrapper keeps its language model under another root.
LANGUAGE_ROOTS = ("model.language_model.", "language_model.model.", "language_model.")
_RENAMES = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1(\.|$)"), r"\1.gate_proj\2"),
    (re.compile(r"(\.experts\.\d+)\.w3(\.|$)"), r"\1.up_proj\2"),
    (re.compile(r"(\.experts\.\d+)\.w2(\.|$)"), r"\1.down_proj\2"),
)
_MIXTRAL = (
    (re.compile(r"\.mlp\.(?=gate(\.|$)|experts\.)"), ".block_sparse_moe."),
    (re.compile(r"(\.experts\.\d+)\.gate_proj(\.|$)"), r"\1.w1\2"),
    (re.compile(r"(\.experts\.\d+)\.up_proj(\.|$)"), r"\1.w3\2"),
    (re.compile(r"(\.experts\.\d+)\.down_proj(\.|$)"), r"\1.w2\2"),
)
# Derived from the config, or runtime state that some tools save.
_IGNORED = re.compile(
    r"(\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.masked_bias|\.attn\.bias|\.workspace)$"
)


def canonical(name: str) -> str:
    """The module tree's name of a checkpoint's module or tensor."""
    for root in LANGUAGE_ROOTS:
        if name.startswith(root):
            rest = name[len(root) :]
            name = rest if rest.startswith("lm_head") else f"model.{rest}"
            break
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def published(name: str, family: str) -> str:
    """The name that a family's own checkpoints have for a canonical one, of a module or tensor."""
    if family == "mixtral":
        for pattern, replacement in _MIXTRAL:
            name = pattern.sub(replacement, name)
    return name


def ignored(name: str, config: ModelConfig) -> str | None:
    """Why a canonical name takes no part in the model, or None where it does.

    Besides derived tensors these are the multi-token-prediction layers that DeepSeek-V3 stores
    after its last layer.
    """
    if _IGNORED.search(name):
        return "derived from the config"
    found = re.match(r"model\.layers\.(\d+)\.", name)
    past_the_last = found is not None and int(found[1]) == config.num_layers
    if past_the_last and config.family.startswith("deepseek"):
        return "multi-token prediction layer"
    return None
