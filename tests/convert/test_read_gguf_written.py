"""Files of the GGUF writer, read back by jaxquant and by the gguf package."""

import os

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.convert.write_gguf import Part, array_part, parts_of, write_gguf
from jaxquant.errors import FormatError
from jaxquant.formats import gguf, gguf_encode
from jaxquant.formats.gguf_types import TYPES
from tests.formats.test_gguf import KEPT, oracle, random_blocks

VALUES = {
    "general.architecture": "llama",
    "text": "grüße",
    "empty": "",
    "yes": True,
    "whole": 7,
    "negative": -7,
    "large": 1 << 40,
    "half": 0.5,
    "kept": np.uint16(9),
    "wide": np.float64(1 / 3),
    "words": ["a", "", "ß"],
    "numbers": [1, -2, 3],
    "fractions": [0.5, 1.5],
    "flags": [True, False],
    "array": np.arange(5, dtype=np.int8),
    "nothing": np.zeros(0, np.float32),
}
KINDS = {
    "yes": "bool",
    "whole": "uint32",
    "negative": "int32",
    "large": "int64",
    "half": "float32",
    "kept": "uint16",
    "wide": "float64",
    "words": "array of string",
    "numbers": "array of int32",
    "fractions": "array of float32",
    "flags": "array of bool",
    "array": "array of int8",
    "nothing": "array of float32",
}


def same(found, expected) -> bool:
    if isinstance(found, np.ndarray):
        return np.array_equal(found, np.asarray(expected))
    return found == expected


def test_metadata_round_trip(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, VALUES, [])
    metadata = open_gguf(path).metadata
    assert list(metadata) == list(VALUES)
    assert all(same(metadata[key], value) for key, value in VALUES.items())
    assert {key: metadata.kind(key) for key in KINDS} == KINDS


def example_parts():
    """A weight of every type that is kept packed, and dense ones."""
    parts, raws = [], {}
    for name in KEPT:
        shape = (2, 3, 512)
        raw = random_blocks(name, shape)
        q = gguf.decode(raw, TYPES[name], shape)
        raws[f"{name}.weight"] = gguf_encode.encode(q, TYPES[name])
        parts += parts_of(f"{name}.weight", q, TYPES[name])
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        raws[f"array.{kind}"] = gguf_encode.quantize(values, TYPES[kind])
        parts.append(array_part(f"array.{kind}", values, kind))
    return parts, raws


@pytest.mark.parametrize("alignment", [32, 64])
def test_tensors_round_trip(alignment, tmp_path):
    path = tmp_path / "m.gguf"
    parts, raws = example_parts()
    write_gguf(path, {"general.alignment": alignment}, parts)
    file = open_gguf(path)
    assert list(file.tensors) == list(raws)
    for name, raw in raws.items():
        np.testing.assert_array_equal(file.tensors[name].read(), raw)


def test_the_gguf_package_reads_it(tmp_path):
    package = oracle()
    path = tmp_path / "m.gguf"
    parts, raws = example_parts()
    write_gguf(path, VALUES, parts)
    reader = package.GGUFReader(path)
    for key, value in VALUES.items():
        if key != "nothing":
            assert same(np.asarray(reader.fields[key].contents()), np.asarray(value)), key
    assert [t.name for t in reader.tensors] == list(raws)
    ours = open_gguf(path)
    for tensor in reader.tensors:
        decoded = package.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            ours.array(tensor.name), decoded.reshape(ours.tensors[tensor.name].shape)
        )


def test_nvfp4_keeps_its_tensor_scale(tmp_path):
    path = tmp_path / "m.gguf"
    q = gguf.decode(random_blocks("NVFP4", (2, 64)), TYPES["NVFP4"], (2, 64), "", np.float32([0.3]))
    write_gguf(path, {}, parts_of("up.weight", q, TYPES["NVFP4"]))
    again = open_gguf(path).qtensor("up.weight")
    np.testing.assert_array_equal(np.asarray(jq.dequantize(again)), np.asarray(jq.dequantize(q)))
    assert len(again.scales) == 2


def ones(name="w", shape=(2, 32), kind="F32") -> Part:
    return array_part(name, np.ones(shape, np.float32), kind)


@pytest.mark.parametrize(
    ("metadata", "parts", "message"),
    [
        ({"": 1}, [], "metadata key"),
        ({"clé": 1}, [], "ASCII"),
        ({"a\n": 1}, [], "printable"),
        ({"k": None}, [], "NoneType"),
        ({"k": {"a": 1}}, [], "dict"),
        ({"k": ["a", 1]}, [], "list"),
        ({"k": [[1, 2]]}, [], "list"),
        ({"k": np.complex64(1)}, [], "complex64"),
        ({"general.alignment": 12}, [], "power of two"),
        ({"general.alignment": "32"}, [], "power of two"),
        ({"general.alignment": np.int32([32, 32])}, [], "power of two"),
        ({}, [ones(), ones()], "written twice"),
        ({}, [ones("")], "name of 0 bytes"),
        ({}, [ones("a" * 65)], "name of 65 bytes"),
        ({}, [ones(shape=(1, 1, 1, 1, 1))], "1 to 4 axes"),
        ({}, [ones(shape=())], "1 to 4 axes"),
        ({}, [ones(shape=(2, 33), kind="Q8_0")], "blocks of 32"),
        ({}, [Part("w", TYPES["F32"], (4,), lambda: np.zeros(15, np.uint8))], "16 bytes"),
        ({}, [Part("w", TYPES["F32"], (4,), lambda: np.zeros(4, np.float32))], "float32"),
        ({}, [ones(kind="Q8_0")._replace(kind=TYPES["Q4_K"])], "blocks of 256"),
    ],
)
def test_what_cannot_be_written(metadata, parts, message, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"what was here before")
    with pytest.raises(FormatError, match=message):
        write_gguf(path, metadata, parts)
    assert path.read_bytes() == b"what was here before"
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_an_unknown_type():
    with pytest.raises(FormatError, match="Q9"):
        array_part("w", np.ones(3), "Q9")


def test_the_file_has_usual_permissions(tmp_path):
    write_gguf(tmp_path / "m.gguf", {}, [])
    (tmp_path / "plain").touch()
    assert (tmp_path / "m.gguf").stat().st_mode == (tmp_path / "plain").stat().st_mode
