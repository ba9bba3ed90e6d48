"""Lies in safetensors headers."""

from __future__ import annotations

import json
import struct

import numpy as np

from jaxquant.convert import read_quantized
from tests.convert.writer import assemble
from tests.hostile.harness import Case, Link

X = np.arange(12, dtype=np.float32).reshape(3, 4)
ENTRY = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
DATA = X.tobytes()
FILE = "model.safetensors"
read = read_quantized


def entry(**changes):
    return {"a": ENTRY | changes}


def shape(*sizes: object) -> bytes:
    return assemble(entry(shape=list(sizes)), DATA)


def value(text: bytes) -> bytes:
    """A header whose tensor has this text as its size."""
    return assemble(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 48]}}' % text, DATA)


HEADERS = {
    "no file content": b"",
    "a few bytes": b"\x01\x02",
    "length beyond the file": assemble(b"{}", b"", 1 << 40),
    "length of all ones": b"\xff" * 8 + b"{}",
    "length over the cap": struct.pack("<Q", 100_000_001) + b"{" + b" " * 64,
    "truncated data": assemble(entry(), DATA[:-4]),
    "trailing bytes": assemble(entry(), DATA + b"\0"),
    "data but no tensor": assemble({}, b"\0" * 8),
    "leading space": assemble(b" " + json.dumps(entry()).encode(), DATA),
    "an array": assemble(b"[]", b""),
    "no JSON": assemble(b"{hello}", b""),
    "unclosed": assemble(b'{"a": {"dtype": "F32"', b""),
    "bytes behind the object": assemble(json.dumps(entry()).encode() + b"x", DATA),
    "invalid UTF-8": assemble(b'{"\xff\xfe": {}}', b""),
    "duplicate name": assemble(b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), DATA),
    "duplicate field": assemble(
        b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [3, 4], "data_offsets": [0, 48]}}', DATA
    ),
    "unknown dtype": assemble(entry(dtype="I4"), DATA),
    "dtype no string": assemble(entry(dtype=7), DATA),
    "dtype lies": assemble(entry(dtype="F16"), DATA),
    "shape lies": assemble(entry(shape=[3, 5]), DATA),
    "negative size": assemble(entry(shape=[-3, -4]), DATA),
    "huge size": assemble(entry(shape=[1 << 62, 1 << 62]), DATA),
    "huge number": assemble(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", DATA),
    "size as float": assemble(entry(shape=[3.0, 4]), DATA),
    "size as boolean": assemble(entry(shape=[True, 12]), DATA),
    "shape no list": assemble(entry(shape="3x4"), DATA),
    "rank of hundreds": assemble(entry(shape=[1] * 300), DATA),
    "negative offset": assemble(entry(data_offsets=[-48, 0]), DATA),
    "offsets reversed": assemble(entry(data_offsets=[48, 0]), DATA),
    "one offset": assemble(entry(data_offsets=[48]), DATA),
    "offset past the end": assemble(entry(data_offsets=[48, 96]), DATA),
    "hole": assemble(entry(data_offsets=[4, 52]), b"\0" * 4 + DATA),
    "overlap": assemble({"a": ENTRY, "b": ENTRY | {"data_offsets": [24, 72]}}, DATA + b"\0" * 24),
    "missing field": assemble({"a": {"dtype": "F32", "shape": [3, 4]}}, DATA),
    "extra field": assemble(entry(more=1), DATA),
    "entry no object": assemble({"a": 5}, DATA),
    "metadata no strings": assemble({"__metadata__": {"n": 1}} | entry(), DATA),
    "metadata twice": assemble(
        b'{"__metadata__": {}, "__metadata__": {}, "a": %s}' % json.dumps(ENTRY).encode(), DATA
    ),
    "nesting bomb": assemble(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "object bomb": assemble(b'{"a":' + b'{"b":' * 50_000 + b"1" + b"}" * 50_000 + b"}", b""),
    "many empty lists": assemble(b'{"a": [' + b"[]," * 1_000_000 + b"[]]}", b""),
    "long entry": assemble(b'{"a": {"dtype": "' + b"F" * 100_000 + b'"}}', b""),
    "many tensors, then a bad one": assemble(
        b"{"
        + b",".join(
            b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(5_000)
        )
        + b',"x":{}}',
        b"",
    ),
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "HTML error page": b"<!DOCTYPE html><html>not found</html>",
}
HEADERS |= {
    "byte order mark": assemble(b"\xef\xbb\xbf" + json.dumps(entry()).encode(), DATA),
    "header of length 0": struct.pack("<Q", 0) + DATA,
    "header of one brace": assemble(b"{", b""),
    "header in UTF-16": assemble(json.dumps(entry()).encode("utf-16-le"), DATA),
    "size with exponent": value(b"12e0"),
    "size of a huge exponent": value(b"1e999999999"),
    "size of a float that overflows": value(b"1e400"),
    "size NaN": value(b"NaN"),
    "size Infinity": value(b"Infinity"),
    "size null": value(b"null"),
    "size as text": value(b'"12"'),
    "size as object": value(b'{"n": 12}'),
    "size as list": value(b"[3, 4]"),
    "size with a sign": value(b"+12"),
    "size in octal": value(b"012"),
    "size of 10000 digits": value(b"1" * 3000),
    "product of eight huge sizes": shape(*[1 << 40] * 8),
    "product wraps to the right size": shape((1 << 62) + 3, 4),
    "nine axes": shape(*[1] * 8, 12),
    "offsets as floats": assemble(entry(data_offsets=[0.0, 48.0]), DATA),
    "offsets as booleans": assemble(entry(data_offsets=[False, 48]), DATA),
    "offsets null": assemble(entry(data_offsets=None), DATA),
    "three offsets": assemble(entry(data_offsets=[0, 24, 48]), DATA),
    "offset of 2 to the 64": assemble(entry(data_offsets=[0, 1 << 64]), DATA),
    "offset huge and reversed": assemble(entry(data_offsets=[1 << 70, 48]), DATA),
    "dtype null": assemble(entry(dtype=None), DATA),
    "dtype lower case": assemble(entry(dtype="f32"), DATA),
    "dtype a list": assemble(entry(dtype=["F32"]), DATA),
    "dtype with odd bits": assemble(entry(dtype="F4", shape=[3], data_offsets=[0, 1]), b"1"),
    "entry null": assemble({"a": None}, b""),
    "entry a list": assemble({"a": [1]}, b""),
    "metadata null": assemble({"__metadata__": None} | entry(), DATA),
    "metadata a list": assemble({"__metadata__": ["a"]} | entry(), DATA),
    "metadata nested": assemble({"__metadata__": {"a": {"b": "c"}}} | entry(), DATA),
    "metadata with a key twice": assemble(
        b'{"__metadata__": {"x": "1", "x": "2"}, "a": %s}' % json.dumps(ENTRY).encode(), DATA
    ),
    "metadata of megabytes": assemble({"__metadata__": {"x": "y" * (9 << 20)}} | entry(), DATA),
    "name twice, once escaped": assemble(
        b'{"a": %s, "\\u0061": %s}' % ((json.dumps(ENTRY).encode(),) * 2), DATA
    ),
    "control byte in a name": assemble(b'{"a\x00b": %s}' % json.dumps(ENTRY).encode(), DATA),
    "unfinished escape": assemble(b'{"a\\": %s}' % json.dumps(ENTRY).encode(), DATA),
    "bad escape": assemble(b'{"\\x41": %s}' % json.dumps(ENTRY).encode(), DATA),
    "comment": assemble(b"{/* */}", b""),
    "trailing comma": assemble(b'{"a": %s,}' % json.dumps(ENTRY).encode(), DATA),
    "single quotes": assemble(b"{'a': 1}", b""),
    "a second object": assemble(json.dumps(entry()).encode() + b"{}", DATA),
    "a hole at the end of two": assemble(
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [52, 100]}}, DATA + DATA + b"\0" * 4
    ),
    "the same bytes twice": assemble({"a": ENTRY, "b": ENTRY}, DATA),
    "a hundred megabytes of spaces": struct.pack("<Q", 99_999_999) + b"{" + b" " * 1000,
    "zip archive": b"PK\x03\x04" + bytes(200),
    "gzip": b"\x1f\x8b\x08" + bytes(200),
    "pickle": b"\x80\x04\x95" + bytes(200),
}
CASES = {name: Case({FILE: content}, FILE) for name, content in HEADERS.items()}
# Names are said where the header got as far as a name.
CASES |= {
    name: CASES[name]._replace(subject=f"{FILE}: a")
    for name in ("dtype lies", "shape lies", "unknown dtype", "truncated data", "size NaN")
}
CASES |= {
    "link to a file outside": Case(
        {"../secret": assemble(entry(), DATA), FILE: Link("../secret")}, "model", "links to"
    ),
    "link to nothing": Case({FILE: Link("nowhere")}, "model"),
    "link to itself": Case({FILE: Link(FILE)}, "model"),
    "link to a directory": Case({FILE: Link(".")}, "model"),
    "link to a device": Case({FILE: Link("/dev/zero")}, "model"),
    "pickle only": Case({"pytorch_model.bin": b"PK\x03\x04"}, "model", "pickle"),
    "two files and no index": Case(
        {"a.safetensors": assemble(entry(), DATA), "b.safetensors": assemble(entry(), DATA)},
        "model",
        "no index",
    ),
    "no file": Case({"README": b""}, "model"),
    "shards of other counts": Case(
        {"m-00001-of-00003.safetensors": assemble(entry(), DATA)}, "model", "1 of 3 shards"
    ),
}
GOOD = Case({FILE: assemble(entry(), DATA)}, FILE)
