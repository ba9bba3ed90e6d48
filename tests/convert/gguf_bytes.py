"""GGUF files built byte by byte for tests, lies included; independent of jaxquant's own writer."""

import struct
from typing import NamedTuple

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)


def array(kind: int, values) -> bytes:
    """The body of an array value: element type, count, elements."""
    return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, v) for v in values)


def pair(key: str | bytes, kind: int, body: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + body


def strings(key: str, values) -> bytes:
    return pair(key, ARRAY, array(STRING, values))


def info(name, dims, kind=0, offset=0, rank=None) -> bytes:
    """A tensor description; ``dims`` fastest first, as in the file."""
    rank = len(dims) if rank is None else rank
    packed = struct.pack(f"<I{len(dims)}Q", rank, *dims)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


class Tensor(NamedTuple):
    """A well-formed tensor: ``dims`` fastest first."""

    name: str
    dims: tuple[int, ...]
    kind: int
    data: bytes


def header(version=3, tensors=0, keys=0, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def pad(data: bytes, alignment=32) -> bytes:
    return data + b"\0" * (-len(data) % alignment)


def build(pairs=(), tensors=(), version=3, alignment=32) -> bytes:
    """A valid file from finished key-value bytes and tensors."""
    descriptions, data = b"", b""
    for tensor in tensors:
        descriptions += info(tensor.name, tensor.dims, tensor.kind, len(data))
        data = pad(data + tensor.data, alignment)
    head = header(version, len(tensors), len(pairs)) + b"".join(pairs) + descriptions
    return pad(head, alignment) + data


def raw(infos=(), pairs=(), data=b"", alignment=32, **counts) -> bytes:
    """A file from finished descriptions, which may lie."""
    numbers = {"tensors": len(infos), "keys": len(pairs)} | counts
    return pad(header(**numbers) + b"".join(pairs) + b"".join(infos), alignment) + data


def f32(name: str, *dims: int, value: float = 1.0) -> Tensor:
    count = 1
    for n in dims:
        count *= n
    return Tensor(name, dims, 0, struct.pack("<f", value) * count)
