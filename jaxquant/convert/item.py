"""What a source of a model holds: weights and arrays, described and unread."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant.arrays.scheme import Scheme
from jaxquant.models import ModelConfig
from jaxquant.transforms.numeric import as_numpy, requantize


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that can be loaded.

    Attributes:
        abstract: a QTensor of ``jax.ShapeDtypeStruct`` leaves, or one ``jax.ShapeDtypeStruct``.
        load: returns it with NumPy leaves.
        nbytes: bytes on disk.
        format: short name of the format, "array" for what is no linear weight.
        origin: the checkpoint it comes from.
        release: gives back the memory of the file behind what was loaded.
    """

    abstract: Any
    load: Callable[[], Any] = dataclasses.field(repr=False)
    nbytes: int
    format: str
    origin: str
    release: Callable[[], None] = dataclasses.field(default=lambda: None, repr=False)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Everything a model is built from.

    Attributes:
        path: the checkpoint that config and tokenizer come from.
        config: the model's config.
        published: its config.json, or what a GGUF file's metadata say in that form.
        weights: linear weights ``[out, in]`` by module path.
        arrays: all other arrays by name.
        ignored: name -> why it takes no part.
    """

    path: Path
    config: ModelConfig
    published: Mapping[str, Any] = dataclasses.field(repr=False)
    weights: Mapping[str, Item]
    arrays: Mapping[str, Item]
    ignored: Mapping[str, str]


def _convert(q: Any, scheme: Scheme, scale_dtype: str | None) -> Any:
    made = requantize(q, scheme)
    if scale_dtype is None:
        return made
    scales = tuple(scale.astype(scale_dtype) for scale in made.scales)
    return dataclasses.replace(made, scales=scales)


@functools.lru_cache(256)
def _converted(structure: Any, leaves: Any, scheme: Scheme, scale_dtype: str | None) -> Any:
    """The abstract result of :func:`_convert`, traced once for all weights of a shape."""
    q = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(lambda q: _convert(q, scheme, scale_dtype), q)


def scheme_item(item: Item, scheme: Scheme, scale_dtype: str | None = None) -> Item:
    """Quantize a weight here, rounding to nearest.

    Args:
        item: any weight.
        scheme: what it becomes.
        scale_dtype: dtype of its scales, None for the scheme's own.
    """
    structure, leaves = signature(item.abstract)
    return Item(
        _converted(structure, leaves, scheme, scale_dtype),
        lambda: as_numpy(_convert(item.load(), scheme, scale_dtype)),
        item.nbytes,
        str(scheme),
        item.origin,
        item.release,
    )


def signature(q: Any) -> tuple[Any, Any]:
    """Hashable structure and leaves of a weight, equal for weights of equal layout and shape."""
    leaves, structure = jax.tree.flatten(q)
    return structure, tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)
