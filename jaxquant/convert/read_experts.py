"""Experts stacked into 3-D tensors, seen as one linear an expert.

Whether a stack is transposed or interleaved follows from the model type, never from its shape.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxquant.errors import FormatError
from jaxquant.formats.base import FormatWarning, RawTensor

STACK = re.compile(
    r"(?P<stem>.*\.experts)\.(?P<part>gate_up_proj|down_proj|gate_proj|up_proj)(?P<tail>.*)"
)
# A stack is a parameter of the experts (gate_up_proj, gate_up_proj_scale_inv), or a module (that of
# compressed-tensors: gate_up_proj.weight_packed).
_OF_MODULES = (
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_global_scale",
    "input_zero_point",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "input_scale",
)
TAILS = {
    "": "weight",
    ".weight": "weight",
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_activation_scale": "activation_scale",
    "_blocks": "blocks",
    "_scales": "scales",
    "_bias": "bias",
    **{f"{sign}{suffix}": suffix for sign in "._" for suffix in _OF_MODULES},
}
_NO_ROWS = ("weight_g_idx",)
TRANSPOSED = ("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "gpt_oss")
INTERLEAVED = ("gpt_oss",)
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")


def expand_experts(
    tensors: Mapping[str, RawTensor], config: Mapping[str, Any]
) -> dict[str, RawTensor]:
    """All tensors, stacks of experts replaced by one unread slice an expert and projection.

    Args:
        tensors: by full name.
        config: the checkpoint's ``config.json``; its ``model_type`` decides the orientation.
    Raises:
        FormatError: the halves of a stack differ, or a slice of it is stored by itself too.
    """
    expanded: dict[str, RawTensor] = {}
    kind = str(config.get("model_type") or "")
    for name, tensor in tensors.items():
        found = STACK.fullmatch(name)
        if found is None or found["tail"] not in TAILS or not tensor.shape:
            expanded[name] = tensor
            continue
        suffix = TAILS[found["tail"]]
        weight = tensors.get(name.removesuffix(found["tail"])) or tensors.get(
            f"{found['stem']}.{found['part']}{found['tail'].replace(suffix, 'weight_packed')}"
        )
        if suffix == "weight_shape":
            if weight is None:
                expanded[name] = tensor
                continue
            tensor = _shapes(tensor, weight.shape, found["part"])
        elif suffix == "weight_zero_point" and weight is not None:
            _check_words(tensor, weight.shape, found["part"])
        turned = kind in TRANSPOSED and _is_turned(tensor, suffix, weight)
        for expert in range(tensor.shape[0]):
            for part, piece in _parts(tensor, found["part"], suffix, expert, turned, kind):
                single = f"{found['stem']}.{expert}.{part}.{suffix}"
                if single in tensors or single in expanded:
                    raise tensor.error(f"its slice is stored as {single} too", "one of the two")
                expanded[single] = piece
    return expanded


def _shapes(tensor: RawTensor, packed: tuple[int, ...], part: str) -> RawTensor:
    """``weight_shape`` of a stack, [3] or the [2] of each expert, as one pair an expert."""
    if tensor.dtype not in ("I64", "I32") or tensor.shape not in ((2,), (3,)) or len(packed) != 3:
        raise tensor.error(f"{tensor.dtype} {list(tensor.shape)}", "I64 [3]: experts, out, in")
    stored = tensor.read()
    out, inputs = (int(n) for n in stored[-2:])
    if (len(stored) == 3 and int(stored[0]) != packed[0]) or out != packed[1]:
        rule = f"weight_packed has {packed[0]} experts of {packed[1]} rows"
        raise tensor.error(f"{stored.tolist()}", rule)
    halves = 2 if part == "gate_up_proj" else 1
    pairs = np.tile(np.array([out // halves, inputs], stored.dtype), (packed[0], halves))
    return dataclasses.replace(tensor, shape=pairs.shape, read=lambda: pairs, entry=None)


def _check_words(tensor: RawTensor, packed: tuple[int, ...], part: str) -> None:
    """Zero points that are packed along the rows: no word may have some of gate and some of up."""
    if part != "gate_up_proj" or tensor.dtype not in ("I32", "U32") or len(packed) != 3:
        return
    rows, words = packed[1], tensor.shape[1]
    if rows // 2 % 32 or words * 32 % rows:
        raise tensor.error(
            f"zero points of {rows} rows in {words} words",
            "those of gate and of up lie in words of their own",
            "save the experts one by one",
        )


def _is_turned(tensor: RawTensor, suffix: str, weight: RawTensor | None) -> bool:
    """Whether a tensor lies [E, in, out], in a model whose plain weights do.

    Packed blocks and their scales always lie [E, out, ...].  Scales of blocks lie as the weight
    does, unless only the other way fits it.
    """
    if len(tensor.shape) != 3 or suffix not in ("weight", "weight_scale", "weight_scale_inv"):
        return False
    if suffix != "weight_scale_inv" or weight is None or len(weight.shape) != 3:
        return True
    (_, rows, columns), (_, high, wide) = weight.shape, tensor.shape
    return rows * wide == columns * high or rows * high != columns * wide


def _parts(
    tensor: RawTensor, part: str, suffix: str, expert: int, transposed: bool, kind: str
) -> Iterable[tuple[str, RawTensor]]:
    """The slices of one expert: its weight, or its gate and its up weight."""
    turns = transposed and suffix != "weight_scale"
    label = f"[{expert}]"
    # One scale an expert, [E] or [E, 1, 1], is that of both halves.
    if part != "gate_up_proj" or math.prod(tensor.shape[1:]) == 1 or suffix in _NO_ROWS:
        whole = tensor.pick(label, (expert,), transpose=turns)
        names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        return [(name, _channels(whole, suffix)) for name in names]
    axis = 2 if transposed else 1
    size = tensor.shape[axis]
    if size % 2:
        raise tensor.error(
            f"{size} rows of gate and up",
            "both halves have as many",
            "blocks must not straddle them",
        )
    if kind in INTERLEAVED:
        cuts = (slice(0, None, 2), slice(1, None, 2))
    else:
        cuts = (slice(0, size // 2), slice(size // 2, None))
    pieces = []
    for name, cut in zip(("gate_proj", "up_proj"), cuts, strict=True):
        index = (expert, slice(None), cut) if transposed else (expert, cut)
        piece = tensor.pick(f"{label}.{name}", index, turns)
        pieces.append((name, _channels(piece, suffix)))
    return pieces


def _channels(piece: RawTensor, suffix: str) -> RawTensor:
    """A scale of one entry a channel, [1, out] beside a transposed weight, as [out, 1]."""
    if suffix == "weight_scale" and len(piece.shape) == 2 and piece.shape[0] == 1:
        return piece.pick("", (), transpose=True)
    return piece


def check_expert_indices(paths: Iterable[str], config: Mapping[str, Any], where: str) -> None:
    """Every layer has experts 0 to n - 1, n from the config where it says so.

    Raises:
        FormatError: lists the missing experts and those too many of every layer.
    """
    found: dict[str, set[int]] = {}
    for path in paths:
        cut = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", path)
        if cut:
            found.setdefault(f"{cut[1]}.*.{cut[3]}", set()).add(int(cut[2]))
    declared = next((config[k] for k in EXPERT_COUNTS if type(config.get(k)) is int), None)
    problems: list[str] = []
    for path, indices in found.items():
        count = max(indices) + 1 if declared is None else declared
        missing = sorted(set(range(min(count, 1 << 16))) - indices)
        extra = sorted(indices - set(range(count)))
        for numbers, word in ((missing, "missing"), (extra, "too many")):
            if numbers:
                problems.append(f"{path}: experts {_some(numbers)} {word}")
    if problems:
        raise FormatError(
            where,
            "; ".join(problems[:100]) + (" ..." if len(problems) > 100 else ""),
            f"{declared or 'all'} experts in every layer, numbered from 0",
            "the checkpoint is incomplete, or its config belongs to another one",
        )


def _some(numbers: list[int]) -> str:
    """A list as text, neighbours as ranges; past the most experts a layer has, how many more."""
    ranges: list[str] = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        ranges += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    more = len(ranges) - 256
    shown = ", ".join(ranges[:256])
    return f"[{shown}]" + (f" and {more} more" if more > 0 else "")


def fill_cold_experts(groups: Mapping[str, dict[str, RawTensor]]) -> None:
    """Give experts that calibration never reached the activation scale of the others, in place.

    Such an expert has no ``input_scale``, or one that is 0 or infinite; it takes the largest of its
    layer and projection (the smallest where reciprocals are stored).  One that lacks other tensors
    too is quantized in another way, or not at all.
    """
    columns: dict[str, list[str]] = {}
    for path in groups:
        cut = re.fullmatch(r"(.*\.experts)\.\d+\.(.*)", path)
        if cut:
            columns.setdefault(f"{cut[1]}.*.{cut[2]}", []).append(path)
    for name, paths in columns.items():
        for suffix, choose in (("input_scale", max), ("input_global_scale", min)):
            present = {path: groups[path][suffix] for path in paths if suffix in groups[path]}
            warm: list[tuple[float, RawTensor]] = []
            for tensor in present.values():
                value = float(np.max(tensor.read().astype(np.float32), initial=0))
                if np.isfinite(value) and value > 0:
                    warm.append((value, tensor))
            if not warm:
                continue
            donor = choose(warm, key=lambda pair: pair[0])[1]
            known = {id(tensor) for _, tensor in warm}
            like = next(set(groups[path]) for path, t in present.items() if t is donor)
            cold = [
                p
                for p in paths
                if p not in present and like <= {*groups[p], suffix, "pre_quant_scale"}
            ]
            cold += [path for path, tensor in present.items() if id(tensor) not in known]
            if not cold:
                continue
            warnings.warn(
                f"{donor.file}: {name}: {len(cold)} experts have no usable {suffix}; they take "
                f"{donor.name}",
                FormatWarning,
                stacklevel=4,
            )
            for path in cold:
                groups[path][suffix] = donor
