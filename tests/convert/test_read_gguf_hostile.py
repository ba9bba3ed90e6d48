"""GGUF files that lie in every way at once, and the caps; single lies are in ``tests.hostile``."""

import time

import pytest

from jaxquant.convert import gguf_header, gguf_metadata
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.errors import FormatError
from tests.convert.gguf_bytes import (
    ARRAY,
    BOOL,
    STRING,
    array,
    build,
    f32,
    pad,
    pair,
    strings,
    text,
)

ARCH = pair("general.architecture", STRING, text("llama"))
GOOD = build([ARCH], [f32("a.weight", 8, 4), f32("b.weight", 8)])


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    # The last tensor ends at the last 32 bytes: b.weight has exactly 32.
    for size in range(len(GOOD)):
        path.write_bytes(GOOD[:size])
        with pytest.raises(FormatError) as error:
            open_gguf(path)
        assert str(path) in error.value.where


def test_every_flipped_header_byte_is_refused_or_read(tmp_path):
    """No flip of a header byte raises anything but FormatError."""
    path = tmp_path / "model.gguf"
    refused = 0
    for i in range(len(GOOD) - 160):
        for flip in (0xFF, 0x01):
            data = bytearray(GOOD)
            data[i] ^= flip
            path.write_bytes(data)
            try:
                file = open_gguf(path)
                dict(file.metadata)
            except FormatError:
                refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    ("key", "kind", "body", "message"),
    [
        ("k", STRING, text(b"\xff\xff"), "UTF-8"),
        ("k", ARRAY, array(STRING, [b"ok", b"\xc3\x28"]), "UTF-8"),
        ("k", BOOL, b"\x02", "bool of value 2"),
        ("k", ARRAY, array(BOOL, [0, 1, 7]), "bool of value 7"),
    ],
)
def test_bad_values_are_refused_when_asked_for(key, kind, body, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build([pair(key, kind, body)]))
    metadata = open_gguf(path).metadata
    with pytest.raises(FormatError, match=message) as error:
        _ = metadata[key]
    assert error.value.where == f"{path}: {key}"


def test_header_larger_than_the_cap(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(build([pair("k", STRING, text("x" * 5000))], [f32("a", 8)]))
    assert open_gguf(path).metadata["k"] == "x" * 5000
    monkeypatch.setattr(gguf_metadata, "MAX_HEADER_BYTES", 4096)
    with pytest.raises(FormatError, match="a header has at most 4096 bytes"):
        open_gguf(path)


def test_many_tensors_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_TENSORS", 4)
    path = tmp_path / "model.gguf"
    path.write_bytes(build([], [f32(f"t{i}", 8) for i in range(5)]))
    with pytest.raises(FormatError, match="5 tensors"):
        open_gguf(path)


def test_reading_a_large_vocabulary_takes_under_a_second(tmp_path):
    path = tmp_path / "model.gguf"
    words = [b"token%d" % i for i in range(400_000)]
    path.write_bytes(pad(build([strings("tokenizer.ggml.tokens", words)])))
    start = time.process_time()
    file = open_gguf(path)
    assert time.process_time() - start < 1
    assert file.metadata["tokenizer.ggml.tokens"][-1] == "token399999"


@pytest.mark.parametrize("path", ["missing.gguf", "."])
def test_no_file(path, tmp_path):
    with pytest.raises(FormatError):
        open_gguf(tmp_path / path)
