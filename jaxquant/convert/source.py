"""A source of a model: its config, every weight and array by module-tree name, all unread.

Directories of safetensors, GGUF files and mixed-precision plans all become one of these, and
loading does not know which it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant.convert.gguf_model import open_gguf_model
from jaxquant.convert.item import Item, ModelSource
from jaxquant.convert.mix import mixed
from jaxquant.convert.name_map import NameMap, renamed
from jaxquant.convert.names import LANGUAGE_ROOTS, canonical, ignored
from jaxquant.convert.plan_file import PrecisionPlan
from jaxquant.convert.read import EMBEDDINGS, QuantizedModule, survey
from jaxquant.convert.read_checkpoint import Checkpoint, open_checkpoint
from jaxquant.convert.read_json import load_object
from jaxquant.convert.read_kv import is_kv_scale, is_kv_zero, kv_cache_scheme, kv_scales
from jaxquant.errors import ConfigError, FormatError, PlanError, within
from jaxquant.formats.base import FormatWarning, RawTensor, numpy_dtype
from jaxquant.models import ModelConfig


def _module_item(module: QuantizedModule, origin: str) -> Item:
    def release() -> None:
        for tensor in module.raw.values():
            tensor.release()

    name = module.format.name
    return Item(module.abstract(), module.load, module.nbytes, name, origin, release)


def _array_item(tensor: RawTensor, origin: str) -> Item:
    shape = jax.ShapeDtypeStruct(tensor.shape, numpy_dtype(tensor.dtype))
    return Item(shape, tensor.read, tensor.nbytes, "array", origin, tensor.release)


def _loaded_item(value: np.ndarray, origin: str) -> Item:
    shape = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return Item(shape, lambda: value, value.nbytes, "array", origin)


def _generation_config(path: Path) -> dict[str, Any] | None:
    """``generation_config.json``, whose stop tokens go before the config's; None where absent."""
    file = path / "generation_config.json"
    return load_object(file) if file.is_file() else None


def _directory_source(path: Path, names: NameMap | str | Path | None) -> ModelSource:
    checkpoint = open_checkpoint(path)
    with within(path, f"{path}/"):
        config = ModelConfig.from_hf(checkpoint.config, _generation_config(path))
    where = str(path / "config.json")
    _check_count(config.num_layers, "layers", len(checkpoint.tensors), where)
    contents = survey(checkpoint)
    if config.moe is not None:
        experts = config.moe.routing.experts * sum(config.moe_layers)
        _check_count(experts, "experts in all layers", len(contents.modules), where)
    new = renamed(names, contents.modules, contents.tensors, str(path))
    tensors = {n: t for n, t in contents.tensors.items() if not is_kv_scale(n)}
    left_out = {n: "an offset of zero" for n, t in tensors.items() if is_kv_zero(t)}
    tensors = {n: t for n, t in tensors.items() if n not in left_out}
    embeddings = {
        n: f"{to}.weight"
        for n, to in new.modules.items()
        if EMBEDDINGS.search(to) and contents.modules[n].format.name == "dense"
    }
    tensors |= {f"{n}.weight": contents.modules[n].raw["weight"] for n in embeddings}
    targets = new.tensors | {f"{n}.weight": to for n, to in embeddings.items()}
    linears = {n: m for n, m in contents.modules.items() if n not in embeddings}
    for name, module in linears.items():
        if (new.modules.get(name) or canonical(name)) == "model.embed_tokens":
            raise FormatError(
                f"{next(iter(module.raw.values())).file}: {name}",
                f"an embedding in {module.format.name}, {module.layout}",
                "a model takes whole rows of it, of 16 or 32 bits",
                "quantize again with the embedding among the ignored modules",
            )
    apart = checkpoint.several and any(n.startswith(LANGUAGE_ROOTS) for n in contents.modules)
    weights: dict[str, Item] = {}
    arrays: dict[str, Item] = {}
    problems = []
    for table, given, pieces in (
        (weights, new.modules, ((n, _module_item(m, str(path))) for n, m in linears.items())),
        (arrays, targets, ((n, _array_item(t, str(path))) for n, t in tensors.items())),
    ):
        for name, item in pieces:
            known = given.get(name) or canonical(name)
            reason = contents.idle.get(name) or ignored(known, config)
            if apart and name not in given and not name.startswith((*LANGUAGE_ROOTS, "lm_head")):
                reason = "no part of the language model"
            if reason is not None:
                left_out[name] = reason
            elif known in table:
                problems.append(f"{name}: a second tensor for {known}")
            else:
                table[known] = item
    attention = {n.rpartition(".")[0]: to.rpartition(".")[0] for n, to in new.modules.items()}
    for layer, scales in kv_scales(checkpoint).items():
        owner = attention.get(layer) or canonical(layer)
        reason = ignored(f"{owner}.k_scale", config) or _no_fp8_cache(checkpoint, config)
        for part, value in (("k", scales.k), ("v", scales.v)):
            if reason is not None:
                left_out[f"{layer}.{part}_scale"] = reason
            else:
                arrays[f"{owner}.{part}_scale"] = _loaded_item(value, str(path))
        for part, value in (("q", scales.q), ("prob", scales.prob)):
            if value is not None:
                left_out[f"{layer}.{part}_scale"] = "queries and attention weights stay unquantized"
    if problems:
        raise PlanError(str(path), problems, "two names of the checkpoint mean the same weight")
    if config.tied and "lm_head" in weights and _is_tied(weights["lm_head"], arrays, str(path)):
        left_out["lm_head"] = "tied to the embedding"
        del weights["lm_head"]
    return ModelSource(path, config, checkpoint.config, weights, arrays, left_out)


def _no_fp8_cache(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Why a checkpoint's scales of a key-value cache are not those of the model's fp8 one."""
    if config.latent is not None:
        return "the cache of latent attention stays unquantized"
    if kv_cache_scheme(checkpoint) == "nvfp4":
        # Values over such a scale reach 6 x 448, which e4m3 codes would clip.
        return "the second level of an NVFP4 cache; the cache stays unquantized"
    return None


def _is_tied(head: Item, arrays: Mapping[str, Item], where: str) -> bool:
    """Whether a stored output layer is the embedding again; one of its own is used, as its config
    is then wrong (transformers does the same).
    """
    if head.format != "dense":
        return False
    embedding = arrays.get("model.embed_tokens.weight")
    if embedding is None:
        return True
    a, b = head.load().data[0], embedding.load()
    rows = range(0, len(a), 4096)
    same = a.shape == b.shape and all(
        np.array_equal(*(part[i : i + 4096].astype(np.float32) for part in (a, b))) for i in rows
    )
    head.release()
    embedding.release()
    if same:
        return True
    warnings.warn(
        f"{where}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; it "
        "is used as the output layer",
        FormatWarning,
        stacklevel=5,
    )
    return False


def _check_count(found: int, what: str, held: int, where: str) -> None:
    """Refuse a config that asks for more layers or experts than could be there.

    Every missing tensor would be listed otherwise.
    """
    if found > held:
        raise ConfigError(
            where,
            f"{found} {what}",
            f"the checkpoint has {held} tensors for them",
            "the config belongs to another checkpoint, or files are missing",
        )


def _gguf_source(
    path: Path, names: NameMap | str | Path | None, config: Mapping[str, Any] | str | Path | None
) -> ModelSource:
    known = load_object(Path(config)) if isinstance(config, str | Path) else config
    if known is not None:
        given = ModelConfig.from_hf(known)
        defaults = {"model_type": given.family, "num_key_value_heads": given.num_kv_heads}
        known = {**defaults, **known}
    model = open_gguf_model(path, names, known)
    items = {
        name: Item(
            piece.abstract,
            piece.load,
            sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(piece.abstract)),
            "gguf",
            str(path),
        )
        for name, piece in model.pieces.items()
    }
    weights = {name: items[name] for name in model.weights}
    arrays = {name: items[name] for name in model.arrays}
    with within(path, f"{path}: "):
        parsed = ModelConfig.from_hf(model.config)
    return ModelSource(path, parsed, model.config, weights, arrays, {})


def open_source(
    path: str | Path,
    plan: PrecisionPlan | None = None,
    names: NameMap | str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
) -> ModelSource:
    """Open a checkpoint directory or ``.gguf`` file, mixed with others where there is a plan.

    Args:
        path: the checkpoint.
        plan: which weights come from elsewhere.
        names: name map of this checkpoint (not of the plan's others); see
            :mod:`jaxquant.convert.name_map`.
        config: content of a ``config.json``, or its path, for a ``.gguf`` file.
    Raises:
        FormatError: a file or config breaks its rules.
        ConfigError: an architecture that is not known, or a config for a directory.
        PlanError: names that do not fit together, or a plan that cannot be met; all problems.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        opened = _gguf_source(path, names, config)
    elif config is None:
        opened = _directory_source(path, names)
    else:
        rule = f"{path} is a directory, with a config.json of its own"
        raise ConfigError("config", str(config)[:200], rule, "change that file")
    if plan is None:
        return opened
    sources = {opened.path.resolve(): opened}
    for other in plan.sources.values():
        if other.resolve() not in sources:
            sources[other.resolve()] = open_source(other)
    return mixed(opened, plan, sources)
