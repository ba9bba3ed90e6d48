"""Where each golden vector and each row of the bad-input catalogue has its test.

The names are checked: a test that is renamed or removed leaves its row without one.
"""

from __future__ import annotations

import importlib
import re

import pytest

WORDS, PLACES = "formats.test_golden_words", "formats.test_golden_rows"
READ, HOSTILE, GGUF = "convert.test_read", "hostile.test_hostile", "formats.test_gguf"
BAD = f"{READ}::test_catalogue_of_bad_modules"
REFUSED = f"{HOSTILE}::test_refused"

GOLDEN = {
    "4 bits, lowest first": [f"{WORDS}::test_dense_words[4 bit, lowest first]"],
    "compressed-tensors int4": [f"{PLACES}::test_compressed_tensors_words[4]"],
    "compressed-tensors int8": [f"{PLACES}::test_compressed_tensors_words[8]"],
    "AWQ GEMM": [f"{WORDS}::test_awq_gemm_word"],
    "2 bits": [f"{WORDS}::test_dense_words[2 bit]"],
    "3 bits": [
        f"{WORDS}::test_dense_words[3 bit, dense]",
        f"{PLACES}::test_compressed_tensors_words[3]",
    ],
    "GPTQ zero points": [
        f"{PLACES}::test_symmetric_gptq_zero_points[{name}]"
        for name in ("4b-v1", "4b-v2", "8b-v1", "8b-v2")
    ],
    "NVFP4 and MXFP4 byte": [f"{PLACES}::test_fp4_byte"],
    "NF4 byte": [f"{PLACES}::test_nf4_byte"],
    "HQQ byte": [f"{PLACES}::test_hqq_byte"],
    "AWQ GEMV_FAST places": [f"{WORDS}::test_awq_gemv_fast_places"],
    "Marlin places": [f"{WORDS}::test_marlin_places"],
    "QServe places": [f"{WORDS}::test_qserve_places"],
    "scale swizzle": [f"{WORDS}::test_swizzled_places", f"{WORDS}::test_swizzling_is_invertible"],
    "GGUF rows of rotary heads": ["convert.test_read_gguf_model::test_rotary_rows"],
    "GGUF blocks": [f"{GGUF}::test_golden_covers_every_kept_type", f"{GGUF}::test_golden_block"],
    "GGUF quantizers": [f"{GGUF}::test_quantizers_match_golden_bytes"],
}


def bad(*names: str) -> list[str]:
    return [f"{BAD}[{name}]" for name in names]


def refused(reader: str, *names: str) -> list[str]:
    return [f"{REFUSED}[{reader}: {name}]" for name in names]


CATALOGUE = {
    "float8 weight without a scale": bad("fp8 weight without scale"),
    "scale beside a 16-bit weight": bad("scale beside a 16-bit weight"),
    "block scales transposed or cut": bad("transposed scale grid", "floor instead of ceil"),
    "scales of fused shards": [f"{PLACES}::test_scales_of_fused_shards"],
    "scale that is zero, negative or not finite": bad(
        "zero scale over codes", "negative scale", "NaN scale", "infinite scale"
    ),
    "exponents as integers or floats": [
        *bad("integer scale", "e8m0 NaN", "mxfp4 with float scales", "mxfp4 with e4m3 scales"),
        f"{PLACES}::test_exponent_scales_in_both_dtypes",
    ],
    "NaN code": bad("NaN weight byte"),
    "e5m2 against an e4m3 config": [
        f"{READ}::test_bad_configs_are_named[fmt contradicts dtype]",
        *bad("e5m2 weight for an e4m3 config"),
    ],
    "GPTQ rows of other bits": [f"{READ}::test_bad_gptq_configs[wrong bits]"],
    "GPTQ zeros against the version": [
        f"{READ}::test_zeros_that_contradict_the_version_are_trusted"
    ],
    "GPTQ g_idx": [
        *bad("gptq g_idx out of range", "gptq g_idx negative", "gptq g_idx float"),
        f"{READ}::test_int64_group_index_is_accepted",
    ],
    "GPTQ act-order without g_idx": bad("gptq act-order without g_idx"),
    "AWQ shape against the version": [f"{READ}::test_awq_shapes_win_over_the_declared_version"],
    "AWQ float zeros": [f"{PLACES}::test_awq_float_zeros_mean_gemv_fast"],
    "compressed-tensors never compressed": [
        f"{READ}::test_weights_that_were_never_compressed_are_read_as_they_are"
    ],
    "compressed-tensors without a shape": [f"{READ}::test_packed_shape_may_be_derived"],
    "compressed-tensors without zero points": bad("ct asymmetric without zeros"),
    "compressed-tensors zero points in bytes": [
        "formats.test_formats::test_value_is_that_of_the_definition[ct-packed-zp-int8]"
    ],
    "compressed-tensors placeholder g_idx": [f"{READ}::test_placeholder_group_indices_are_ignored"],
    "NVFP4 padded scales": bad("nvfp4 padded scales"),
    "NVFP4 global scale below one": bad("nvfp4 multiplier under the reciprocal's name"),
    "NVFP4 with both tensor scales": bad("nvfp4 both tensor scales", "modelopt reciprocal name"),
    "gpt-oss shapes": bad("gpt-oss blocks of another width", "gpt-oss scales of another shape"),
    "QServe with both zeros": bad("qserve both kinds of zeros"),
    "bitsandbytes without its state": bad("bnb without state"),
    "bitsandbytes state of another size": bad("bnb state of another size"),
    "GGUF extents": refused(
        "gguf", "no dimensions", "five dimensions", "product wraps to 0", "offset past end"
    )
    + refused("gguf", "alignment 3", "alignment 48"),
    "GGUF types": refused("gguf", "type 4 removed", "type 42 unknown"),
    "safetensors header": refused(
        "safetensors", "duplicate name", "length over the cap", "hole", "overlap"
    )
    + refused("safetensors", "offsets reversed"),
    "index that leads elsewhere": refused("index", "escapes upwards", "absolute", "missing shard"),
    "tensor in two shards": refused("index", "tensor in two shards with other bytes"),
    "missing experts": [f"{READ}::test_missing_experts_are_listed"],
    "rows of k_proj": [f"{READ}::test_rows_of_k_proj_must_be_the_configs_heads"],
    "pickle": refused("safetensors", "pickle only", "pickle"),
    "empty quantization config": [f"{PLACES}::test_an_empty_config_is_none"],
}


# What the format descriptions leave open, and the test that it is refused or reported.
OPEN = {
    "SmoothQuant modules with buffers a and b": [
        f"{READ}::test_bad_configs_are_named[SmoothQuant of torch-int]"
    ],
    "torchao Int4Tensor": bad("torchao int4"),
    "MXFP4 exponents before compressed-tensors 0.14": [
        f"{READ}::test_exponents_of_an_early_mxfp4_writer_are_reported"
    ],
    "GGUF Q1_0": refused("gguf", "type 41 unverified"),
    "GPTQ planes of odd bits": [f"{READ}::test_bad_gptq_configs[planar]"],
    "QServe second level beyond int8": bad("qserve second level beyond int8"),
}


def exists(test: str) -> bool:
    module, name, parameter = re.fullmatch(r"([\w.]+)::(\w+)(?:\[(.*)\])?", test).groups()
    function = getattr(importlib.import_module(f"tests.{module}"), name, None)
    if function is None or parameter is None:
        return callable(function)
    tables = [mark.args[1] for mark in getattr(function, "pytestmark", ()) if len(mark.args) > 1]
    return any(parameter in [str(value) for value in table] for table in tables)


@pytest.mark.parametrize("row", [*GOLDEN, *CATALOGUE, *OPEN])
def test_every_row_has_a_test(row):
    tests = (GOLDEN | CATALOGUE | OPEN)[row]
    assert tests and [test for test in tests if not exists(test)] == []


def test_a_missing_test_is_seen():
    assert not exists(f"{BAD}[no such case]") and not exists(f"{READ}::test_of_nothing")
