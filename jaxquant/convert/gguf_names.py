"""Names of GGUF tensors and the names of the module tree, for the architectures jaxquant builds.

The files' names come from llama.cpp's converters, the module names from Hugging Face.  A user's own
map (:mod:`jaxquant.convert.name_map`) goes before the table.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxquant.errors import ConfigError

FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "deepseek2": "deepseek_v2",
}
"""Architecture of a file: model family.  Mixtral is ``llama`` with experts, DeepSeek-V3 is
``deepseek2`` with sigmoid routing; the config tells."""

PERMUTED = ("llama", "mistral")
"""Architectures whose converter interleaves the two halves of every query and key head."""

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_SHARED = {"ffn_gate_shexp": "gate_proj", "ffn_up_shexp": "up_proj", "ffn_down_shexp": "down_proj"}
STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Tensors that hold all experts of a layer, ``[experts, out, in]``: the projection of each."""

FUSED_STACK = "ffn_gate_up_exps"
"""Gate and up projections of all experts in one, ``[experts, 2 inner, hidden]``, gate first."""

_STEMS = {module: stem for stem, module in _BLOCK.items()} | {
    f"mlp.{shared}.{projection}": stem
    for stem, projection in _SHARED.items()
    for shared in ("shared_expert", "shared_experts")
}
_STACKED_STEMS = {projection: stem for stem, projection in STACKED.items()}

_CORRECTION = "mlp.gate.e_score_correction_bias"
_IGNORED = (
    (re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight"), "read with the config"),
    (re.compile(r".*\.scale"), "read with its weight"),
    (re.compile(r".*\.input_scale"), "a hint for quantized activations"),
    (re.compile(r"blk\.\d+\.nextn\..*"), "multi-token prediction layer"),
    (re.compile(r"blk\.\d+\.attn_rot_embd\..*"), "derived from the config"),
)


class Name(NamedTuple):
    """A GGUF tensor name, taken apart.

    Attributes:
        layer: layer number, None outside layers.
        stem: e.g. ``"attn_q"``.
        expert: expert number of files that do not stack experts, else None.
        suffix: ``"weight"``, ``"bias"`` or "".
    """

    layer: int | None
    stem: str
    expert: int | None
    suffix: str


def parse(name: str) -> Name:
    """Take a tensor name apart; a name of no known form is all stem."""
    stem, suffix = name, ""
    for end in ("weight", "bias"):
        if name.endswith("." + end):
            stem, suffix = name[: -len(end) - 1], end
    if not (found := re.fullmatch(r"blk\.(\d{1,6})\.([a-z0-9_]+)(?:\.(\d{1,6}))?", stem)):
        return Name(None, stem, None, suffix)
    expert = None if found[3] is None else int(found[3])
    return Name(int(found[1]), found[2], expert, suffix)


def ignored(name: str, layers: int) -> str | None:
    """Why a tensor takes no part in the model, or None where it does."""
    for pattern, reason in _IGNORED:
        if pattern.fullmatch(name):
            return reason
    layer = parse(name).layer
    return "multi-token prediction layer" if layer is not None and layer >= layers else None


def module_name(name: str, family: str) -> str | None:
    """The module tree's name of a GGUF tensor, or None where there is none.

    A tensor with all experts of a layer gets the name of an expert's module without its number.
    Tensors that become a part of a module (``attn_k_b`` with ``attn_v_b``, fused stacks) have none.

    >>> module_name("blk.3.attn_q.weight", "llama")
    'model.layers.3.self_attn.q_proj.weight'
    >>> module_name("blk.3.ffn_up.7.weight", "mixtral")
    'model.layers.3.mlp.experts.7.up_proj.weight'
    >>> module_name("blk.3.ffn_up_exps.weight", "mixtral")
    'model.layers.3.mlp.experts.up_proj.weight'
    """
    layer, stem, expert, suffix = parse(name)
    end = f".{suffix}" if suffix else ""
    if layer is None:
        return _TOP[stem] + end if stem in _TOP else None
    prefix = f"model.layers.{layer}."
    if stem in STACKED:
        return f"{prefix}mlp.experts.{STACKED[stem]}{end}"
    if stem == "exp_probs_b":
        return prefix + _CORRECTION
    if stem in _SHARED:
        shared = "shared_expert" if family == "qwen2_moe" else "shared_experts"
        return f"{prefix}mlp.{shared}.{_SHARED[stem]}{end}"
    if expert is not None:
        projection = STACKED.get(f"{stem}_exps")
        return f"{prefix}mlp.experts.{expert}.{projection}{end}" if projection else None
    return prefix + _BLOCK[stem] + end if stem in _BLOCK else None


def gguf_name(name: str) -> tuple[str, int | None]:
    """Inverse of :func:`module_name`: the tensor that holds a module's weight, and which expert.

    >>> gguf_name("model.layers.3.mlp.experts.7.up_proj.weight")
    ('blk.3.ffn_up_exps.weight', 7)

    Raises:
        ConfigError: GGUF has no such tensor.
    """
    module, suffix = name, ""
    for end in (".weight", ".bias"):
        if name.endswith(end):
            module, suffix = name.removesuffix(end), end
    for stem, top in _TOP.items():
        if module == top:
            return stem + suffix, None
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        block, rest = f"blk.{found[1]}.", found[2]
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", rest)
        if expert and expert[2] in _STACKED_STEMS:
            return block + _STACKED_STEMS[expert[2]] + suffix, int(expert[1])
        if rest == _CORRECTION:
            return block + "exp_probs_b.bias", None
        if rest in _STEMS:
            return block + _STEMS[rest] + suffix, None
    raise ConfigError(name, "no GGUF tensor has this role", "a module of a known architecture")
