"""A model's weights as the metadata and tensors of a GGUF file, the inverse of ``gguf_model``.

Weights whose layout GGUF has are written block for block without rounding; everything else is
either written as plain floats, which is exact too, or quantized to a type of the caller's choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.gguf_model import EMBEDDING, rotary_rows
from jaxquant.convert.gguf_names import FAMILIES, PERMUTED, gguf_name
from jaxquant.convert.write_gguf import Part, array_part, write_gguf
from jaxquant.errors import ConfigError, FormatError
from jaxquant.formats import gguf, gguf_encode
from jaxquant.formats.gguf_types import TYPES, GgmlType
from jaxquant.models import ModelConfig
from jaxquant.nn.rope import Rope, frequencies, yarn_mscale
from jaxquant.transforms.numeric import as_numpy, dequantize
from jaxquant.transforms.structure import refine

_ARCHITECTURES = {family: arch for arch, family in FAMILIES.items()} | {
    "mixtral": "llama",
    "mistral": "llama",
    "deepseek_v3": "deepseek2",
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
_GATING = {"softmax": 1, "sigmoid": 2}
_BLOCK_VERSION = 2
_GROUP = 32
"""Inputs to a scale of the types that have only one; larger groups are multiples of it."""


def metadata_from(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model, without its tokenizer.

    Args:
        config: what the model was built from.
    Raises:
        ConfigError: a rotary scaling, sliding window or order of layers that GGUF cannot express.
    """
    if any(config.windows):
        raise ConfigError("sliding_window", f"{config.windows[:4]}", "GGUF has full attention")
    arch = _ARCHITECTURES[config.family]
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.rope.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(config.rope.theta),
        "rope.dimension_count": config.rope.dim,
    }
    if config.latent is None:
        values |= {"attention.key_length": config.head_dim}
        values |= {"attention.value_length": config.head_dim}
    else:
        heads = config.latent.heads
        values |= {
            "attention.key_length": heads.nope + heads.rope,
            "attention.value_length": heads.value,
            "attention.kv_lora_rank": heads.latent,
        }
        if config.latent.query_rank is not None:
            values["attention.q_lora_rank"] = config.latent.query_rank
    values |= _rope(config) | _experts(config)
    general = {
        "general.architecture": arch,
        "general.type": "model",
        "general.quantization_version": _BLOCK_VERSION,
    }
    return general | {f"{arch}.{key}": value for key, value in values.items()}


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Scalings that are metadata; those with a divisor per frequency are a tensor."""
    rope, latent = config.rope, config.latent
    if rope.kind == "default" or _divisors(rope) is not None:
        return {}
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    usual = 1.0 if latent is not None else yarn_mscale(rope.factor)
    if rope.kind != "yarn" or not rope.truncate or not math.isclose(rope.magnitude, usual):
        found = f"{rope.kind} scaling of magnitude {rope.magnitude}"
        raise ConfigError("rope", found, "GGUF files cannot say so")
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_length,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }
    if latent is not None and rope.factor > 1:
        # The scores' factor has YaRN's growth squared; the file keeps growth per log of length.
        growth = math.sqrt(latent.heads.scale * math.sqrt(latent.heads.nope + latent.heads.rope))
        values["rope.scaling.yarn_log_multiplier"] = (growth - 1) / math.log(rope.factor)
    return values


def _divisors(rope: Rope) -> np.ndarray | None:
    """What each frequency is divided by, where that is the same at every length."""
    same = rope.kind == "longrope" and rope.short_factor == rope.long_factor
    if rope.kind != "llama3" and not (same and rope.magnitude == 1):
        return None
    base = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if same:
        return np.asarray(rope.short_factor, np.float32)
    return (base / np.asarray(frequencies(rope), np.float64)).astype(np.float32)


def _experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    routing, first = moe.routing, moe.layers.index(True)
    if not all(moe.layers[first:]):
        raise ConfigError("experts", "dense layers behind the first sparse one", "GGUF has none")
    values: dict[str, Any] = {
        "expert_count": routing.experts,
        "expert_used_count": routing.top_k,
        "expert_feed_forward_length": moe.expert_size,
        "expert_gating_func": _GATING[routing.scores],
        "expert_weights_norm": routing.normalize,
        "expert_weights_scale": float(routing.scale),
        "leading_dense_block_count": first,
    }
    if moe.shared_gate:
        values["expert_shared_feed_forward_length"] = moe.shared_size
    elif moe.shared_size:
        values["expert_shared_count"] = moe.shared_size // moe.expert_size
    if routing.groups > 1:
        values["expert_group_count"] = routing.groups
        values["expert_group_used_count"] = routing.top_groups
    return values


def exact_type(q: QTensor) -> GgmlType:
    """The type that holds a weight without rounding: its own blocks, or plain float32.

    Args:
        q: ``[out, in]``, real or abstract.
    """
    if q.perm is not None or q.pre_scale is not None:
        return TYPES["F32"]
    forms = [q]
    if len(q.scales) == 1:
        grid = q.layout.scales[0][q.layout.index("in")]
        if grid % _GROUP == 0 and q.extent("in") % _GROUP == 0:
            forms.append(jax.eval_shape(_in_groups, q))
    for form in forms:
        kind = gguf_encode.type_of(form)
        if kind is None:
            continue
        like = gguf.abstract(kind, (1, q.extent("in")), kind.name == "NVFP4" and len(q.scales) == 2)
        leaves, expected = (*form.scales, *form.zeros), (*like.scales, *like.zeros)
        if [leaf.dtype for leaf in leaves] == [leaf.dtype for leaf in expected]:
            return kind
    return TYPES["F32"]


def _in_groups(q: QTensor) -> QTensor:
    return refine(refine(q, "out", 1), "in", _GROUP)


def _chosen(q: QTensor, kind: str | None, name: str) -> GgmlType:
    if name.endswith((".gate", ".shared_expert_gate")):
        # llama.cpp wants routers in float32, whatever the file's type is.
        return TYPES["F32"]
    if kind is None:
        return exact_type(q)
    fits = q.extent("in") % TYPES[kind].elements == 0
    return TYPES[kind if fits else "F32"]


def _bytes_of(q: QTensor, kind: GgmlType, rows: np.ndarray | None, exact: bool, name: str) -> Any:
    """The blocks of one weight, ``[rows, row bytes]``."""
    plain = q.perm is None and q.pre_scale is None
    if exact and plain and exact_type(q) == kind and (kind.name != "F32" or q.layout.dense):
        raw = gguf_encode.encode(as_numpy(q), kind, name)
    else:
        values = np.asarray(dequantize(q))
        if q.pre_scale is not None:
            values = values * np.asarray(q.pre_scale, np.float32).reshape(1, -1)
        raw = gguf_encode.quantize(values, kind, name)
    blocks = raw.reshape(q.extent("out"), -1)
    return blocks if rows is None else blocks[rows]


class _Exporter:
    """Turns named pieces into tensors of a file."""

    def __init__(self, config: ModelConfig, load: Callable[[str], Any], kind: str | None) -> None:
        self.config = config
        self.load = load
        self.kind = kind

    def rows(self, name: str, count: int) -> np.ndarray | None:
        """The model's row of each row of the file; queries and keys are interleaved for llama."""
        if _ARCHITECTURES[self.config.family] not in PERMUTED:
            return None
        if not (found := re.search(r"self_attn\.([qk])_proj", name)):
            return None
        heads = self.config.num_heads if found[1] == "q" else self.config.num_kv_heads
        return np.argsort(rotary_rows(count, heads))

    def weight(self, name: str, q: QTensor) -> list[Part]:
        """One linear."""
        kind = _chosen(q, self.kind, name)
        rows = self.rows(name, q.extent("out"))
        stem, _ = gguf_name(name)
        exact = self.kind is None

        def data() -> np.ndarray:
            return _bytes_of(self.load(name), kind, rows, exact, name).reshape(-1)

        shape = q.shape[1:] if name.endswith("shared_expert_gate") else q.shape
        parts = [Part(f"{stem}.weight", kind, shape, data)]
        if exact and kind.name == "NVFP4" and len(q.scales) == 2:
            parts.append(self.scale(stem, [name]))
        return parts

    def scale(self, stem: str, names: list[str]) -> Part:
        """The tensor scales of NVFP4 weights."""

        def data() -> np.ndarray:
            scales = [np.asarray(self.load(n).scales[1], np.float32).reshape(1) for n in names]
            return np.concatenate(scales).view(np.uint8)

        return Part(f"{stem}.scale", TYPES["F32"], (len(names),), data)

    def stack(self, experts: dict[int, tuple[str, QTensor]]) -> list[Part]:
        """One projection of all experts of a layer, of the one type that fits all."""
        order = [experts[i] for i in sorted(experts)]
        kinds = {_chosen(q, self.kind, name) for name, q in order}
        scaled = {len(q.scales) for _, q in order}
        kind = kinds.pop() if len(kinds) == len(scaled) == 1 else TYPES["F32"]
        exact = self.kind is None

        def data() -> np.ndarray:
            blocks = [_bytes_of(self.load(n), kind, None, exact, n).reshape(-1) for n, _ in order]
            return np.concatenate(blocks)

        stem, _ = gguf_name(order[0][0])
        parts = [Part(f"{stem}.weight", kind, (len(order), *order[0][1].shape), data)]
        if exact and kind.name == "NVFP4" and scaled == {2}:
            parts.append(self.scale(stem, [name for name, _ in order]))
        return parts

    def array(self, name: str, shape: tuple[int, ...]) -> Part:
        """Anything that is no linear: float32, the embedding as the weights are."""
        stem, _ = gguf_name(name)
        chosen = self.kind if name == EMBEDDING and self.kind else "F32"
        kind = TYPES[chosen if shape[-1] % TYPES[chosen].elements == 0 else "F32"]
        rows = self.rows(name, shape[0])

        def data() -> np.ndarray:
            values = np.asarray(self.load(name)).astype(np.float32)
            return gguf_encode.quantize(values if rows is None else values[rows], kind, name)

        return Part(stem, kind, shape, data)


def export_gguf(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, QTensor],
    arrays: Mapping[str, Any],
    load: Callable[[str], Any],
    *,
    kind: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a GGUF file, one tensor at a time.

    Args:
        path: the file, written under another name first.
        config: the model's config.
        weights: QTensor ``[out, in]`` of every linear by module path, real or abstract.
        arrays: every other array by tensor name, real or abstract.
        load: gives the real value of a name, called when it is written.
        kind: type of all weights: Q8_0, Q4_0, F32, F16 or BF16; rows that its blocks do not divide
            stay float32.  None writes every weight without rounding, in its own blocks if GGUF has
            them and as float32 if not.
        metadata: more metadata, such as the tokenizer's.
    Raises:
        ConfigError: something that GGUF has no name for, or an unknown ``kind``.
        FormatError: a weight that cannot be written.
    """
    if kind not in (None, "Q8_0", "Q4_0", "F32", "F16", "BF16"):
        raise ConfigError("kind", repr(kind), "Q8_0, Q4_0, F32, F16, BF16 or None")
    exporter = _Exporter(config, load, kind)
    parts: list[Part] = []
    stacks: dict[tuple[str, str], dict[int, tuple[str, QTensor]]] = {}
    for name, array in arrays.items():
        parts.append(exporter.array(name, tuple(array.shape)))
    for name, q in weights.items():
        if found := _EXPERT.fullmatch(name):
            stacks.setdefault((found[1], found[3]), {})[int(found[2])] = (name, q)
        else:
            parts += exporter.weight(name, q)
    for (layer, projection), experts in stacks.items():
        if sorted(experts) != list(range(len(experts))):
            found_ids = f"experts {sorted(experts)[:8]}"
            raise FormatError(f"{layer}.{projection}", found_ids, "numbered from 0 without a gap")
        parts += exporter.stack(experts)
    if (divisors := _divisors(config.rope)) is not None:
        parts.append(array_part("rope_freqs.weight", divisors))
    write_gguf(path, metadata_from(config) | dict(metadata or {}), parts)
