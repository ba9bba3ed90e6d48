"""Writing a checkpoint in a format that other tools read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.arguments import path_of
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import Scheme
from jaxquant.convert.fresh import fresh_directory, refuse_existing
from jaxquant.convert.gguf_export import export_gguf
from jaxquant.convert.gguf_tokenizer import metadata_of, special_ids
from jaxquant.convert.item import Item, ModelSource, scheme_item, signature
from jaxquant.convert.load import ReadAhead, tokenizer_of
from jaxquant.convert.name_map import NameMap
from jaxquant.convert.names import published
from jaxquant.convert.plan_file import read_plan
from jaxquant.convert.progress import byte_progress
from jaxquant.convert.read import EMBEDDINGS, USUALLY_DENSE
from jaxquant.convert.read_checkpoint import member_file
from jaxquant.convert.read_kv import is_kv_scale
from jaxquant.convert.save import is_saved
from jaxquant.convert.saved_source import saved_source
from jaxquant.convert.source import open_source
from jaxquant.convert.write_safetensors import Entry, Piece, write_safetensors
from jaxquant.errors import ConfigError, FormatError
from jaxquant.formats.arrange import Arrangement, same
from jaxquant.formats.base import Format, FormatWarning, Spec, by_auto_round, disk_dtype
from jaxquant.formats.dense import DENSE
from jaxquant.formats.scaled import Side
from jaxquant.formats.targets import TARGETS, Target
from jaxquant.transforms.numeric import as_numpy

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a checkpoint that no quantization changes."""
_OLD_CONFIGS = ("quantization_config", "compression_config")


def export_pretrained(
    source: str | Path,
    path: str | Path,
    *,
    format: str,
    scheme: Scheme | str | None = None,
    plan: str | Path | None = None,
    names: NameMap | str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    kind: str | None = None,
) -> None:
    """Write a checkpoint that other tools read, one tensor at a time.

    Weights that are quantized keep their codes and scales bit for bit, in the arrangement of the
    format; one that it cannot hold is an error, never rounded.  Linears that are not quantized,
    embeddings and norms stay as they are and stand in the format's list of ignored modules.

    Args:
        source: a checkpoint directory or ``.gguf`` file, or a directory that ``save_pretrained``
            wrote, which is read whole.
        path: the directory (for GGUF the file) to create.
        format: "compressed-tensors", "gptq", "awq", "fp8" or "gguf".
        scheme: quantizes every linear of the layers but routers first, by round-to-nearest, also
            those that are quantized already.  Not for GGUF.
        plan: YAML file that mixes weights of several checkpoints, as for ``from_pretrained``.
        names: what the source's tensors are called in the model, as for ``from_pretrained``.
        config: content or path of a ``config.json`` for a ``.gguf`` file, as there.
        kind: for GGUF: Q8_0, Q4_0, F32, F16 or BF16 for all weights; None keeps every weight
            exactly, in its own blocks where GGUF has them and as floats where it has not.
    Raises:
        FormatError: ``path`` exists, a file breaks its format, or the format cannot hold a weight;
            names the module, its layout, what the format holds and what to do.
        ConfigError: an unknown format, scheme or kind, or a model that GGUF has no names for.
        PlanError: the plan cannot be met.
    """
    if not isinstance(source, str | os.PathLike):
        action = "write the model with jaxquant.save_pretrained and pass that directory"
        found, rule = type(source).__name__, "a checkpoint on disk is needed"
        raise ConfigError("source", found, rule, action)
    source, path = path_of("source", source), path_of("path", path)
    if format not in (*TARGETS, "gguf"):
        raise ConfigError("format", repr(format), f"one of {', '.join((*TARGETS, 'gguf'))}")
    if kind is not None and format != "gguf":
        raise ConfigError("kind", repr(kind), "a type of GGUF", "use scheme with other formats")
    if scheme is not None and format == "gguf":
        raise ConfigError("scheme", repr(scheme), "GGUF has types of its own", "use kind")
    chosen = None if scheme is None else Scheme.parse(scheme)
    refuse_existing(path)
    if is_saved(source):
        for option, value in (("plan", plan), ("names", names), ("config", config)):
            if value is not None:
                rule = f"{source} is converted already"
                raise ConfigError(option, str(value)[:200], rule, "use the original checkpoint")
        opened = saved_source(source)
    else:
        mixed = None if plan is None else read_plan(plan)
        opened = open_source(source, mixed, names, config)
    total = sum(item.nbytes for item in (*opened.arrays.values(), *opened.weights.values()))
    with byte_progress(f"exporting {Path(source).name}", total) as advance:
        if format == "gguf":
            _export_gguf(opened, path, kind, advance)
        else:
            _export_directory(opened, path, TARGETS[format], chosen, advance)


def _export_gguf(
    source: ModelSource, path: Path, kind: str | None, advance: Callable[[int], None]
) -> None:
    items = {**source.arrays, **source.weights}

    def load(name: str) -> Any:
        advance(items[name].nbytes)
        return items[name].load()

    export_gguf(
        path,
        source.config,
        {name: item.abstract for name, item in source.weights.items()},
        {name: item.abstract for name, item in source.arrays.items()},
        load,
        kind=kind,
        metadata=_tokenizer_metadata(source),
    )


def _tokenizer_metadata(source: ModelSource) -> dict[str, Any]:
    """A checkpoint's tokenizer as GGUF metadata; {} and a warning where it has no form."""
    try:
        tokenizer = tokenizer_of(source.path)
        if tokenizer is None:
            return {}
        special = special_ids(tokenizer.backend, tokenizer.special)
        if source.config.eos:
            special["eos"] = source.config.eos[0]
        return metadata_of(tokenizer.backend, special, tokenizer.chat_template)
    except FormatError as error:
        warnings.warn(f"exported without a tokenizer: {error}", FormatWarning, stacklevel=5)
        return {}


def _export_directory(
    source: ModelSource,
    path: Path,
    target: Target,
    scheme: Scheme | None,
    advance: Callable[[int], None],
) -> None:
    weights = {
        name: _requantized(name, item, target, scheme) for name, item in source.weights.items()
    }
    arrays = dict(source.arrays)
    cache = {name: item for name, item in arrays.items() if is_kv_scale(name)}
    if cache and not target.cache:
        warnings.warn(
            f"{target.format.name} has no place for the {len(cache)} scales of the key-value "
            f"cache, e.g. {next(iter(cache))}; they are left out",
            FormatWarning,
            stacklevel=4,
        )
        arrays = {name: item for name, item in arrays.items() if name not in cache}
        cache = {}
    family = source.config.family
    plan, dense = _arranged(weights, target, family)
    if "lm_head" not in (*plan, *dense):
        # Tied to the embedding, yet a linear of its own to tools that go by the kind of module.
        dense.append("lm_head")
    modules = (name.removesuffix(".weight") for name in arrays)
    dense += [published(name, family) for name in modules if EMBEDDINGS.search(name)]
    shape = next((tuple(item.abstract.shape) for item in cache.values()), None)
    config, plan = target.describe(plan, dense, shape)
    items = {**arrays, **weights}
    with ReadAhead(items, items, advance) as load:
        pieces = [
            _weight_piece(name, published(name, family), item, plan, target, load)
            if name in weights
            else _array_piece(name, published(name, family), item, load)
            for name, item in items.items()
        ]
        with fresh_directory(path) as folder:
            write_safetensors(folder, pieces)
            _write_config(folder, source, config)
            _copy_files(folder, source)


def _requantized(name: str, item: Item, target: Target, scheme: Scheme | None) -> Item:
    """The weight as ``scheme`` has it, where it applies."""
    if scheme is None or USUALLY_DENSE.search(name) or not name.startswith("model.layers."):
        return item
    try:
        return scheme_item(item, scheme, None if scheme.block is None else target.scale_dtype)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.where}", error.found, error.rule, error.action) from None


def _arranged(
    weights: Mapping[str, Item], target: Target, family: str
) -> tuple[dict[str, Arrangement], list[str]]:
    """How the target holds each quantized weight, by published path, and all other paths.

    Raises:
        FormatError: it cannot hold one, or there is none.
    """
    plan: dict[str, Arrangement] = {}
    dense: list[str] = []
    problems: list[tuple[str, QTensor, str]] = []
    known: dict[Any, Arrangement | str] = {}
    for name, item in weights.items():
        q, path = item.abstract, published(name, family)
        if q.layout.dense:
            dense.append(path)
            continue
        key = signature(q)
        if key not in known:
            known[key] = target.arrange(q)
        found = known[key]
        if isinstance(found, str):
            problems.append((path, q, found))
        else:
            plan[path] = found
    if problems:
        path, q, reason = problems[0]
        more = f", and {len(problems) - 1} more modules" if len(problems) > 1 else ""
        raise FormatError(
            f"{path}: {q.layout}",
            f"{reason}{more}",
            f"{target.format.name} holds {target.holds}",
            f"quantize again with --scheme {target.scheme}, or choose another --format",
        )
    if not plan:
        raise FormatError(
            target.format.name,
            "no weight of the checkpoint is quantized",
            "only quantized weights have this format",
            f"quantize them with --scheme {target.scheme}",
        )
    return plan, dense


def _weight_piece(
    name: str,
    path: str,
    item: Item,
    plan: Mapping[str, Arrangement],
    target: Target,
    load: Callable[[str], Any],
) -> Piece:
    q = item.abstract
    if path in plan:
        fmt, arrangement = target.format, plan[path]
    else:
        fmt, arrangement = DENSE, Arrangement(same, Spec(kind="dense", code=q.layout.code))

    def encoded() -> dict[str, np.ndarray]:
        arrays = fmt.encode(arrangement.adapt(as_numpy(load(name))), arrangement.spec)
        return {f"{path}.{suffix}": array for suffix, array in arrays.items()}

    return Piece(_entries(path, fmt, arrangement, q.shape), encoded)


def _entries(
    path: str, fmt: Format, arrangement: Arrangement, shape: tuple[int, ...]
) -> tuple[Entry, ...]:
    """The headers of one weight; where the spec describes a tensor, its word counts."""
    spec = arrangement.spec
    fields = (getattr(spec, field.name) for field in dataclasses.fields(spec))
    sides = {side.suffix: side for side in fields if isinstance(side, Side)}
    entries = []
    for slot in fmt.slots(spec, (shape[0], shape[1])):
        side = sides.get(slot.suffix) or Side(slot.suffix, slot.dtypes[0], slot.shapes[0])
        entries.append(Entry(f"{path}.{slot.suffix}", side.dtype, side.shape))
    return tuple(entries)


def _array_piece(name: str, written: str, item: Item, load: Callable[[str], Any]) -> Piece:
    """An array as it is; the scale of a whole key-value cache as a vector of one."""
    shape = tuple(item.abstract.shape)
    shape = (1,) if is_kv_scale(name) and shape == () else shape
    entry = Entry(written, disk_dtype(item.abstract.dtype), shape)
    return Piece((entry,), lambda: {written: np.asarray(load(name)).reshape(shape)})


def _write_config(folder: Path, source: ModelSource, quantization: Mapping[str, Any]) -> None:
    config = {k: v for k, v in source.published.items() if k not in _OLD_CONFIGS}
    old, new = source.published.get("quantization_config"), dict(quantization)
    if isinstance(old, Mapping) and by_auto_round(old):
        # Its scales have both signs, which readers that check them must know.
        new["provider"] = "auto-round"
    text = json.dumps({**config, "quantization_config": new}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _copy_files(folder: Path, source: ModelSource) -> None:
    """Tokenizer and generation files; a GGUF file's tokenizer is written as a directory has it."""
    if source.path.is_dir():
        for name in COPIED:
            if (source.path / name).exists():
                shutil.copyfile(member_file(source.path, name, str(source.path)), folder / name)
    elif (tokenizer := tokenizer_of(source.path)) is not None:
        tokenizer.save(folder)
