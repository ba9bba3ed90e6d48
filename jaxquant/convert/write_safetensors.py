"""Write safetensors: one file, or shards with an index, one piece in memory at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxquant.errors import FormatError
from jaxquant.formats.base import DTYPES, disk_dtype

SHARD_BYTES = 5 * 10**9
"""A checkpoint over this size is written in shards of at most it, as the hub's own tools do."""


class Entry(NamedTuple):
    """A tensor's header: its full name, safetensors dtype string and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype][1] // 8


class Piece(NamedTuple):
    """Tensors that are made together and stand in one file.

    Attributes:
        entries: their headers.
        load: gives their arrays by name; called once, when their turn comes.
    """

    entries: tuple[Entry, ...]
    load: Callable[[], Mapping[str, np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(entry.nbytes for entry in self.entries)


def _shards(pieces: Iterable[Piece], limit: int) -> list[list[Piece]]:
    """Consecutive pieces of at most ``limit`` bytes together, or a larger one alone."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _write_file(path: Path, pieces: Sequence[Piece]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in (entry for piece in pieces for entry in piece.entries):
        start, end = end, end + entry.nbytes
        shape = list(entry.shape)
        header[entry.name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            arrays = piece.load()
            for entry in piece.entries:
                array = arrays[entry.name]
                if (disk_dtype(array.dtype), array.shape) != (entry.dtype, entry.shape):
                    found = f"{array.dtype} {list(array.shape)}"
                    rule = f"{entry.dtype} {list(entry.shape)} was announced"
                    raise FormatError(entry.name, found, rule)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_safetensors(folder: Path, pieces: Sequence[Piece], limit: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes and their index.

    Args:
        folder: an existing directory.
        pieces: all tensors, in the order of the files.
        limit: bytes of tensors to a file.
    Raises:
        FormatError: a piece gives another dtype or shape than its header says.
    """
    shards = _shards(pieces, limit)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    homes: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        homes |= {entry.name: file for piece in shard for entry in piece.entries}
    total = sum(piece.nbytes for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    text = json.dumps(index, indent=1)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
