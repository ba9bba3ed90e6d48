"""Write GGUF files: metadata and tensors, to a temporary file that is renamed when complete."""

from __future__ import annotations

import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.gguf_header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_BYTES,
    VERSIONS,
)
from jaxquant.convert.gguf_metadata import ARRAY, BOOL, SCALARS, STRING
from jaxquant.errors import FormatError
from jaxquant.formats import gguf_encode
from jaxquant.formats.gguf_types import TYPES, GgmlType

_KINDS = {np.dtype(name): number for number, (name, _) in SCALARS.items()}


class Part(NamedTuple):
    """One tensor to write.

    Attributes:
        name: full name, at most 64 bytes.
        kind: element type.
        shape: slowest axis first.
        data: gives its bytes, uint8; called once, when its turn comes.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes that ``data`` must give."""
        return int(np.prod(self.shape, dtype=np.int64)) // self.kind.elements * self.kind.bytes


def parts_of(name: str, q: QTensor, kind: GgmlType) -> list[Part]:
    """The tensors that hold a weight: its blocks and, for NVFP4 with one, the tensor scale.

    Args:
        name: name of the weight, ending in ``.weight``.
        q: ``[*lead, out, in]``, in the layout of ``kind``.
        kind: type to write.
    """
    parts = [Part(name, kind, q.shape, lambda: gguf_encode.encode(q, kind, name))]
    if kind.name == "NVFP4" and len(q.scales) == 2:
        scale = np.asarray(q.scales[1], np.float32).reshape(-1)
        stem = name.removesuffix(".weight")
        parts.append(array_part(f"{stem}.scale", scale))
    return parts


def array_part(name: str, array: Any, kind: str = "F32") -> Part:
    """A dense array as a tensor; values are rounded to ``kind``: F32, F16, BF16, Q8_0 or Q4_0."""
    array = np.asarray(array)
    if kind not in TYPES:
        raise FormatError(name, f"type {kind!r}", f"one of {', '.join(TYPES)}")

    def data() -> np.ndarray:
        return gguf_encode.quantize(array.astype(np.float32), TYPES[kind], name)

    return Part(name, TYPES[kind], array.shape, data)


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _as_array(key: str, value: Any) -> np.ndarray:
    """A number or a sequence of numbers in the type that it is written as.

    Python's own types become what llama.cpp's converter writes: whole numbers uint32 (int32 in
    arrays and for negative ones, 64 bits where they do not fit), others float32.
    """
    array = np.asarray(value)
    dtype = array.dtype
    if not isinstance(value, np.ndarray | np.generic):
        if dtype.kind == "f":
            dtype = np.dtype(np.float32)
        elif dtype.kind in "iu":
            choices = ("int32",) if array.ndim else ("uint32", "int32")
            limits = [np.iinfo(name) for name in (*choices, "int64", "uint64")]
            low, high = int(array.min(initial=0)), int(array.max(initial=0))
            fitting = (limit for limit in limits if limit.min <= low and high <= limit.max)
            dtype = next(fitting).dtype
    if array.dtype.kind not in "biuf" or array.ndim > 1 or dtype not in _KINDS:
        raise FormatError(key, f"a value of type {type(value).__name__}", "numbers or strings")
    return array.astype(dtype)


def _pair(key: str, value: Any) -> bytes:
    """One key with its typed value."""
    if not key or not key.isascii() or not key.isprintable():
        raise FormatError(repr(key), "a metadata key", "printable ASCII")
    head = _text(key)
    if isinstance(value, str):
        return head + struct.pack("<I", STRING) + _text(value)
    texts = not isinstance(value, np.ndarray) and isinstance(value, Sequence) and len(value) > 0
    if texts and all(isinstance(v, str) for v in value):
        body = b"".join(map(_text, value))
        return head + struct.pack("<IIQ", ARRAY, STRING, len(value)) + body
    array = _as_array(key, value)
    kind = BOOL if array.dtype == np.bool_ else _KINDS[array.dtype]
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    if array.ndim == 0:
        return head + struct.pack("<I", kind) + data
    return head + struct.pack("<IIQ", ARRAY, kind, array.size) + data


def _info(part: Part, offset: int) -> bytes:
    encoded = part.name.encode("utf-8")
    if not 0 < len(encoded) <= MAX_NAME_BYTES or not part.name.isprintable():
        rule = f"1 to {MAX_NAME_BYTES} printable bytes"
        raise FormatError(part.name, f"a name of {len(encoded)} bytes", rule)
    if not 1 <= len(part.shape) <= MAX_DIMS or 0 in part.shape:
        raise FormatError(part.name, f"shape {list(part.shape)}", f"1 to {MAX_DIMS} axes")
    if part.shape[-1] % part.kind.elements:
        rule = f"{part.kind.name} has blocks of {part.kind.elements}"
        raise FormatError(part.name, f"rows of {part.shape[-1]} elements", rule)
    dims = struct.pack(f"<I{len(part.shape)}Q", len(part.shape), *reversed(part.shape))
    return _text(part.name) + dims + struct.pack("<IQ", part.kind.id, offset)


def _write(file: BinaryIO, metadata: Mapping[str, Any], parts: Sequence[Part], align: int) -> None:
    counts = struct.pack("<IQQ", VERSIONS[-1], len(parts), len(metadata))
    header = [MAGIC, counts, *(_pair(key, value) for key, value in metadata.items())]
    offset = 0
    for part in parts:
        header.append(_info(part, offset))
        offset += part.nbytes + -part.nbytes % align
    size = file.write(b"".join(header))
    file.write(bytes(-size % align))
    for part in parts:
        data = part.data()
        if data.dtype != np.uint8 or data.size != part.nbytes:
            found = f"{data.size} elements of {data.dtype}"
            raise FormatError(part.name, found, f"{part.nbytes} bytes")
        file.write(np.ascontiguousarray(data).data)
        file.write(bytes(-part.nbytes % align))


def write_gguf(path: str | Path, metadata: Mapping[str, Any], parts: Iterable[Part]) -> None:
    """Write a GGUF file of version 3; the file appears under its name only when it is complete.

    Args:
        path: the file; one that exists is replaced.
        metadata: strings, bools, numbers, and sequences of one of them.  NumPy numbers and arrays
            keep their type.  ``general.alignment`` is obeyed.
        parts: the tensors, in the order in which they are to be stored.
    Raises:
        FormatError: a key, name, shape or value that the format cannot hold, or a tensor twice.
    """
    path, parts = Path(path), list(parts)
    if twice := [n for n, count in Counter(part.name for part in parts).items() if count > 1]:
        raise FormatError(twice[0], "written twice", "names are unique")
    align = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(align, int) or align < 8 or align & (align - 1):
        raise FormatError("general.alignment", f"{align!r}"[:60], "a power of two of at least 8")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, metadata, parts, align)
        # mkstemp makes files private; a checkpoint has the permissions of any new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
