"""The GGUF reader on good files: built here, written by the gguf package, and made by llama.cpp."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.convert.read_gguf import open_gguf, read_gguf_quantized
from jaxquant.errors import FormatError
from jaxquant.formats import gguf_encode
from jaxquant.formats.gguf_types import TYPES
from tests.convert.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    FORMATS,
    I32,
    STRING,
    U8,
    U16,
    U32,
    Tensor,
    array,
    build,
    f32,
    pair,
    scalar,
    strings,
    text,
)
from tests.formats.test_gguf import oracle, random_blocks

CORPUS = os.environ.get("JAXQUANT_CORPUS")
needs_corpus = pytest.mark.skipif(CORPUS is None, reason="JAXQUANT_CORPUS is not set")
FOLDERS = ("gguf-llamacpp-llama-k", "gguf-llamacpp-qwen3moe-a", "gguf-py-alltypes")


def write(tmp_path: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def tensor(name: str, kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Random blocks of any type."""
    return Tensor(
        name, tuple(reversed(shape)), TYPES[kind].id, random_blocks(kind, shape, seed).tobytes()
    )


def test_metadata_of_every_type(tmp_path):
    values = {kind: 2 if kind != BOOL else 1 for kind in FORMATS}
    pairs = [pair(f"k{kind}", kind, scalar(kind, value)) for kind, value in values.items()]
    pairs += [pair(f"a{kind}", ARRAY, array(kind, [0, value])) for kind, value in values.items()]
    nested = struct.pack("<IQ", ARRAY, 2) + array(U8, [1, 2]) + array(STRING, ["x", ""])
    pairs += [
        pair("text", STRING, text("héllo")),
        strings("words", ["a", "", "ü"]),
        pair("nested", ARRAY, nested),
        pair("none", ARRAY, array(U8, [])),
    ]
    metadata = open_gguf(write(tmp_path, build(pairs))).metadata
    for kind, value in values.items():
        assert metadata[f"k{kind}"] == value
        assert type(metadata[f"k{kind}"]) is {BOOL: bool, F32: float, F64: float}.get(kind, int)
        assert metadata[f"a{kind}"].tolist() == [0, value]
    assert metadata["text"] == "héllo"
    assert metadata["words"] == ["a", "", "ü"]
    assert metadata["nested"][0].tolist() == [1, 2]
    assert metadata["nested"][1] == ["x", ""]
    assert metadata["none"].size == 0
    assert "absent" not in metadata
    assert len(metadata) == len(list(metadata)) == len(pairs)
    assert metadata.get("absent") is None


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_tensors_where_they_lie(version, alignment, tmp_path):
    pairs = [pair("general.alignment", U32, scalar(U32, alignment))]
    tensors = [
        f32("norm.weight", 5, value=2.5),
        tensor("w.weight", "Q4_K", 3, 512),
        tensor("experts.weight", "Q8_0", 2, 3, 64),
        Tensor("ids", (3,), TYPES["I32"].id, struct.pack("<3i", 1, -2, 3)),
    ]
    file = open_gguf(write(tmp_path, build(pairs, tensors, version, alignment)))
    assert file.version == version
    assert {n: t.shape for n, t in file.tensors.items()} == {
        "norm.weight": (5,),
        "w.weight": (3, 512),
        "experts.weight": (2, 3, 64),
        "ids": (3,),
    }
    assert file.tensors["w.weight"].dtype == "Q4_K"
    assert file.nbytes == sum(len(t.data) for t in tensors)
    for expected in tensors:
        assert file.tensors[expected.name].read().tobytes() == expected.data
    np.testing.assert_array_equal(file.array("norm.weight"), np.full(5, 2.5, np.float32))
    np.testing.assert_array_equal(file.array("ids"), [1, -2, 3])
    for name in ("w.weight", "experts.weight"):
        np.testing.assert_array_equal(
            np.asarray(jq.dequantize(file.qtensor(name))), file.array(name)
        )


def test_read_quantized_reads_any_architecture(tmp_path):
    tensors = [
        f32("norm.weight", 8),
        tensor("enc.7.odd.weight", "Q6_K", 2, 256),
        f32("conv", 4, 2, 2, 3),
        Tensor("ids", (2, 2), TYPES["I32"].id, bytes(16)),
    ]
    weights = jq.read_quantized(write(tmp_path, build([], tensors)))
    assert list(weights) == ["enc.7.odd", "conv"]
    assert weights["conv"].shape == (3, 2, 2, 4)


def test_what_is_no_weight_is_refused(tmp_path):
    ids = Tensor("ids", (2, 2), TYPES["I32"].id, bytes(16))
    file = open_gguf(write(tmp_path, build([], [f32("norm.weight", 8), ids])))
    for name, message in (
        ("norm.weight", "F32 of 1 axes"),
        ("ids", "I32"),
        ("absent", "no tensor"),
    ):
        with pytest.raises(FormatError, match=message):
            file.qtensor(name)
    with pytest.raises(FormatError, match="no tensor 'absent'"):
        file.array("absent")


def test_damaged_scales_name_the_tensor(tmp_path):
    bad = tensor("blk.0.ffn_up.weight", "Q8_0", 1, 64)
    bad = bad._replace(data=b"\x00\x7c" + bad.data[2:])
    path = write(tmp_path, build([], [bad]))
    with pytest.raises(FormatError, match="not finite") as error:
        read_gguf_quantized(path)
    assert error.value.where == f"{path}: blk.0.ffn_up.weight"


@pytest.mark.parametrize("experts", [1, 3])
def test_nvfp4_takes_its_tensor_scale(experts, tmp_path):
    shape = (2, 64) if experts == 1 else (experts, 2, 64)
    scales = np.arange(1, experts + 1, dtype="<f4") / 8
    tensors = [
        tensor("blk.0.up.weight", "NVFP4", *shape),
        Tensor("blk.0.up.scale", (experts,), 0, scales.tobytes()),
        tensor("blk.0.down.weight", "NVFP4", *shape, seed=1),
    ]
    file = open_gguf(write(tmp_path, build([], tensors)))
    q = file.qtensor("blk.0.up.weight")
    expected = file.array("blk.0.up.weight") * scales.reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_array_equal(np.asarray(jq.dequantize(q)), expected.reshape(shape))
    assert len(file.qtensor("blk.0.down.weight").scales) == 1


def shard(number: int, count: int, tensors, total: int | None = None) -> bytes:
    pairs = [
        pair("split.no", U16, scalar(U16, number)),
        pair("split.count", U16, scalar(U16, count)),
    ]
    if total is not None:
        pairs.append(pair("split.tensors.count", I32, scalar(I32, total)))
    if number == 0:
        pairs.append(pair("general.architecture", STRING, text("llama")))
    return build(pairs, tensors)


def write_shards(folder: Path, parts: list[bytes]) -> Path:
    for i, data in enumerate(parts, 1):
        (folder / f"m-{i:05d}-of-{len(parts):05d}.gguf").write_bytes(data)
    return folder / f"m-00001-of-{len(parts):05d}.gguf"


def test_split_files(tmp_path):
    parts = [[], [f32("a", 8, value=1)], [f32("b", 8, value=2)]]
    first = write_shards(tmp_path, [shard(i, 3, p, 2) for i, p in enumerate(parts)])
    for path in (first, tmp_path / "m-00003-of-00003.gguf"):
        file = open_gguf(path)
        assert file.path == first
        assert file.metadata["general.architecture"] == "llama"
        assert (file.array("a")[0], file.array("b")[0]) == (1, 2)


@pytest.mark.parametrize(
    ("parts", "message", "where"),
    [
        ([shard(0, 2, [f32("a", 8)], 1), shard(1, 2, [f32("a", 8)])], "another part", "a"),
        ([shard(0, 2, [f32("a", 8)], 3), shard(1, 2, [f32("b", 8)])], "2 tensors in all", ""),
        ([shard(0, 2, []), shard(0, 2, [])], "split.no 1", ""),
        ([shard(0, 2, []), shard(1, 3, [])], "split.no 1 of split.count 2", ""),
        ([shard(0, 2, []), build()], "part None of None", ""),
        ([shard(0, 3, []), shard(1, 3, [])], "one of 3 parts", ""),
        ([shard(0, 2, []), b"GGUF"], "truncated", ""),
    ],
)
def test_parts_that_do_not_fit(parts, message, where, tmp_path):
    with pytest.raises(FormatError, match=message) as error:
        open_gguf(write_shards(tmp_path, parts))
    assert error.value.where.endswith(where)


def test_a_missing_part(tmp_path):
    first = write_shards(tmp_path, [shard(i, 3, []) for i in range(3)])
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(FormatError) as error:
        open_gguf(first)
    assert error.value.where.endswith("m-00002-of-00003.gguf")


def test_equals_the_gguf_packages_reader(tmp_path):
    package = oracle()
    names = [n for n in TYPES if n not in ("Q8_1",)]
    pairs = [pair("general.architecture", STRING, text("test"))]
    tensors = [
        tensor(f"{n}.weight", n, 2, 512) for n in names if not (n.startswith("I") and len(n) < 4)
    ]
    tensors = [t for t in tensors if not t.name.startswith(("F", "BF"))]
    path = write(tmp_path, build(pairs, tensors))
    file = open_gguf(path)
    theirs = {t.name: t for t in package.GGUFReader(path).tensors}
    assert list(theirs) == list(file.tensors)
    for name, other in theirs.items():
        assert other.data_offset > 0
        assert file.tensors[name].read().tobytes() == other.data.tobytes()
        assert file.tensors[name].shape == tuple(reversed(other.shape.tolist()))


def corpus_files():
    for folder in FOLDERS:
        expected = json.loads((Path(CORPUS or "") / folder / "expected.json").read_text())
        if "tensors" in expected:
            yield Path(CORPUS or "") / folder / "model.gguf", expected["tensors"]
        else:
            for entry in expected.values():
                yield Path(CORPUS or "") / folder / entry["file"], entry["tensors"]


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


@needs_corpus
@pytest.mark.corpus
@pytest.mark.parametrize("path, expected", list(corpus_files()) if CORPUS else [])
def test_corpus_is_decoded_bit_for_bit(path, expected):
    if path.stem.split(".")[-1].startswith(("IQ1", "IQ2", "IQ3")):
        oracle()
    file = open_gguf(path)
    weights = jq.read_quantized(path)
    assert expected
    for name, facts in expected.items():
        assert file.tensors[name].dtype == facts["type"]
        assert list(file.tensors[name].shape) == facts["shape"]
        assert digest(file.array(name)) == facts["sha256_f32"], name
        if len(facts["shape"]) < 2:
            continue
        q = weights[name.removesuffix(".weight")]
        assert q.shape == tuple(facts["shape"])
        if q.layout.dense:
            assert digest(np.asarray(q.data[0], np.float32)) == facts["sha256_f32"], name
        else:
            packed = gguf_encode.encode(q, file.tensors[name].kind)
            np.testing.assert_array_equal(packed, file.tensors[name].read())


@needs_corpus
@pytest.mark.corpus
def test_corpus_through_the_public_interface():
    folder = Path(CORPUS or "") / FOLDERS[2]
    expected = json.loads((folder / "expected.json").read_text())["tensors"]
    weights = jq.read_quantized(folder / "model.gguf")
    for name in (n for n in expected if ".1." in n):
        found = np.asarray(jq.dequantize(weights[name.removesuffix(".weight")]))
        assert digest(found) == expected[name]["sha256_f32"], name
