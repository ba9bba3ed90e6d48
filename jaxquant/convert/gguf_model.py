"""A GGUF file of a known architecture as the model it holds: config, weights and arrays by name.

The converters of llama.cpp change more than names, and all of it is undone here, on packed data:

* ``llama`` files interleave the halves of query and key heads: their rows are put back in order;
* experts of a layer are stacked: each becomes a weight of its own;
* ``deepseek2`` files split ``kv_b_proj`` in two and transpose one part, which quantized blocks
  cannot follow: the parts are joined in float32, and :attr:`GgufModel.notes` says so.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.convert.gguf_config import config_of, family_of
from jaxquant.convert.gguf_names import (
    FUSED_STACK,
    PERMUTED,
    Name,
    ignored,
    module_name,
    parse,
)
from jaxquant.convert.name_map import NameMap, read_names, rename
from jaxquant.convert.read_gguf import Gguf, GgufTensor, open_gguf
from jaxquant.errors import PlanError
from jaxquant.formats import gguf
from jaxquant.formats.base import FormatWarning
from jaxquant.formats.gguf_codebook import CODEBOOK_TYPES

EMBEDDING = "model.embed_tokens.weight"
_STACK = re.compile(r"(.*\.experts)\.(\w+)")


class Piece(NamedTuple):
    """One weight or array of the model.

    Attributes:
        abstract: its shapes and dtypes.
        load: reads it.
        sources: names of the tensors that it comes from.
    """

    abstract: Any
    load: Callable[[], Any]
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """The model in a GGUF file; nothing is read until it is asked for.

    Attributes:
        file: the open file.
        config: as the original ``config.json``.
        pieces: every weight by module path (``model.layers.0.self_attn.q_proj``) and every other
            array by tensor name (``model.norm.weight``).
        notes: what could not be kept packed.
    """

    file: Gguf
    config: Mapping[str, Any]
    pieces: Mapping[str, Piece]
    notes: tuple[str, ...]

    @property
    def weights(self) -> dict[str, QTensor]:
        """Abstract QTensor ``[out, in]`` of every linear, by module path."""
        return {n: p.abstract for n, p in self.pieces.items() if isinstance(p.abstract, QTensor)}

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every other array (float32), abstract, by tensor name."""
        return {
            n: p.abstract for n, p in self.pieces.items() if not isinstance(p.abstract, QTensor)
        }

    def load(self, name: str) -> Any:
        """Read one weight or array.

        Raises:
            KeyError: the model has no such piece.
            FormatError: its content is damaged.
        """
        return self.pieces[name].load()


def rotary_rows(rows: int, heads: int) -> np.ndarray:
    """Where each row of a query or key projection lies in a ``llama`` file.

    The file interleaves the two halves of a head; entry ``r`` is the file's row of the model's row
    ``r``.

    >>> rotary_rows(8, 1).tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


class _Assembler:
    """Collects the pieces of one model."""

    def __init__(self, file: Gguf, config: Mapping[str, Any], permuted: bool) -> None:
        self.file = file
        self.config = config
        self.permuted = permuted
        self.pieces: dict[str, Piece] = {}
        self.problems: list[str] = []

    def add(self, name: str, piece: Piece) -> None:
        if name in self.pieces:
            both = f"{piece.sources[0]} and {self.pieces[name].sources[0]}"
            self.problems.append(f"{name}: comes from {both}; one tensor for each weight")
        self.pieces[name] = piece

    def rows(self, tensor: GgufTensor, parsed: Name) -> np.ndarray | None:
        """The file's rows in the order of the model, None where it is the same."""
        if not self.permuted or parsed.stem not in ("attn_q", "attn_k"):
            return None
        key = "num_attention_heads" if parsed.stem == "attn_q" else "num_key_value_heads"
        rows = tensor.shape[0] if len(tensor.shape) == 1 else tensor.shape[-2]
        heads = self.config[key]
        if rows % (2 * heads):
            raise tensor.error(f"{rows} rows for {heads} heads", "an even number of rows a head")
        return rotary_rows(rows, heads)

    def weight(self, tensor: GgufTensor, rows: Any, count: int, expert: int = 0) -> Piece:
        """A weight ``[count, in]`` made of some rows of a tensor."""
        inputs = tensor.shape[-1]
        row_bytes = inputs // tensor.kind.elements * tensor.kind.bytes
        scales = self.file.tensor_scale(tensor)

        def load() -> QTensor:
            picked = tensor.read().reshape(-1, row_bytes)[rows].reshape(-1)
            scale = None if scales is None else scales.reshape(-1)
            if scale is not None and scale.size > 1:
                scale = scale[expert : expert + 1]
            return gguf.decode(picked, tensor.kind, (count, inputs), tensor.where, scale)

        shape = gguf.abstract(tensor.kind, (count, inputs), scales is not None)
        return Piece(shape, load, (tensor.name,))

    def array(self, tensor: GgufTensor, rows: np.ndarray | None) -> Piece:
        """A tensor as a float32 array."""

        def load() -> np.ndarray:
            array = self.file.array(tensor.name)
            return array if rows is None else array[rows]

        shape = jax.ShapeDtypeStruct(tensor.shape, np.dtype(np.float32))
        return Piece(shape, load, (tensor.name,))

    def experts(self, tensor: GgufTensor, path: str, projections: tuple[str, ...]) -> None:
        """All experts of a layer; several projections lie in equal parts of each one's rows."""
        count, out, _ = tensor.shape
        part = out // len(projections)
        for expert in range(count):
            for i, projection in enumerate(projections):
                start = expert * out + i * part
                piece = self.weight(tensor, slice(start, start + part), part, expert)
                self.add(f"{path}.{expert}.{projection}", piece)

    def latent(self, layer: int) -> None:
        """``kv_b_proj`` from the parts that multi-head latent attention is split into."""
        path = f"model.layers.{layer}.self_attn.kv_b_proj"
        names = tuple(f"blk.{layer}.attn_{part}_b.weight" for part in "kv")
        missing = [name for name in names if name not in self.file.tensors]
        if missing:
            self.problems.append(f"{path}: {missing[0]} is missing; kv_b_proj is split in two")
            return
        k, v = (self.file.tensors[name] for name in names)
        if len(k.shape) != 3 or len(v.shape) != 3 or k.shape[:2] != (v.shape[0], v.shape[2]):
            found = f"{path}: attn_k_b {k.shape} and attn_v_b {v.shape}"
            self.problems.append(f"{found}; [heads, latent, nope] and [heads, value, latent]")
            return
        heads, inner = k.shape[0], k.shape[1]
        out = heads * (k.shape[2] + v.shape[1])

        def load() -> QTensor:
            # Keys are stored transposed; a head's key rows come before its value rows.
            keys, values = self.file.array(names[0]).swapaxes(1, 2), self.file.array(names[1])
            return dense(np.concatenate([keys, values], axis=1).reshape(out, inner))

        shape = dense(jax.ShapeDtypeStruct((out, inner), np.dtype(np.float32)))
        self.add(path, Piece(shape, load, names))

    def tensor(self, tensor: GgufTensor, target: str, parsed: Name) -> None:
        """A tensor with a name in the module tree."""
        rank, path = len(tensor.shape), target.removesuffix(".weight")
        stack = _STACK.fullmatch(path)
        if rank == 3 and stack:
            self.experts(tensor, stack[1], (stack[2],))
        elif rank == 1 and path.endswith("shared_expert_gate"):
            self.add(path, self.weight(tensor.reshaped((1, *tensor.shape)), slice(None), 1))
        elif rank == 1 or (rank == 2 and target == EMBEDDING):
            self.add(target, self.array(tensor, self.rows(tensor, parsed)))
        elif rank == 2:
            rows = self.rows(tensor, parsed)
            index = slice(None) if rows is None else rows
            self.add(path, self.weight(tensor, index, tensor.shape[0]))
        else:
            self.problems.append(f"{tensor.name}: shape {list(tensor.shape)} for {target}")


def open_gguf_model(
    path: str | Path,
    names: NameMap | str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> GgufModel:
    """Open the model in a GGUF file: every tensor is claimed by a name, or ignored for a reason.

    Args:
        path: the file, or any part of a split one.
        names: a name map, or a YAML file with one, that goes before the architecture's own (see
            :mod:`jaxquant.convert.name_map`):
            ``{"blk.{}.attn_q": "model.layers.{}.self_attn.q_proj"}``.
        config: a ``config.json`` to use instead of the metadata, for architectures that are not
            known.
    Raises:
        FormatError: the file is damaged, or its architecture is unknown and no config is given.
        PlanError: tensors without a name, two for one name, or entries that fit nothing; all.
        ConfigError: an entry of ``names`` is not valid.
    """
    file = open_gguf(path)
    family = family_of(file) if config is None else str(config.get("model_type", ""))
    config = config_of(file) if config is None else dict(config)
    permuted = file.metadata.get("general.architecture") in PERMUTED
    parts = _Assembler(file, config, permuted)
    split_layers: set[int] = set()
    renamed = rename(read_names(names), file.tensors, str(file.path))
    for name, tensor in file.tensors.items():
        target = renamed.get(name)
        if target is None and ignored(name, config["num_hidden_layers"]):
            continue
        parsed = parse(name)
        if target is None:
            target = module_name(name, family)
        if target is not None:
            parts.tensor(tensor, target, parsed)
        elif parsed.stem in ("attn_k_b", "attn_v_b") and parsed.layer is not None:
            split_layers.add(parsed.layer)
        elif parsed.stem == FUSED_STACK and len(tensor.shape) == 3:
            layer = f"model.layers.{parsed.layer}.mlp.experts"
            parts.experts(tensor, layer, ("gate_proj", "up_proj"))
        else:
            parts.problems.append(f"{name}: {tensor.dtype} {list(tensor.shape)} has no name")
    for layer in sorted(split_layers):
        parts.latent(layer)
    if parts.problems:
        raise PlanError(str(file.path), parts.problems, "give names= for them")
    notes = _notes(file, split_layers)
    for note in notes:
        warnings.warn(f"{file.path}: {note}", FormatWarning, stacklevel=2)
    return GgufModel(file, config, parts.pieces, notes)


def _notes(file: Gguf, split_layers: set[int]) -> tuple[str, ...]:
    """What is not kept as it is packed in the file."""
    notes = []
    codebook = [tensor.dtype for tensor in file.tensors.values() if tensor.dtype in CODEBOOK_TYPES]
    if codebook:
        kinds = ", ".join(sorted(set(codebook)))
        notes.append(f"{len(codebook)} weights of codebook types ({kinds}) are decoded to float32")
    if split_layers:
        notes.append(f"kv_b_proj of {len(split_layers)} layers is joined from its parts in float32")
    return tuple(notes)
