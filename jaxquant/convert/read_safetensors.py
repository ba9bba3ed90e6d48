"""One safetensors file: header checks of our own, then zero-copy views of the mapped file.

The checks are stricter than the reference reader's: duplicate names are refused, the data region is
tiled exactly, and nothing is allocated in proportion to a number that the file merely claims.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxquant.convert.read_json import lfs_error, parse, scan_object
from jaxquant.errors import FormatError
from jaxquant.formats.base import DTYPES, RawTensor, numpy_dtype
from jaxquant.transforms.repack import MADV_POPULATE_READ, advise

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1 << 17
MAX_ENTRY_BYTES = 4096
MAX_METADATA_BYTES = 8 << 20
MAX_RANK = 8
MAX_EXTENT = 1 << 48
# Sizes beside one of 0 are bounded by nothing in the file.
MAX_EMPTY_EXTENT = 1 << 16


class SafetensorsFile(NamedTuple):
    """The tensors and the metadata of one file."""

    tensors: dict[str, RawTensor]
    metadata: dict[str, str]


def map_file(path: Path) -> mmap.mmap:
    """Map a file read-only.

    Raises:
        FormatError: missing, empty, unreadable, or a Git LFS pointer.
    """
    try:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise lfs_error(str(path))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(str(path), reason, "a readable, non-empty file") from None


def _entry(where: str, text: bytes, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """Check one header entry; returns dtype, shape, begin, end."""
    if len(text) > MAX_ENTRY_BYTES:
        raise FormatError(
            where, f"a header entry of {len(text)} bytes", f"at most {MAX_ENTRY_BYTES}"
        )
    entry = parse(text, where)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(where, f"header entry {text[:80]!r}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(where, f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise FormatError(where, f"shape {str(shape)[:80]}", f"a list of at most {MAX_RANK} sizes")
    if any(type(n) is not int or not 0 <= n <= MAX_EXTENT for n in shape):
        raise FormatError(where, f"shape {str(shape)[:80]}", "sizes are integers >= 0")
    if 0 in shape and max(shape) > MAX_EMPTY_EXTENT:
        raise FormatError(
            where, f"shape {shape} without an element", f"sizes of at most {MAX_EMPTY_EXTENT}"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(n) is not int for n in offsets)
    ):
        raise FormatError(where, f"data_offsets {str(offsets)[:80]}", "two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise FormatError(where, f"data_offsets {str(offsets)[:80]}", "0 <= begin <= end")
    if end > data_bytes:
        raise FormatError(
            where,
            f"data up to byte {end} of {data_bytes}",
            "the data lies inside the file",
            "the file is truncated: download it again",
        )
    bits = math.prod(shape) * DTYPES[dtype][1]
    if bits != 8 * (end - begin):
        raise FormatError(
            where, f"{end - begin} bytes for {dtype} {shape}", f"its elements take {bits} bits"
        )
    return dtype, tuple(shape), begin, end


def _metadata(where: str, text: bytes) -> dict[str, str]:
    if len(text) > MAX_METADATA_BYTES:
        raise FormatError(where, f"{len(text)} bytes", f"at most {MAX_METADATA_BYTES}")
    value = parse(text, where)
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(where, f"{text[:80]!r}", "a map from strings to strings")
    return value


def _check_tiling(where: str, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise FormatError(
                f"{where}: {name}",
                f"data at {begin}, after {position} bytes: it {problem}",
                "tensors tile the data region exactly",
            )
        position = end
    if position != data_bytes:
        raise FormatError(
            where,
            f"{data_bytes - position} bytes behind the last tensor",
            "tensors tile the data region exactly",
        )


def read_safetensors(path: Path) -> SafetensorsFile:
    """Map a safetensors file and check its whole header.

    Args:
        path: the file.
    Returns:
        every tensor, unread, and the ``__metadata__`` strings.
    Raises:
        FormatError: the file breaks the format; names the file, the tensor and the rule.
    """
    where = str(path)
    buffer = map_file(path)
    if len(buffer) < 10:
        raise FormatError(where, f"{len(buffer)} bytes", "a header length and a JSON header")
    (length,) = struct.unpack("<Q", buffer[:8])
    if length > MAX_HEADER_BYTES or length + 8 > len(buffer):
        raise FormatError(
            where,
            f"a header of {length} bytes in a file of {len(buffer)}",
            f"it fits into the file and has at most {MAX_HEADER_BYTES}",
            "the file is truncated or no safetensors file",
        )
    if buffer[8:9] != b"{":
        raise FormatError(where, f"{buffer[8:9]!r} as the header's first byte", "'{'")
    start = 8 + length
    data_bytes = len(buffer) - start
    tensors: dict[str, RawTensor] = {}
    metadata: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    seen_metadata = False
    for name, low, high in scan_object(buffer, where, 8, start):
        if name == "__metadata__":
            if seen_metadata:
                raise FormatError(where, "'__metadata__' twice in the header", "names are unique")
            metadata, seen_metadata = _metadata(f"{where}: {name}", buffer[low:high]), True
            continue
        if name in tensors:
            raise FormatError(f"{where}: {name}", "twice in the header", "names are unique")
        if len(tensors) == MAX_TENSORS:
            raise FormatError(where, f"more than {MAX_TENSORS} tensors", "split it into shards")
        dtype, shape, begin, end = _entry(f"{where}: {name}", buffer[low:high], data_bytes)
        spans.append((begin, end, name))
        offset, size = start + begin, end - begin
        tensors[name] = _tensor(buffer, where, name, dtype, shape, offset, size)
    _check_tiling(where, spans, data_bytes)
    return SafetensorsFile(tensors, metadata)


LARGE = 1 << 20


def _tensor(
    buffer: mmap.mmap,
    where: str,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offset: int,
    size: int,
) -> RawTensor:
    """The tensor of ``size`` bytes at ``offset`` of a mapped file."""

    def entry(index: int) -> RawTensor:
        step = size // shape[0]
        return _tensor(buffer, where, name, dtype, shape[1:], offset + index * step, step)

    stacked = len(shape) > 1 and shape[0] > 0 and DTYPES[dtype][1] >= 8
    return RawTensor(
        name,
        dtype,
        shape,
        where,
        _reader(buffer, dtype, shape, offset, size),
        functools.partial(release_pages, buffer, offset, size),
        entry if stacked else None,
    )


def release_pages(buffer: mmap.mmap, offset: int, size: int) -> None:
    """Drop a range of a mapped file from this process's memory; reading it again maps it anew."""
    if size and hasattr(mmap, "MADV_DONTNEED"):
        advise(np.frombuffer(buffer, np.uint8, size, offset), mmap.MADV_DONTNEED)


def _reader(buffer: mmap.mmap, name: str, shape: tuple[int, ...], offset: int, size: int) -> Any:
    def read() -> np.ndarray:
        dtype = numpy_dtype(name)
        octets = np.frombuffer(buffer, np.uint8, size, offset)
        if size >= LARGE:
            advise(octets, MADV_POPULATE_READ)
        if DTYPES[name][1] < 8:
            return octets.reshape(*shape[:-1], -1)
        # Writers align tensors, but the format does not ask for it.
        return (
            (octets if offset % dtype.itemsize == 0 else octets.copy()).view(dtype).reshape(shape)
        )

    return read
