"""Lies in ``model.safetensors.index.json``."""

from __future__ import annotations

import json

import numpy as np

from jaxquant.convert import read_quantized
from tests.convert.writer import assemble
from tests.hostile.harness import Case, Link

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
read = read_quantized


def shard(name: str, value: float = 1.0) -> bytes:
    data = np.full((3, 4), value, np.float32).tobytes()
    return assemble({name: {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}, data)


SHARDS = {ONE: shard("a"), TWO: shard("b")}


def index(text: object, found: str = "", subject: str = "", file: str = INDEX, **files) -> Case:
    content = text if isinstance(text, bytes) else json.dumps(text).encode()
    return Case(SHARDS | {INDEX: content} | files, file, found, subject)


def mapped(name: object, found: str = "") -> Case:
    """An index that has the tensor ``a`` in this file."""
    return index({"weight_map": {"a": name, "b": TWO}}, found)


def value(text: bytes) -> Case:
    return index(b'{"weight_map": {"a": %s}}' % text)


GOOD = index({"metadata": {"total_size": 96}, "weight_map": {"a": ONE, "b": TWO}})
CASES = {
    "escapes upwards": mapped("../model.safetensors", "plain file name"),
    "escapes twice": mapped("../../../../etc/passwd", "plain file name"),
    "escapes from below": mapped(f"sub/../{ONE}", "plain file name"),
    "absolute": mapped("/etc/passwd", "plain file name"),
    "subfolder": mapped(f"sub/{ONE}", "plain file name"),
    "backslash": mapped("..\\model.safetensors", "plain file name"),
    "drive": mapped("C:\\model.safetensors", "plain file name"),
    "dot": mapped(".", "plain file name"),
    "dot dot": mapped("..", "plain file name"),
    "empty name": mapped("", "plain file name"),
    "null byte": mapped("model\0.safetensors"),
    "newline": mapped("model\n.safetensors"),
    "terminal escape": mapped("\x1b[2Jmodel.safetensors"),
    "name of 5000 letters": mapped("m" * 5000),
    "lone surrogate": value(b'"\\ud800.safetensors"'),
    "itself": mapped(INDEX),
    "number": mapped(3),
    "null": mapped(None),
    "boolean": mapped(True),
    "list": mapped([ONE]),
    "object": mapped({"file": ONE}),
    "missing shard": mapped("model-00003-of-00003.safetensors", "does not exist"),
    "a device": index({"weight_map": {"a": "zero", "b": TWO}}, zero=Link("/dev/zero")),
    "a link out": index(
        {"weight_map": {"a": "out", "b": TWO}}, "links to", out=Link("../secret")
    )._replace(
        files=SHARDS
        | {
            "../secret": shard("a"),
            "out": Link("../secret"),
            INDEX: json.dumps({"weight_map": {"a": "out", "b": TWO}}).encode(),
        }
    ),
    "a link in a circle": index({"weight_map": {"a": "x", "b": TWO}}, x=Link("y"), y=Link("x")),
    "a directory": index({"weight_map": {"a": "x", "b": TWO}}, **{"x/file": b""}),
    "tensor not in its shard": index({"weight_map": {"a": TWO}}, "missing", ": a", TWO),
    "tensor in no shard": index({"weight_map": {"c": ONE}}, "missing", ": c", ONE),
    "tensor in two shards with other bytes": index(
        {"weight_map": {"a": ONE, "b": TWO}},
        "a tensor is stored once",
        ": a",
        TWO,
        **{
            TWO: assemble(
                {
                    "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                    "b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
                },
                b"12",
            )
        },
    ),
    "damaged shard": index({"weight_map": {"a": ONE, "b": TWO}}, file=TWO, **{TWO: b"no"}),
    "empty shard": index({"weight_map": {"a": ONE, "b": TWO}}, file=TWO, **{TWO: b""}),
    "shard is a pointer of Git LFS": index(
        {"weight_map": {"a": ONE, "b": TWO}},
        "git lfs pull",
        file=TWO,
        **{TWO: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"},
    ),
    "no weight_map": index({"metadata": {}}, "no weight_map"),
    "weight_map a list": index({"weight_map": [1, 2]}),
    "weight_map null": index({"weight_map": None}),
    "weight_map text": index({"weight_map": "model.safetensors"}),
    "array": index(b"[]"),
    "empty file": index(b""),
    "text": index(b"hello"),
    "two objects": index(b'{"weight_map": {}} {}'),
    "cut": index(b'{"weight_map": {"a": "x'),
    "byte order mark": index(b"\xef\xbb\xbf" + b'{"weight_map": {}}'),
    "UTF-16": index('{"weight_map": {}}'.encode("utf-16")),
    "not UTF-8": index(b'{"weight_map": {"\xff": "x"}}'),
    "duplicate tensor": index(b'{"weight_map": {"a": "x", "a": "y"}}', "twice", ": a"),
    "duplicate map": index(b'{"weight_map": {}, "weight_map": {}}', "twice"),
    "duplicate other key": index(b'{"metadata": {}, "metadata": {}, "weight_map": {}}', "twice"),
    "nesting bomb": index(b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nesting bomb in the metadata": index(b'{"metadata": ' + b'{"a":' * 100_000 + b"1"),
    "many lists": index(b'{"weight_map": {"a": [' + b"[]," * 5_000_000 + b"1]}}"),
    "long number": value(b"1" * 100_000),
    "pointer of Git LFS": index(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "two indexes": index(
        {"weight_map": {}},
        "one index",
        file="model",
        **{"a.safetensors.index.json": b"{}", "b.safetensors.index.json": b"{}"},
    )._replace(files={"a.safetensors.index.json": b"{}", "b.safetensors.index.json": b"{}"}),
    "index is a directory": Case({f"{INDEX}/x": b""}, "model"),
    "index links out": Case(
        SHARDS | {"../secret": b'{"weight_map": {}}', INDEX: Link("../secret")}, "model", "links to"
    ),
}
