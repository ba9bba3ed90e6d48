"""What a checkpoint is made of: every linear with its format, and all other tensors as they are.

>>> checkpoint = open_checkpoint("Qwen3-8B-FP8")                                 # doctest: +SKIP
>>> modules(checkpoint)["model.layers.0.self_attn.q_proj"].layout                # doctest: +SKIP
e4m3[out,in] scale 128x128
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxquant.arguments import path_of
from jaxquant.arrays.layout import Layout
from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.module_warnings import warn_once
from jaxquant.convert.name_map import NameMap, renamed
from jaxquant.convert.read_checkpoint import Checkpoint as Checkpoint
from jaxquant.convert.read_checkpoint import open_checkpoint as open_checkpoint
from jaxquant.convert.read_experts import (
    check_expert_indices,
    expand_experts,
    fill_cold_experts,
)
from jaxquant.convert.read_gguf import read_gguf_quantized
from jaxquant.convert.read_kv import kv_scales as kv_scales
from jaxquant.errors import FormatError, LayoutError, within
from jaxquant.formats import FORMATS, detect
from jaxquant.formats.base import (
    DENSE_DTYPES,
    Coverage,
    Format,
    FormatWarning,
    RawModule,
    RawTensor,
    Spec,
)
from jaxquant.formats.checks import verify
from jaxquant.formats.dense import DENSE
from jaxquant.formats.names import by_ending, by_substring, ignored_by, whole_entries

EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|wpe|embed_in|embed_out_tokens"
    r"|embeddings|embedding|position_embeddings|embed_positions|token_type_embeddings)$"
)
USUALLY_DENSE = re.compile(r"(^|\.)(lm_head|gate|router|shared_expert_gate|eh_proj|head)$")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
ATTENTION_MODELS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """One linear of a checkpoint, not read yet.

    Attributes:
        path: module path as the checkpoint names it.
        format: its format; ``dense`` for an unquantized weight.
        spec: how the format arranges it.
        raw: suffix -> tensor.
        shape: logical (out, in).
    """

    path: str
    format: Format
    spec: Spec
    raw: Mapping[str, RawTensor]
    shape: tuple[int, int]

    @property
    def layout(self) -> Layout:
        """Layout of the loaded QTensor."""
        return self.spec.layout(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.raw.values())

    def abstract(self) -> QTensor:
        """The loaded QTensor with ``jax.ShapeDtypeStruct`` leaves; reads nothing."""
        return self.spec.abstract(self.shape)

    def load(self) -> QTensor:
        """Read and decode the weight: NumPy leaves, views of the file where that is possible.

        Raises:
            FormatError: the data breaks the format; names file, module and leaf.
        """
        arrays = {suffix: tensor.read() for suffix, tensor in self.raw.items()}
        try:
            return verify(self.format.decode(arrays, self.spec, self.shape), self.spec)
        except (FormatError, LayoutError) as error:
            file = next(iter(self.raw.values())).file
            where = f"{file}: {self.path}: {error.where}"
            raise FormatError(where, error.found, error.rule, error.action) from None


class Contents(NamedTuple):
    """All of a checkpoint, each tensor on exactly one side.

    Attributes:
        modules: every linear by module path.
        tensors: every other tensor by full name: norms, embeddings, biases, KV scales ...
        idle: names among ``tensors`` that a model has no use for, and why.
    """

    modules: dict[str, QuantizedModule]
    tensors: dict[str, RawTensor]
    idle: dict[str, str]


def _split(name: str, suffixes: frozenset[str], deepest: int) -> tuple[str, str] | None:
    """Cut a tensor name into module path and known suffix, the longest suffix that is known."""
    parts = name.split(".")
    for count in range(min(deepest, len(parts) - 1), 0, -1):
        suffix = ".".join(parts[-count:])
        if suffix in suffixes:
            return ".".join(parts[:-count]), suffix
    return None


def _group(
    tensors: Mapping[str, RawTensor], suffixes: Iterable[str]
) -> tuple[dict[str, dict[str, RawTensor]], dict[str, RawTensor]]:
    known = frozenset(suffixes) | {"weight"}
    deepest = max(suffix.count(".") + 1 for suffix in known)
    groups: dict[str, dict[str, RawTensor]] = {}
    rest: dict[str, RawTensor] = {}
    for name, tensor in tensors.items():
        cut = _split(name, known, deepest)
        if cut is None:
            rest[name] = tensor
        else:
            groups.setdefault(cut[0], {})[cut[1]] = tensor
    return groups, rest


def _is_marked(fmt: Format, tensors: Mapping[str, RawTensor]) -> bool:
    """Whether a module has a tensor that only quantized modules have."""
    weight = tensors.get("weight")
    odd = weight is not None and weight.dtype not in DENSE_DTYPES and len(weight.shape) > 1
    return odd or any(marker in tensors for marker in fmt.markers)


def _is_linear(path: str, tensors: Mapping[str, RawTensor]) -> bool:
    weight = tensors.get("weight")
    return (
        weight is not None
        and len(weight.shape) == 2
        and weight.dtype in DENSE_DTYPES
        and EMBEDDINGS.search(path) is None
    )


def build_module(fmt: Format, spec: Spec, raw: RawModule) -> QuantizedModule:
    """Check a module's tensors against its slots.

    Raises:
        FormatError: a slot is missing, or has another dtype or shape; names slot and path.
    """
    shape = fmt.shape(spec, raw)
    claimed: dict[str, RawTensor] = {}
    for slot in fmt.slots(spec, shape):
        tensor = raw.need(slot.suffix) if slot.required else raw.get(slot.suffix)
        if tensor is None:
            continue
        if tensor.dtype not in slot.dtypes:
            raise tensor.error(f"dtype {tensor.dtype}", f"{' or '.join(slot.dtypes)}")
        if slot.shapes and tensor.shape not in slot.shapes:
            expected = " or ".join(str(list(s)) for s in slot.shapes)
            raise tensor.error(f"shape {list(tensor.shape)}", expected)
        claimed[slot.suffix] = tensor
    return QuantizedModule(raw.path, fmt, spec, claimed, shape)


def _quantized(
    fmt: Format,
    config: Mapping[str, Any],
    coverage: Coverage,
    whole: frozenset[str],
    raw: RawModule,
) -> QuantizedModule:
    if whole:
        kept = (e for e in coverage.ignored if e not in whole or by_ending(e, raw.path))
        coverage = coverage._replace(ignored=tuple(kept))
    entry = ignored_by(coverage, raw.path)
    if entry is not None:
        found = f"the config ignores it by {entry!r}"
        if coverage.matches is by_substring and not by_ending(entry, raw.path):
            found += ", which its name contains, and which names no unquantized module as a whole"
        raise raw.error(
            f"quantized tensors {sorted(raw.tensors)}",
            found,
            "config and tensors contradict each other: correct the ignore list",
        )
    if fmt is DENSE:
        raise raw.error(
            f"quantized tensors {sorted(raw.tensors)}",
            "the checkpoint has no quantization_config",
            "add the quantizer's config to config.json",
        )
    if "weight" not in fmt.suffixes and not raw.tensors.keys() & {*fmt.markers}:
        return build_module(DENSE, DENSE.spec(config, raw), raw)  # which refuses its dtype
    spec = fmt.spec(config, raw)
    if spec is None:
        raise raw.error(
            f"quantized tensors {sorted(raw.tensors)}",
            "the config does not mean this module to be quantized",
            "config and tensors contradict each other: correct the targets",
        )
    return build_module(DENSE if spec.kind == "dense" else fmt, spec, raw)


def _idle(fmt: Format, module: QuantizedModule, suffix: str, tensor: RawTensor) -> str | None:
    """Why a model has no use for a tensor that stands beside a weight, or None where it has."""
    if module.format is DENSE and suffix in (*fmt.markers, *fmt.idle):
        return "an observer's; the weight is not quantized"
    if suffix not in fmt.idle or (suffix.endswith("zero_point") and tensor.read().any()):
        return None
    return "the config does not use it"


def survey(checkpoint: Checkpoint) -> Contents:
    """Sort every tensor of a checkpoint: linears with their formats, and the rest.

    Stacked experts come as one module an expert (``….experts.3.gate_proj``).

    Raises:
        FormatError: a module contradicts its format or the config.
    """
    with within(checkpoint.path, f"{checkpoint.path / checkpoint.quant_file}: "):
        return _survey(checkpoint)


def _survey(checkpoint: Checkpoint) -> Contents:
    config = checkpoint.quant_config or {}
    fmt = detect(config) if config else DENSE
    coverage = fmt.coverage(config)
    expanded = expand_experts(checkpoint.tensors, checkpoint.config)
    groups, rest = _group(expanded, fmt.suffixes)
    _refuse_other_methods(fmt, rest)
    fill_cold_experts(groups)
    modules: dict[str, QuantizedModule] = {}
    idle: dict[str, str] = {}
    unquantized: list[str] = []
    dense = (p for p, t in groups.items() if not _is_marked(fmt, t) and _is_linear(p, t))
    whole = whole_entries(coverage, dense)
    with warn_once(stacklevel=4) as current:
        for path, tensors in groups.items():
            current.path = path
            raw = RawModule(path, tensors, checkpoint.config)
            if _is_marked(fmt, tensors) and not (path.endswith("norm") and len(tensors) == 1):
                module = _quantized(fmt, config, coverage, whole, raw)
            elif _is_linear(path, tensors):
                module = build_module(DENSE, DENSE.spec(config, raw), raw)
                if fmt is not DENSE and not USUALLY_DENSE.search(path) and coverage.targeted(path):
                    unquantized.append(path)
            else:
                rest |= {tensor.name: tensor for tensor in tensors.values()}
                continue
            modules[path] = module
            for suffix, tensor in tensors.items():
                if suffix in module.raw:
                    continue
                rest[tensor.name] = tensor
                if reason := _idle(fmt, module, suffix, tensor):
                    idle[tensor.name] = reason
    _warn_unquantized(checkpoint, coverage, unquantized)
    _warn_unmatched(checkpoint, coverage, [*groups])
    check_expert_indices(modules, checkpoint.config, str(checkpoint.path))
    _check_heads(checkpoint, modules)
    return Contents(modules, rest, idle)


def _refuse_other_methods(fmt: Format, rest: Mapping[str, RawTensor]) -> None:
    """Codes under a name that only other methods give them are not an unknown tensor."""
    for name, tensor in rest.items():
        if tensor.dtype in INTEGERS and len(tensor.shape) > 1:
            markers = [(f.name, marker) for f in FORMATS for marker in f.markers]
            methods = [method for method, marker in markers if name.endswith(f".{marker}")]
            if methods:
                raise tensor.error(
                    f"quantized weights of {' or '.join(methods)}",
                    "the checkpoint has no quantization_config"
                    if fmt is DENSE
                    else f"the config describes {fmt.name}",
                    "put the quantizer's own config into config.json",
                )


def _warn_unquantized(checkpoint: Checkpoint, coverage: Coverage, paths: list[str]) -> None:
    odd = [path for path in paths if ignored_by(coverage, path) is None]
    if odd:
        warnings.warn(
            f"{checkpoint.path}: the config means {len(odd)} modules to be quantized that have "
            f"plain 16-bit weights, e.g. {odd[0]}; they are used as they are",
            FormatWarning,
            stacklevel=5,
        )


def _warn_unmatched(checkpoint: Checkpoint, coverage: Coverage, paths: list[str]) -> None:
    entries = [e for e in coverage.ignored if not re.search(r"lm_head|embed|vis", e)]
    if not entries:
        return
    parents = {path.rpartition(".")[0] for path in paths}
    known = [*paths, *parents, *{parent.rpartition(".")[0] for parent in parents}]
    if not any(ignored_by(coverage._replace(ignored=tuple(entries)), path) for path in known):
        warnings.warn(
            f"{checkpoint.path}: no entry of the ignore list matches a module, e.g. "
            f"{entries[0]!r}: is the root of its names another one?",
            FormatWarning,
            stacklevel=5,
        )


def _check_heads(checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule]) -> None:
    """The rows of ``k_proj`` are the config's key heads (not so in a pre-sharded file)."""
    config = checkpoint.config
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    hidden, width = config.get("hidden_size"), config.get("head_dim")
    if config.get("model_type") not in ATTENTION_MODELS or type(kv_heads) is not int:
        return
    if type(width) is not int:
        if type(heads) is not int or type(hidden) is not int or heads < 1:
            return
        width = hidden // heads
    for path, module in modules.items():
        if path.endswith("self_attn.k_proj") and module.shape[0] != kv_heads * width:
            raise FormatError(
                f"{next(iter(module.raw.values())).file}: {path}",
                f"{module.shape[0]} rows",
                f"num_key_value_heads x head_dim = {kv_heads} x {width}",
                "the file may be one shard of a tensor-parallel export",
            )


def modules(checkpoint: Checkpoint) -> dict[str, QuantizedModule]:
    """Every linear of a checkpoint by module path, not read yet."""
    return survey(checkpoint).modules


def read_quantized(
    path: str | Path, *, names: NameMap | str | Path | None = None
) -> dict[str, QTensor]:
    """Read every linear of a checkpoint directory or ``.gguf`` file.

    Args:
        path: a directory of safetensors, or a GGUF file (of any architecture).
        names: a name map, or a YAML file with one (see :mod:`jaxquant.convert.name_map`); modules
            that it does not mention keep their names.
    Returns:
        module path -> weight; unquantized linears are dense.  Leaves are NumPy arrays.  A GGUF
        file's own names and row order are kept (``blk.0.attn_q``), its experts stay stacked.
    Raises:
        FormatError: the checkpoint breaks its format.
        ConfigError: an entry of ``names`` is not valid.
        PlanError: entries of ``names`` that fit nothing, disagree or make two names one.
    """
    path = path_of("path", path)
    if path.suffix == ".gguf":
        return read_gguf_quantized(path, names)
    contents = survey(open_checkpoint(path))
    new = renamed(names, contents.modules, contents.tensors, str(path)).modules
    return {new.get(name, name): module.load() for name, module in contents.modules.items()}
