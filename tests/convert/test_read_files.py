"""Files that a reader must survive: each gives one FormatError, soon, and without much memory."""

import json
import os
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from jaxquant.convert.read import open_checkpoint
from jaxquant.convert.read_safetensors import read_safetensors
from jaxquant.errors import FormatError
from jaxquant.formats.base import FormatWarning
from tests.convert.writer import assemble, write_checkpoint, write_file

X = np.arange(12, dtype=np.float32).reshape(3, 4)
ENTRY = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
DATA = X.tobytes()


def refused(call, *args):
    """The error of a call that must be refused within a second of work and 64 MB."""
    start = time.process_time()
    with pytest.raises(FormatError):
        call(*args)
    assert time.process_time() - start < 1
    tracemalloc.start()
    with pytest.raises(FormatError) as caught:
        call(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    return caught.value


def entry(**changes):
    return {"a": ENTRY | changes}


def test_a_good_header_passes_the_same_checks(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(assemble(entry(), DATA))
    np.testing.assert_array_equal(read_safetensors(path).tensors["a"].read(), X)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint16, np.float16, np.int64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_tensors_come_as_they_were_written(dtype, tmp_path):
    arrays = {"first": np.arange(3, dtype=np.int8), "second": np.arange(8).astype(dtype)}
    write_file(tmp_path / "f.safetensors", arrays)
    for name, array in arrays.items():
        got = read_safetensors(tmp_path / "f.safetensors").tensors[name].read()
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got.view(np.uint8), array.view(np.uint8))


def test_reading_does_not_copy(tmp_path):
    write_file(tmp_path / "f.safetensors", {"a": np.zeros((1 << 21,), np.float32)})
    tensor = read_safetensors(tmp_path / "f.safetensors").tensors["a"]
    tracemalloc.start()
    array = tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 8 << 20
    assert peak < 1 << 20
    assert not array.flags.writeable


def test_names_may_be_escaped_and_unicode(tmp_path):
    arrays = {'a"b\\c': X, "größe": X + 1, "__metadata": X}
    write_file(tmp_path / "f.safetensors", arrays, {"note": 'braces } { " in a value'})
    content = read_safetensors(tmp_path / "f.safetensors")
    assert set(content.tensors) == set(arrays)
    assert content.metadata["note"] == 'braces } { " in a value'


def sharded(folder, change=None):
    """A checkpoint of two shards whose index is changed by ``change(index)``."""
    write_checkpoint(folder, {"a": X, "b": X + 1, "c": X + 2}, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change:
        path.write_text(json.dumps(change(index) or index))
    return folder


def test_shards_are_read_through_their_index(tmp_path):
    checkpoint = open_checkpoint(sharded(tmp_path / "m"))
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    np.testing.assert_array_equal(checkpoint.tensors["c"].read(), X + 2)


def test_stray_shards_are_ignored(tmp_path):
    folder = sharded(tmp_path / "m")
    write_file(folder / "model-00009-of-00009.safetensors", {"stray": X})
    (folder / "broken.safetensors").write_bytes(b"no")
    assert "stray" not in open_checkpoint(folder).tensors


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder, outside = tmp_path / "m", tmp_path / "outside.safetensors"
    folder.mkdir()
    write_file(outside, {"a": X})
    os.symlink(outside, folder / "model.safetensors")
    assert "links to" in refused(open_checkpoint, folder).found


def test_links_inside_a_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_file(blobs / "0123", {"a": X})
    os.symlink(blobs / "0123", snapshot / "model.safetensors")
    assert list(open_checkpoint(snapshot).tensors) == ["a"]


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path):
    folder = sharded(tmp_path / "m")
    write_file(folder / "model-00002-of-00002.safetensors", {"b": X + 1, "a": X})
    assert set(open_checkpoint(folder).tensors) == {"a", "b", "c"}
    write_file(folder / "model-00002-of-00002.safetensors", {"b": X + 1, "a": X + 9})
    error = refused(open_checkpoint, folder)
    assert error.where.endswith(": a")
    assert "also in" in error.found


def test_unlisted_tensors_are_reported(tmp_path):
    folder = sharded(tmp_path / "m", lambda i: i["weight_map"].pop("c") is None)
    with pytest.warns(FormatWarning, match="not listed"):
        assert "c" not in open_checkpoint(folder).tensors


def test_pickles_are_refused_with_a_hint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        error = refused(open_checkpoint, path)
        assert "safetensors" in error.action


def test_missing_things_are_named(tmp_path):
    assert "no such directory" in refused(open_checkpoint, tmp_path / "none").found
    assert "no .safetensors" in refused(open_checkpoint, tmp_path).found
    write_file(tmp_path / "one.safetensors", {"a": X})
    write_file(tmp_path / "two.safetensors", {"a": X})
    assert "several weight files" in refused(open_checkpoint, tmp_path).found


def test_a_shard_missing_without_an_index_is_noticed(tmp_path):
    write_file(tmp_path / "model-00001-of-00002.safetensors", {"a": X})
    assert "1 of 2 shards" in refused(open_checkpoint, tmp_path).found
    write_file(tmp_path / "model-00002-of-00002.safetensors", {"b": X})
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("value", [{}, None])
def test_an_empty_quantization_config_means_unquantized(value, tmp_path):
    write_checkpoint(tmp_path, {"a": X}, {"quantization_config": value})
    assert open_checkpoint(tmp_path).quant_config is None


SIDE_FILES = {
    "quantize_config.json": ({"bits": 4, "group_size": 64, "desc_act": False}, "gptq"),
    "quant_config.json": ({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}, "awq"),
    "hf_quant_config.json": (
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        "modelopt",
    ),
    "quantization_config.json": ({"quant_method": "intel/auto-round", "bits": 4}, "auto-round"),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_side_files_describe_the_quantization(name, tmp_path):
    content, method = SIDE_FILES[name]
    write_checkpoint(tmp_path, {"a": X})
    (tmp_path / name).write_text(json.dumps(content))
    assert open_checkpoint(tmp_path).method == method


def test_config_json_wins_over_side_files_and_two_side_files_conflict(tmp_path):
    write_checkpoint(tmp_path, {"a": X}, {"quantization_config": {"quant_method": "fp8"}})
    for name in ("quantize_config.json", "quant_config.json"):
        (tmp_path / name).write_text(json.dumps(SIDE_FILES[name][0]))
    assert open_checkpoint(tmp_path).method == "fp8"
    (tmp_path / "config.json").write_text("{}")
    assert "quant_config.json" in refused(open_checkpoint, tmp_path).found


def test_quantization_configs_of_nested_and_old_names_are_found(tmp_path):
    config = {"text_config": {"quantization_config": {"quant_method": "compressed_tensors"}}}
    write_checkpoint(tmp_path / "a", {"a": X}, config)
    assert open_checkpoint(tmp_path / "a").method == "compressed-tensors"
    write_checkpoint(tmp_path / "b", {"a": X}, {"compression_config": {"format": "dense"}})
    assert open_checkpoint(tmp_path / "b").method == "compressed-tensors"


@pytest.mark.parametrize("method,keys", [("gptq", ("bits", "desc_act")), ("awq", ("w_bit",))])
def test_old_configs_without_a_method_are_known_by_their_keys(method, keys, tmp_path):
    write_checkpoint(tmp_path, {"a": X}, {"quantization_config": dict.fromkeys(keys, 4)})
    assert open_checkpoint(tmp_path).method == method
