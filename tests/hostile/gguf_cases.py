"""Lies in GGUF headers, metadata and data."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.convert import read_quantized
from jaxquant.formats.gguf_types import TYPES
from tests.convert.gguf_bytes import (
    ARRAY,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    array,
    build,
    f32,
    header,
    info,
    pair,
    raw,
    scalar,
    strings,
    text,
)
from tests.hostile.harness import Case, Link

HUGE = (1 << 64) - 1
ARCH = pair("general.architecture", STRING, text("llama"))
DATA = bytes(128)
FINE = build([ARCH], [f32("a.weight", 8, 4), f32("b.weight", 8)])


def alignment(value: int, kind: int = U32) -> bytes:
    return pair("general.alignment", kind, scalar(kind, value))


def nested(depth: int) -> bytes:
    body = array(U8, [1])
    for _ in range(depth):
        body = struct.pack("<IQ", ARRAY, 1) + body
    return body


FILE = "model.gguf"
GOOD = Case({FILE: FINE}, FILE)


def read(folder: Path) -> Any:
    return read_quantized(folder / FILE)


def blocks(kind: str, at: int, octets: bytes) -> bytes:
    """A file with one tensor of two blocks, whose second block has these bytes somewhere."""
    of = TYPES[kind]
    data = bytearray(2 * of.bytes)
    data[of.bytes + at : of.bytes + at + len(octets)] = octets
    return build([], [Tensor("a.weight", (2 * of.elements, 1), of.id, bytes(data))])


def plain(kind: str, value: np.ndarray) -> bytes:
    return build([], [Tensor("a.weight", (value.size, 1), TYPES[kind].id, value.tobytes())])


NAN, INF = (np.float16(x).tobytes() for x in ("nan", "inf"))
# name: (bytes, part of the message, tensor or key that must be named)
LIES = {
    "empty": (b"", "non-empty", ""),
    "one byte": (b"G", "starts with 'GGUF'", ""),
    "magic only": (b"GGUF", "truncated", ""),
    "other magic": (b"GGML" + FINE[4:], "starts with 'GGUF'", ""),
    "safetensors": (struct.pack("<Q", 2) + b"{}" + bytes(40), "starts with 'GGUF'", ""),
    "zip": (b"PK\x03\x04" + bytes(60), "starts with 'GGUF'", ""),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS", ""),
    "swapped magic": (b"FUGG" + FINE[4:], "starts with 'GGUF'", ""),
    "version 0": (header(0), "version 0", ""),
    "version 1": (header(1), "version 1", ""),
    "version 4": (header(4), "version 4", ""),
    "version huge": (header((1 << 32) - 1), "version 4294967295", ""),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", ""),
    "tensor count over cap": (raw(tensors=HUGE), "tensors; at most", ""),
    "tensor count past end": (raw(tensors=1000), "1000 tensors", ""),
    "key count over cap": (raw(keys=HUGE), "keys; at most", ""),
    "key count past end": (raw(keys=1000), "1000 keys", ""),
    "key count one too many": (raw(pairs=[ARCH], keys=2, data=DATA), "key 1", ""),
    "key count one too few": (raw(pairs=[ARCH, alignment(32)], keys=1, tensors=1), "tensor", ""),
    "tensor count one too many": (raw([info("a", [32])], tensors=2, data=DATA), "tensor 1", ""),
    "key of length 0": (raw(pairs=[pair("", U8, b"\1")], data=DATA), "key 0 of 0 bytes", ""),
    "key length over cap": (
        raw(pairs=[struct.pack("<Q", 65536) + b"a" * 65536 + b"\0" * 5], data=DATA),
        "65536 bytes",
        "",
    ),
    "key length huge": (raw(pairs=[struct.pack("<Q", HUGE) + bytes(40)]), "bytes", ""),
    "key length past end": (raw(pairs=[struct.pack("<Q", 60000) + bytes(40)]), "60000 bytes", ""),
    "key no utf8": (raw(pairs=[pair(b"\xff\xfe", U8, b"\1")], data=DATA), "UTF-8", ""),
    "key not ascii": (raw(pairs=[pair("clé", U8, b"\1")], data=DATA), "ASCII", ""),
    "key with newline": (raw(pairs=[pair("a\nb", U8, b"\1")], data=DATA), "printable", ""),
    "key with nul": (raw(pairs=[pair("a\0b", U8, b"\1")], data=DATA), "printable", ""),
    "key twice": (build([ARCH, ARCH]), "twice", "general.architecture"),
    "value type 13": (raw(pairs=[pair("k", 13, bytes(8))], data=DATA), "value type 13", "k"),
    "value type huge": (raw(pairs=[pair("k", 1 << 31, b"")], data=DATA), "value type", "k"),
    "string length huge": (raw(pairs=[pair("k", STRING, struct.pack("<Q", HUGE))]), "'k'", ""),
    "string length past end": (
        raw(pairs=[pair("k", STRING, struct.pack("<Q", 1 << 40))]),
        "1099511627776 bytes",
        "",
    ),
    "string cut": (raw(pairs=[pair("k", STRING, struct.pack("<Q", 99) + b"x")]), "99 bytes", ""),
    "array element type": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", 99, 1))], data=DATA),
        "elements of type 99",
        "",
    ),
    "array count huge": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", U8, HUGE))], data=DATA),
        "'k'",
        "",
    ),
    "array count overflows": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", U64, 1 << 61))], data=DATA),
        "'k'",
        "",
    ),
    "array count past end": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", I32, 100))], data=DATA),
        "400 bytes",
        "",
    ),
    "string array count huge": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", STRING, HUGE))], data=DATA),
        "at most",
        "",
    ),
    "string array count past end": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", STRING, 100000))], data=DATA),
        "100000 elements",
        "",
    ),
    "string array cut": (
        header(keys=1) + pair("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a" * 30)),
        "middle of a string",
        "",
    ),
    "string in array huge": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))], data=DATA),
        "string of",
        "",
    ),
    "string array over cap": (
        raw(
            pairs=[
                strings("k", [b""] * 8),
                pair("l", ARRAY, struct.pack("<IQ", STRING, (1 << 20) - 7) + bytes(1 << 24)),
            ]
        ),
        "at most 1048576",
        "",
    ),
    "arrays nested deep": (raw(pairs=[pair("k", ARRAY, nested(3))], data=DATA), "nested", ""),
    "arrays nested 10000 deep": (
        raw(pairs=[pair("k", ARRAY, nested(10_000))], data=DATA),
        "nested",
        "",
    ),
    "inner array count huge": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQIQ", ARRAY, 1, U8, HUGE))], data=DATA),
        "'k'",
        "",
    ),
    "inner arrays by the million": (
        raw(pairs=[pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1 << 21) + bytes(24 << 20))]),
        "at most 1048576",
        "",
    ),
    "alignment 0": (build([alignment(0)]), "power of two", "general.alignment"),
    "alignment 3": (build([alignment(3)]), "power of two", "general.alignment"),
    "alignment 4": (build([alignment(4)]), "at least 8", "general.alignment"),
    "alignment 48": (build([alignment(48)]), "power of two", "general.alignment"),
    "alignment of u16": (build([alignment(32, U16)]), "uint16 32", "general.alignment"),
    "alignment of u64": (build([alignment(32, U64)]), "uint64 32", "general.alignment"),
    "alignment of float": (build([alignment(32.0, F32)]), "float32", "general.alignment"),
    "alignment of string": (
        build([pair("general.alignment", STRING, text("32"))]),
        "string 32",
        "general.alignment",
    ),
    "alignment huge": (
        raw([info("a", [8])], [alignment(1 << 31)], DATA),
        "inside the file",
        "a",
    ),
    "alignment array": (
        build([pair("general.alignment", ARRAY, array(U32, [32]))]),
        "array of uint32",
        "general.alignment",
    ),
    "tensor name empty": (raw([info("", [8])], data=DATA), "0 bytes", ""),
    "tensor name of 65 bytes": (raw([info("a" * 65, [8])], data=DATA), "65 bytes", ""),
    "tensor name no utf8": (raw([info(b"\xc3\x28", [8])], data=DATA), "UTF-8", ""),
    "tensor name with escape": (raw([info("a\x1b[2J", [8])], data=DATA), "printable", ""),
    "tensor name length huge": (
        raw([struct.pack("<Q", HUGE) + bytes(40)], data=DATA),
        "bytes; 1 to 64",
        "",
    ),
    "tensor twice": (
        raw([info("a", [8]), info("a", [8], offset=32)], data=DATA),
        "unique",
        "a",
    ),
    "no dimensions": (raw([info("a", [])], data=DATA), "0 dimensions", "a"),
    "five dimensions": (raw([info("a", [1] * 5)], data=DATA), "5 dimensions", "a"),
    "4 billion dimensions": (raw([info("a", [8], rank=(1 << 32) - 1)], data=DATA), "1 to 4", "a"),
    "dimension 0": (raw([info("a", [8, 0])], data=DATA), "at least 1", "a"),
    "dimension huge": (raw([info("a", [HUGE])], data=DATA), "62 bits", "a"),
    "product wraps to 0": (raw([info("a", [1 << 32, 1 << 32])], data=DATA), "62 bits", "a"),
    "product wraps to 8": (
        raw([info("a", [(1 << 63) + 4, 2])], data=DATA),
        "62 bits",
        "a",
    ),
    "product of four huge": (raw([info("a", [1 << 62] * 4)], data=DATA), "62 bits", "a"),
    "product past end": (raw([info("a", [1 << 40])], data=DATA), "inside the file", "a"),
    "type 4 removed": (raw([info("a", [32], 4)], data=DATA), "element type 4", "a"),
    "type 5 removed": (raw([info("a", [32], 5)], data=DATA), "element type 5", "a"),
    "type 31 removed": (raw([info("a", [32], 31)], data=DATA), "element type 31", "a"),
    "type 36 removed": (raw([info("a", [32], 36)], data=DATA), "element type 36", "a"),
    "type 41 unverified": (raw([info("a", [128], 41)], data=DATA), "Q1_0", "a"),
    "type 42 unknown": (raw([info("a", [32], 42)], data=DATA), "element type 42", "a"),
    "type huge": (raw([info("a", [32], (1 << 32) - 1)], data=DATA), "no such type", "a"),
    "row of 31 in Q4_0": (raw([info("a", [31], 2)], data=DATA), "blocks of 32", "a"),
    "row of 128 in Q4_K": (raw([info("a", [128, 2], 12)], data=DATA), "blocks of 256", "a"),
    "row of 32 in NVFP4": (raw([info("a", [32, 2], 40)], data=DATA), "blocks of 64", "a"),
    "type lies about bytes": (raw([info("a", [256, 4], 8)], data=DATA), "inside the file", "a"),
    "offset past end": (raw([info("a", [8], offset=1 << 20)], data=DATA), "inside the file", "a"),
    "offset huge": (
        raw([info("a", [8], offset=HUGE - 31)], data=DATA),
        "inside the file",
        "a",
    ),
    "offset unaligned": (raw([info("a", [8], offset=4)], data=DATA), "multiple of 32", "a"),
    "offset ends past end": (
        raw([info("a", [8], offset=0), info("b", [32], offset=32)], data=DATA),
        "inside the file",
        "b",
    ),
    "same data twice": (
        raw([info("a", [8]), info("b", [8])], data=bytes(32)),
        "overlaps",
        "b",
    ),
    "partial overlap": (
        raw([info("a", [16]), info("b", [16], offset=32)], data=DATA),
        "overlaps",
        "b",
    ),
    "contained": (
        raw([info("a", [32]), info("b", [8], offset=64)], data=DATA),
        "overlaps",
        "b",
    ),
    "hole before": (raw([info("a", [8], offset=32)], data=bytes(64)), "hole", "a"),
    "hole between": (
        raw([info("a", [8]), info("b", [8], offset=96)], data=DATA),
        "hole",
        "b",
    ),
    "trailing bytes": (FINE + b"x", "1 bytes behind", ""),
    "trailing megabytes": (FINE + bytes(1 << 22), "behind the last tensor", ""),
    "old quantization": (
        build(
            [pair("general.quantization_version", U32, scalar(U32, 1))],
            [f32("a", 8)._replace(dims=(32,), kind=2, data=bytes(18))],
        ),
        "version 2",
        "general.quantization_version",
    ),
    "quantization version of an array": (
        build(
            [pair("general.quantization_version", ARRAY, array(U32, [2, 2]))],
            [f32("a", 8)._replace(dims=(32,), kind=2, data=bytes(18))],
        ),
        "version 2",
        "general.quantization_version",
    ),
    "split count of an array": (
        build([pair("split.count", ARRAY, array(U16, [3, 3]))]),
        "positive",
        "split.count",
    ),
    "split count 0": (build([pair("split.count", U16, scalar(U16, 0))]), "positive", "split.count"),
    "split count text": (
        build([pair("split.count", STRING, text("three"))]),
        "positive",
        "split.count",
    ),
    "split without its name": (build([pair("split.count", U16, scalar(U16, 3))]), "00001-of", ""),
}
CASES = {
    name: Case({FILE: content}, FILE, found, f"{FILE}: {subject}" if subject else "")
    for name, (content, found, subject) in LIES.items()
}
DAMAGED = {
    "NaN scale in Q4_0": blocks("Q4_0", 0, NAN),
    "infinite scale in Q8_0": blocks("Q8_0", 0, INF),
    "NaN minimum in Q4_1": blocks("Q4_1", 2, NAN),
    "infinite minimum in Q5_1": blocks("Q5_1", 2, INF),
    "NaN scale in Q5_0": blocks("Q5_0", 0, NAN),
    "NaN scale in Q2_K": blocks("Q2_K", 80, NAN),
    "infinite minimum in Q2_K": blocks("Q2_K", 82, INF),
    "NaN scale in Q3_K": blocks("Q3_K", 108, NAN),
    "NaN scale in Q4_K": blocks("Q4_K", 0, NAN),
    "infinite minimum in Q5_K": blocks("Q5_K", 2, INF),
    "NaN scale in Q6_K": blocks("Q6_K", 208, NAN),
    "NaN scale in IQ4_NL": blocks("IQ4_NL", 0, NAN),
    "NaN scale in IQ4_XS": blocks("IQ4_XS", 0, NAN),
    "NaN scale in TQ1_0": blocks("TQ1_0", 52, NAN),
    "infinite scale in TQ2_0": blocks("TQ2_0", 64, INF),
    "NaN exponent in MXFP4": blocks("MXFP4", 0, b"\xff"),
}
CASES |= {n: Case({FILE: data}, FILE, "", f"{FILE}: a.weight") for n, data in DAMAGED.items()}
CASES |= {
    "link to nothing": Case({FILE: Link("nowhere")}, FILE),
    "link to itself": Case({FILE: Link(FILE)}, FILE),
    "link to a device": Case({FILE: Link("/dev/zero")}, FILE),
    "directory": Case({f"{FILE}/x": b""}, FILE),
    "byte order mark": Case({FILE: b"\xef\xbb\xbf" + FINE}, FILE, "starts with 'GGUF'"),
}
