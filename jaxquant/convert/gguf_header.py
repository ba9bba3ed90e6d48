"""The header of one GGUF file: metadata and tensor descriptions, read with checks of our own."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from jaxquant.convert.gguf_metadata import Cursor, Metadata, read_metadata
from jaxquant.errors import FormatError
from jaxquant.formats.gguf_types import GgmlType, type_of_id

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 64
MAX_DIMS = 4


class TensorInfo(NamedTuple):
    """One tensor's description.

    Attributes:
        name: full name.
        kind: element type.
        shape: slowest axis first, the reverse of the order in the file.
        offset: of the data, in bytes from the start of the file.
        nbytes: of the data.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """A parsed header.

    Attributes:
        version: of the format.
        metadata: the key-value section.
        tensors: descriptions in file order.
    """

    version: int
    metadata: Metadata
    tensors: list[TensorInfo]


def _alignment(metadata: Metadata, where: str) -> int:
    if "general.alignment" not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata["general.alignment"]
    kind = metadata.kind("general.alignment")
    if kind != "uint32" or value < 8 or value & (value - 1):
        raise FormatError(
            f"{where}: general.alignment", f"{kind} {value}", "a uint32 power of two of at least 8"
        )
    return value


def _read_info(cursor: Cursor, index: int) -> tuple[str, GgmlType, tuple[int, ...], int, int]:
    """One tensor description: name, type, shape, offset into the data, bytes."""
    name = cursor.text(f"name of tensor {index}", MAX_NAME_BYTES)
    where = f"{cursor.where}: {name}"
    rank = cursor.u32(f"tensor {name}")
    if not 1 <= rank <= MAX_DIMS:
        raise FormatError(where, f"{rank} dimensions", f"1 to {MAX_DIMS}")
    at = cursor.skip(8 * rank, f"tensor {name}")
    dims = struct.unpack_from(f"<{rank}Q", cursor.buffer, at)
    elements = math.prod(dims)
    if elements == 0 or elements >= 1 << 62:
        rule = "every dimension is at least 1 and their product fits 62 bits"
        raise FormatError(where, f"dimensions {list(dims)}", rule)
    kind = type_of_id(cursor.u32(f"tensor {name}"), where)
    if dims[0] % kind.elements:
        raise FormatError(
            where, f"rows of {dims[0]} elements", f"{kind.name} has blocks of {kind.elements}"
        )
    offset = cursor.u64(f"tensor {name}")
    return name, kind, tuple(reversed(dims)), offset, elements // kind.elements * kind.bytes


def _check_tiling(infos: list[TensorInfo], start: int, size: int, align: int, where: str) -> None:
    """Every tensor begins where the one before it ends, rounded up to the alignment."""
    expected = start
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset != expected:
            problem = "overlaps the tensor before it" if info.offset < expected else "leaves a hole"
            raise FormatError(
                f"{where}: {info.name}",
                f"data at byte {info.offset} instead of {expected}: it {problem}",
                "tensors tile the data region",
            )
        expected = info.offset + info.nbytes
        expected += -expected % align
    if infos and size > expected:
        raise FormatError(
            where, f"{size - expected} bytes behind the last tensor", "tensors tile the data region"
        )


def parse_header(buffer: Any, where: str) -> Header:
    """Read and check the header of a mapped GGUF file.

    Args:
        buffer: all bytes of the file (``mmap`` or ``bytes``).
        where: file name, for errors.
    Raises:
        FormatError: the header, or what it says about the data, breaks a rule of the format.
    """
    cursor = Cursor(buffer, where)
    magic = buffer[:4]
    if magic != MAGIC:
        raise FormatError(where, f"first bytes {bytes(magic)!r}", "a GGUF file starts with 'GGUF'")
    cursor.skip(4, "the magic number")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        rule = "only little-endian files are read"
        raise FormatError(where, "a big-endian file", rule, "convert it on its own machine")
    if version not in VERSIONS:
        raise FormatError(
            where, f"version {version}", "2 and 3 are read", "convert the model again"
        )
    tensors, keys = cursor.u64("the tensor count"), cursor.u64("the key count")
    left = cursor.end - cursor.position
    # A tensor's description takes at least 33 bytes, a key with its value 14.
    for what, count, least, most in (
        ("tensors", tensors, 33, MAX_TENSORS),
        ("keys", keys, 14, MAX_KEYS),
    ):
        if count > most:
            raise FormatError(where, f"{count} {what}", f"at most {most}")
        if count * least > left:
            cursor.overrun(f"{count} {what}", f"take {count * least} bytes or more")
    metadata = read_metadata(cursor, keys)
    alignment = _alignment(metadata, where)
    described = [_read_info(cursor, i) for i in range(tensors)]
    start = cursor.position + -cursor.position % alignment
    infos: list[TensorInfo] = []
    seen: set[str] = set()
    for name, kind, shape, offset, nbytes in described:
        if name in seen:
            raise FormatError(f"{where}: {name}", "described twice", "names are unique")
        seen.add(name)
        if offset % alignment:
            raise FormatError(f"{where}: {name}", f"offset {offset}", f"a multiple of {alignment}")
        if start + offset + nbytes > len(buffer):
            raise FormatError(
                f"{where}: {name}",
                f"data up to byte {start + offset + nbytes} of {len(buffer)}",
                "the data lies inside the file",
                "the file is truncated: get it again",
            )
        infos.append(TensorInfo(name, kind, shape, start + offset, nbytes))
    _check_tiling(infos, start, len(buffer), alignment, where)
    return Header(version, metadata, infos)
