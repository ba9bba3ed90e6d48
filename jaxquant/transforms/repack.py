"""Packing: between one element to an entry and bit planes in bytes, and between word orders.

Everything here works on NumPy and JAX arrays alike through the array's own namespace, so formats
(NumPy) and jitted code share one implementation.  Elements are unsigned bit patterns in ``uint8``.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.arrays.codes import Code
from jaxquant.arrays.layout import Grid


def unpack_bits(packed: Any, width: int, axis: int) -> Any:
    """Split every byte into ``8 // width`` elements along ``axis``, least significant bits first.

    Args:
        packed: uint8, any shape.
        width: bits of an element; 1, 2 or 4.
        axis: the packed axis, negative counts from the end.
    Returns:
        uint8 with ``8 // width`` times as many entries along ``axis``.
    """
    xp = packed.__array_namespace__()
    per_byte, axis = 8 // width, axis % packed.ndim
    mask = (1 << width) - 1
    parts = [(packed >> np.uint8(width * i)) & np.uint8(mask) for i in range(per_byte)]
    shape = list(packed.shape)
    shape[axis] *= per_byte
    return xp.stack(parts, axis=axis + 1).reshape(shape)


def pack_bits(elements: Any, width: int, axis: int) -> Any:
    """Inverse of :func:`unpack_bits`; ``8 // width`` must divide the extent along ``axis``."""
    per_byte, axis = 8 // width, axis % elements.ndim
    shape = list(elements.shape)
    shape[axis : axis + 1] = [shape[axis] // per_byte, per_byte]
    split = elements.reshape(shape)
    index: list[Any] = [slice(None)] * len(shape)
    packed = None
    for i in range(per_byte):
        index[axis + 1] = i
        part = split[tuple(index)] << np.uint8(width * i)
        packed = part if packed is None else packed | part
    return packed


def _packed_axis(grid: Grid) -> int | None:
    """Position (from the end) of the axis along which a data plane is packed."""
    return next((i - len(grid) for i, step in enumerate(grid) if step > 1), None)


def pack_codes(patterns: Any, code: Code, grids: Sequence[Grid]) -> tuple[Any, ...]:
    """Cut bit patterns ``[*lead, *axes]`` uint8 into the planes that ``grids`` describe."""
    if len(grids) == 1 and math.prod(grids[0]) == 1:
        return (patterns,)
    planes, low = [], 0
    for width, grid in zip(code.planes, grids, strict=True):
        plane = (patterns >> np.uint8(low)) & np.uint8((1 << width) - 1)
        axis = _packed_axis(grid)
        planes.append(plane if axis is None else pack_bits(plane, width, axis))
        low += width
    return tuple(planes)


def unpack_codes(planes: Sequence[Any], code: Code, grids: Sequence[Grid]) -> Any:
    """Inverse of :func:`pack_codes`: unsigned bit patterns ``[*lead, *axes]`` uint8."""
    if len(grids) == 1 and math.prod(grids[0]) == 1:
        return planes[0]
    patterns, low = None, 0
    for width, grid, plane in zip(code.planes, grids, planes, strict=True):
        axis = _packed_axis(grid)
        bits = plane if axis is None else unpack_bits(plane, width, axis)
        bits = bits << np.uint8(low)
        patterns = bits if patterns is None else patterns | bits
        low += width
    return patterns


def words_to_elements(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Read a dense little-endian bit stream of 32-bit words along the last axis.

    Element ``i`` occupies bits ``i*bits .. i*bits+bits-1`` of the stream; this is the packing of
    GPTQ (all widths) and compressed-tensors 0.17 and later.

    Args:
        words: int32 or uint32 ``[..., W]``; the bits count, never the sign.
        bits: 2 to 8.
        count: elements to read, at most ``W * 32 // bits``.
    Returns:
        uint8 ``[..., count]``.
    """
    words = np.ascontiguousarray(words)
    octets = words.view(np.uint8)
    if bits == 8:
        return octets[..., :count]
    if bits in (2, 4):
        return unpack_bits(octets, bits, -1)[..., :count]
    # Widths that do not divide 32 repeat after 32 elements, that is after ``bits`` words.
    periods = -(-count // 32)
    unsigned = words.view(np.uint32)
    short = periods * bits - words.shape[-1]
    if short > 0:
        unsigned = np.pad(unsigned, [(0, 0)] * (words.ndim - 1) + [(0, short)])
    unsigned = unsigned[..., : periods * bits].reshape(*words.shape[:-1], periods, bits)
    elements = np.empty((*words.shape[:-1], periods, 32), np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        element = unsigned[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            element = element | unsigned[..., word + 1] << np.uint32(32 - shift)
        elements[..., i] = element & np.uint32((1 << bits) - 1)
    return elements.reshape(*words.shape[:-1], periods * 32)[..., :count]


def elements_to_words(elements: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of :func:`words_to_elements`, padded with zero bits to whole words.

    Args:
        elements: uint8 ``[..., count]``, each below ``2**bits``.
        bits: 2 to 8.
    Returns:
        int32 ``[..., ceil(count * bits / 32)]``.
    """
    count = elements.shape[-1]
    stream = np.unpackbits(elements[..., None], axis=-1, bitorder="little", count=bits)
    stream = stream.reshape(*elements.shape[:-1], count * bits)
    pad = -(count * bits) % 32
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, pad)])
    return np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little")).view(np.int32)


# The CPU backend takes over arrays that start on such a boundary without a copy of its own.
_ALIGNMENT = 64
_LARGE = 4 << 20
# Linux 5.14 and later: map a range at once instead of page by page as it is touched.
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23


def advise(octets: np.ndarray, advice: int) -> None:
    """``madvise`` on the pages of a uint8 array, without holding up other threads.

    Only ever a hint: where the system has no such advice nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        # Unlike mmap.madvise, a ctypes call lets go of the interpreter's lock.
        start = octets.ctypes.data
        first = start - start % mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(first, start + octets.size - first, advice)


class HostMemory(mmap.mmap):
    """Anonymous memory of this process, as opposed to a mapped file."""


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """``np.empty`` whose data starts on a boundary that devices take over without a copy.

    Large arrays get pages that are there from the start: filling fresh memory page by page takes
    several times longer than what is written to it.  Huge pages are not asked for: on a machine
    that had run for hours the import took 2.5 times as long with them, probably for compaction.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= _LARGE and hasattr(mmap, "MAP_ANONYMOUS"):
        memory = HostMemory(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        octets = np.frombuffer(memory, np.uint8)
        advise(octets, MADV_POPULATE_WRITE)
        return octets.view(dtype).reshape(shape)
    octets = np.empty(size + _ALIGNMENT, np.uint8)
    start = -octets.ctypes.data % _ALIGNMENT
    return octets[start : start + size].view(dtype).reshape(shape)


def is_host_memory(array: np.ndarray) -> bool:
    """Whether an array's data is this process's own, not a view of a mapped file."""
    root: Any = array
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
    root = root.obj if isinstance(root, memoryview) else root
    return isinstance(root, np.ndarray | HostMemory)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous copy whose data starts on such a boundary."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def transpose_copy(matrix: np.ndarray) -> np.ndarray:
    """Contiguous transpose of a 2-D array by tiles: six times faster than a strided copy.

    A tile writes whole cache lines, and what it reads stays in the second level cache.
    """
    rows, columns = matrix.shape
    out = aligned_empty((columns, rows), matrix.dtype)
    for i in range(0, rows, 128):
        for j in range(0, columns, 512):
            out[j : j + 512, i : i + 128] = matrix[i : i + 128, j : j + 512].T
    return out
