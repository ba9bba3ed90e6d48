"""GGUF block codecs against golden vectors, the gguf package and themselves."""

import importlib
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxquant.arrays.codes import CODES
from jaxquant.errors import FormatError, LayoutError
from jaxquant.formats import gguf, gguf_encode
from jaxquant.formats.gguf_codebook import CODEBOOK_TYPES
from jaxquant.formats.gguf_types import BY_ID, REFUSED, TYPES, type_of_id
from jaxquant.transforms import numeric, structure
from jaxquant.transforms.numeric import dequantize

# type: (float16 or byte fields as {offset: bytes}, selected values, sum), for the block whose byte i
# is 37 i + 11 with those fields overwritten.  Published by the formats' reference package.
ONE, HALF = b"\x00\x3c", b"\x00\x38"
GOLDEN = {
    "Q4_0": ({0: ONE}, {0: -3, 1: 2, 15: -8, 16: -3, 31: 0}, -21),
    "Q4_1": ({0: ONE, 2: HALF}, {0: 15.5, 1: 4.5, 15: 10.5, 16: 9.5, 31: 12.5}, 261),
    "Q5_0": ({0: ONE}, {0: 9, 1: -2, 15: -12, 16: 14, 31: 1}, 15),
    "Q5_1": ({0: ONE, 2: HALF}, {0: 19.5, 1: 24.5, 15: 30.5, 16: 19.5, 31: 5.5}, 521),
    "Q8_0": ({0: ONE}, {0: 85, 1: 122, 15: -128, 16: -91, 31: -48}, -176),
    "Q2_K": (
        {80: ONE, 82: HALF},
        {0: 33, 1: 0, 31: -1.5, 32: 7.5, 127: 42, 128: 7.5, 200: 8, 255: 4.5},
        2059,
    ),
    "Q3_K": (
        {108: ONE},
        {0: 81, 1: -108, 31: 64, 32: -22, 127: 72, 128: 2, 200: 25, 255: 42},
        958,
    ),
    "Q4_K": (
        {0: ONE, 2: HALF},
        {0: 315.5, 1: -25.5, 31: 160.5, 32: 8, 127: 81, 128: 423, 200: 138.5, 255: 48.5},
        54440,
    ),
    "Q5_K": (
        {0: ONE, 2: HALF},
        {0: 811.5, 1: -25.5, 31: 160.5, 32: 112, 127: -3, 128: 1047, 200: 138.5, 255: 108.5},
        116216,
    ),
    "Q6_K": (
        {208: ONE},
        {0: -1431, 1: 1696, 31: -96, 32: 231, 127: 1500, 128: -351, 200: 1089, 255: -60},
        4612,
    ),
    "IQ4_NL": ({0: ONE}, {0: -35, 1: 25, 15: -127, 16: -35, 31: 1}, -257),
    "IQ4_XS": (
        {0: ONE},
        {0: 65, 1: -1, 31: 35, 32: 455, 127: 196, 128: -585, 200: 1140, 255: -16},
        -11005,
    ),
    "TQ1_0": ({52: ONE}, {0: -1, 1: -1, 31: 0, 32: -1, 127: -1, 128: 0, 200: 0, 255: -1}, -2),
    "TQ2_0": ({64: ONE}, {0: 2, 1: -1, 31: 1, 32: 1, 127: 1, 128: 2, 200: 0, 255: -1}, 129),
    "MXFP4": ({0: b"\x7f"}, {0: 0, 1: 3, 15: -1.5, 16: 1.5, 31: 3}, 12.5),
    "NVFP4": (
        {0: b"\x38\x40\x30\x3c"},
        {0: -6, 1: 2, 15: -1, 16: 12, 32: -3, 63: 0.75},
        3.75,
    ),
}
SCALES = {name: list(fields) for name, (fields, _, _) in GOLDEN.items()}
KEPT = [name for name, fmt in gguf.BLOCK_FORMATS.items() if fmt.join is not None]
SHAPES = [(3, 512), (2, 3, 256)]


def golden_block(name: str) -> np.ndarray:
    block = ((37 * np.arange(TYPES[name].bytes) + 11) % 256).astype(np.uint8)
    for offset, field in GOLDEN[name][0].items():
        block[offset : offset + len(field)] = np.frombuffer(field, np.uint8)
    return block


def random_blocks(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes with finite scales."""
    kind, rng = TYPES[name], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // kind.elements, kind.bytes), np.uint8)
    halves = {"IQ1_M": [], "Q8_1": [0, 2]}.get(name, SCALES.get(name, [0]))
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(100, 150, len(blocks))
    elif name == "NVFP4":
        blocks[:, :4] &= 0x7F
    else:
        for at in halves:
            scale = rng.normal(size=(len(blocks), 1)).astype("<f2")
            blocks[:, at : at + 2] = scale.view(np.uint8)
    if name == "IQ1_M":
        # Its float16 scale lies in the top nibbles of four words: keep the exponent small.
        blocks[:, 55] &= 0x3F
    return blocks.reshape(-1)


def oracle():
    """The gguf package; continuous integration must have it."""
    if os.environ.get("CI"):
        return importlib.import_module("gguf")
    return pytest.importorskip("gguf")


def test_golden_covers_every_kept_type():
    assert sorted(GOLDEN) == sorted(KEPT)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_block(name):
    _, expected, total = GOLDEN[name]
    values = gguf.dequantize(golden_block(name), TYPES[name], (1, TYPES[name].elements))[0]
    assert {i: float(values[i]) for i in expected} == expected
    assert float(values.sum(dtype=np.float64)) == total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*KEPT, "Q8_K"])
def test_qtensor_has_the_reference_value(name, shape):
    if name == "Q8_K":
        raw = np.random.default_rng(1).integers(0, 256, (-(-np.prod(shape) // 256), 292), np.uint8)
        raw[:, :4] = np.full((len(raw), 1), 0.37, "<f4").view(np.uint8)
        raw = raw.reshape(-1)
    else:
        raw = random_blocks(name, shape)
    q = gguf.decode(raw, TYPES[name], shape)
    assert q.shape == shape
    assert q.layout == gguf.layout_of(TYPES[name], shape[-1])
    expected = gguf.dequantize(raw, TYPES[name], shape)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), expected)


@pytest.mark.parametrize("name", [n for n in TYPES if n not in ("Q8_1", "Q8_K")])
def test_dequantize_equals_the_gguf_package(name):
    package, kind, shape = oracle(), TYPES[name], (4, 512)
    if name in gguf.PLAIN_DTYPES:
        dtype = gguf.PLAIN_DTYPES[name]
        source = np.random.default_rng(2).normal(size=shape) * 50
        values = source.astype(dtype)
        raw = values.reshape(-1).view(np.uint8)
        if not name.startswith("I"):
            values = values.astype(np.float32)
        np.testing.assert_array_equal(gguf.dequantize(raw, kind, shape), values)
        return
    raw = random_blocks(name, shape, 3)
    expected = package.quants.dequantize(raw.reshape(4, -1), package.GGMLQuantizationType(kind.id))
    found = gguf.dequantize(raw, kind, shape)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found.tobytes() == expected.astype("<f4").tobytes()


@pytest.mark.parametrize("name", KEPT)
def test_repacking_is_lossless(name):
    kind, shape = TYPES[name], (2, 3, 512)
    raw = random_blocks(name, shape, 4)
    q = gguf.decode(raw, kind, shape)
    again = gguf_encode.encode(q, kind)
    assert gguf.dequantize(again, kind, shape).tobytes() == (
        gguf.dequantize(raw, kind, shape).tobytes()
    )
    if name in ("MXFP4", "NVFP4", "TQ1_0"):
        # Random bytes are no canonical form of these: two zeros, unused base-3 numbers.
        np.testing.assert_array_equal(
            gguf_encode.encode(gguf.decode(again, kind, shape), kind), again
        )
    else:
        np.testing.assert_array_equal(again, raw)


@pytest.mark.parametrize("name", KEPT)
def test_every_bit_of_a_block_counts(name):
    """Negative control: whichever byte changes, the decoded values change."""
    kind, block = TYPES[name], golden_block(name)
    values = gguf.dequantize(block, kind, (1, kind.elements))
    for i in range(kind.bytes):
        changed = block.copy()
        # A middle bit: in a scale it stays finite, in TQ1_0 it moves a digit.
        changed[i] ^= 0x10
        assert not np.array_equal(gguf.dequantize(changed, kind, (1, kind.elements)), values), i


def test_quantizers_match_golden_bytes():
    x = ((np.arange(32) - 16) / 8).astype(np.float32)
    q8 = "082481899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77"
    q4 = "0034809191a2a2b3b3c4c4d5d5e6e6f7f7f8"
    assert gguf_encode.quantize(x, TYPES["Q8_0"]).tobytes().hex() == q8
    assert gguf_encode.quantize(x, TYPES["Q4_0"]).tobytes().hex() == q4


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e3])
def test_quantizers_equal_the_gguf_package(name, scale):
    package = oracle()
    rng = np.random.default_rng(5)
    x = (rng.standard_t(3, size=(64, 256)) * scale).astype(np.float32)
    x[0] = 0
    x[1, :32] = np.round(x[1, :32] / scale * 4) * np.float32(scale) / 4
    expected = package.quants.quantize(x, package.GGMLQuantizationType[name]).reshape(-1)
    np.testing.assert_array_equal(gguf_encode.quantize(x, TYPES[name]), expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_floats_round_trip(name):
    x = np.random.default_rng(6).normal(size=(4, 96)).astype(gguf.PLAIN_DTYPES[name])
    raw = gguf_encode.quantize(x.astype(np.float32), TYPES[name])
    q = gguf.decode(raw, TYPES[name], x.shape)
    assert q.layout.dense
    assert gguf_encode.type_of(q) == TYPES[name]
    np.testing.assert_array_equal(q.data[0], x)
    np.testing.assert_array_equal(gguf_encode.encode(q, TYPES[name]), raw)


@pytest.mark.parametrize("name", KEPT)
def test_structural_transforms_commute(name):
    fused = jax.jit(dequantize)
    q = gguf.decode(random_blocks(name, (8, 512), 7), TYPES[name], (8, 512))
    dense = np.asarray(fused(q))
    cut = structure.slice_axis(q, "in", 256, 512)
    np.testing.assert_array_equal(np.asarray(fused(cut)), dense[:, 256:])
    rows = structure.slice_axis(q, "out", 3, 5)
    np.testing.assert_array_equal(np.asarray(fused(rows)), dense[3:5])
    halves = structure.split(q, "in", [256, 256])
    joined = structure.concat(halves, "in")
    np.testing.assert_array_equal(np.asarray(fused(joined)), dense)
    with pytest.raises(LayoutError):
        structure.slice_axis(q, "in", 8, 512)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Q4_K", 4.5), ("Q5_K", 5.5), ("Q6_K", 6.5625), ("Q3_K", 3.5625), ("Q8_0", 8.5)],
)
def test_weights_keep_their_width(name, bits):
    """At most the sub-scales, 6 bits in a byte, take more room than in the file."""
    shape = (64, 1024)
    q = gguf.decode(random_blocks(name, shape), TYPES[name], shape)
    assert bits <= q.bits_per_weight + 1e-9 <= bits + 2 * 2 / 16


def test_nvfp4_tensor_scale_is_a_leaf():
    kind, shape = TYPES["NVFP4"], (2, 128)
    raw = random_blocks("NVFP4", shape)
    q = gguf.decode(raw, kind, shape, tensor_scale=np.float32([0.25]))
    plain = gguf.dequantize(raw, kind, shape)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), plain * np.float32(0.25))
    assert gguf_encode.type_of(q) == kind
    again = gguf_encode.encode(q, kind)
    np.testing.assert_array_equal(gguf.dequantize(again, kind, shape), plain)
    for bad in ([np.nan], [1, 2, 3], []):
        with pytest.raises(FormatError, match="tensor scale"):
            gguf.decode(raw, kind, shape, tensor_scale=np.float32(bad))


def test_nvfp4_stacked_weights_have_a_scale_each():
    kind, shape = TYPES["NVFP4"], (3, 2, 64)
    raw, scales = random_blocks("NVFP4", shape), np.float32([0.5, 2, 4])
    q = gguf.decode(raw, kind, shape, tensor_scale=scales)
    plain = gguf.dequantize(raw, kind, shape)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), plain * scales[:, None, None])


def test_group_of_128_is_written_as_q4_0():
    w = np.random.default_rng(8).normal(size=(4, 256)).astype(np.float32)
    q = numeric.as_numpy(numeric.quantize(w, "w4a16_g128", ("out", "in")))
    raw = gguf_encode.encode(q, TYPES["Q4_0"])
    np.testing.assert_array_equal(
        gguf.dequantize(raw, TYPES["Q4_0"], w.shape), np.asarray(dequantize(q))
    )


def test_scales_that_do_not_fit_are_refused():
    w = np.random.default_rng(8).normal(size=(4, 256)).astype(np.float32) * 1e-9
    q = numeric.as_numpy(numeric.quantize(w, "w4a16_g32", ("out", "in")))
    with pytest.raises(FormatError, match="cannot hold"):
        gguf_encode.encode(q, TYPES["Q4_0"], "blk.0.ffn_up")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "F32", "Q8_1", "IQ2_S"])
def test_encode_refuses_another_layout(name):
    w = np.random.default_rng(8).normal(size=(4, 256)).astype(np.float32)
    q = numeric.as_numpy(numeric.quantize(w, "w8a16_g128", ("out", "in")))
    with pytest.raises(FormatError, match="blk"):
        gguf_encode.encode(q, TYPES[name], "blk.0.ffn_up")


@pytest.mark.parametrize("name", [n for n in KEPT if n != "NVFP4"])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_scales_that_are_no_numbers_are_refused(name, bad):
    block = golden_block(name)
    for offset in SCALES[name]:
        broken = block.copy()
        if name == "MXFP4":
            broken[0] = 255
        else:
            broken[offset : offset + 2] = np.array([float(bad)], "<f2").view(np.uint8)
        for read in (gguf.decode, gguf.dequantize):
            with pytest.raises(FormatError, match="not finite") as error:
                read(broken, TYPES[name], (1, TYPES[name].elements), "file: tensor")
            assert error.value.where == "file: tensor"


def test_nvfp4_scale_bytes():
    block = golden_block("NVFP4")
    block[:4] = 0x7F, 0x00, 0x38 | 0x80, 0x38
    values = gguf.dequantize(block, TYPES["NVFP4"], (1, 64))[0]
    assert not values[:32].any()
    assert values[32:].any()
    block[2] = 0xFF
    with pytest.raises(FormatError, match="0xFF"):
        gguf.dequantize(block, TYPES["NVFP4"], (1, 64))


@pytest.mark.parametrize("number", [*REFUSED, 42, 1000, 1 << 31])
def test_unknown_and_removed_types_are_named(number):
    with pytest.raises(FormatError, match=f"element type {number}") as error:
        type_of_id(number, "file: tensor")
    assert error.value.where == "file: tensor"


def test_type_table():
    assert all(type_of_id(kind.id, "") == kind for kind in TYPES.values())
    package = oracle()
    for number, kind in BY_ID.items():
        theirs = package.GGMLQuantizationType(number)
        assert theirs.name == kind.name
        if kind.name != "Q8_1":  # the package gives 40 bytes, the C struct has 36
            assert package.GGML_QUANT_SIZES[theirs] == (kind.elements, kind.bytes)


def test_codebook_types_need_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    for name in CODEBOOK_TYPES:
        with pytest.raises(FormatError, match=f"{name}.*not installed"):
            gguf.decode(np.zeros(TYPES[name].bytes, np.uint8), TYPES[name], (1, 256), "t")


def test_codebook_types_decode_to_f32():
    oracle()
    raw = random_blocks("IQ2_S", (2, 256))
    q = gguf.decode(raw, TYPES["IQ2_S"], (2, 256))
    assert q.layout.code == CODES["f32"]
    assert gguf.layout_of(TYPES["IQ2_S"], 256) == q.layout


def test_integers_are_no_weights():
    with pytest.raises(FormatError, match="integer tensor"):
        gguf.decode(np.zeros(32, np.uint8), TYPES["I32"], (2, 4))


def test_quantize_refuses():
    with pytest.raises(FormatError, match="multiple of 32"):
        gguf_encode.quantize(np.ones((2, 33), np.float32), TYPES["Q8_0"], "t")
    with pytest.raises(FormatError, match="Q8_0 or Q4_0"):
        gguf_encode.quantize(np.ones((2, 256), np.float32), TYPES["Q4_K"], "t")
    with pytest.raises(FormatError, match="not finite"):
        gguf_encode.quantize(np.full((2, 32), np.nan, np.float32), TYPES["Q8_0"], "t")
    with pytest.raises(FormatError, match="not finite"):
        gguf_encode.quantize(np.full((2, 32), 1e38, np.float32), TYPES["Q8_0"], "t")


def test_padding_a_table_without_zero_is_refused():
    q = gguf.decode(golden_block("IQ4_NL"), TYPES["IQ4_NL"], (1, 32))
    with pytest.raises(LayoutError, match="no pattern stands for zero"):
        structure.pad_axis(q, "out", 2)


def test_large_tensors_are_decoded_in_chunks(monkeypatch):
    raw = random_blocks("Q4_K", (7, 512))
    whole = gguf.decode(raw, TYPES["Q4_K"], (7, 512))
    monkeypatch.setattr(gguf, "_CHUNK", 1024)
    parts = gguf.decode(raw, TYPES["Q4_K"], (7, 512))
    np.testing.assert_array_equal(np.asarray(dequantize(parts)), np.asarray(dequantize(whole)))
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(
            parts.data + parts.scales + parts.zeros,
            whole.data + whole.scales + whole.zeros,
            strict=True,
        )
    )


def test_scale_dtypes_are_those_of_the_file():
    q = gguf.decode(random_blocks("MXFP4", (2, 64)), TYPES["MXFP4"], (2, 64))
    assert q.scales[0].dtype == ml_dtypes.float8_e8m0fnu
    q = gguf.decode(random_blocks("Q6_K", (2, 256)), TYPES["Q6_K"], (2, 256))
    assert [s.dtype for s in q.scales] == [np.int8, np.float16]


@pytest.mark.parametrize("name", KEPT)
def test_scales_are_the_products(name):
    kind, shape = TYPES[name], (3, 512)
    raw = random_blocks(name, shape)
    q = gguf.decode(raw, kind, shape)
    expected = np.asarray(q.scales[0], np.float32).reshape(3, -1)
    if len(q.scales) == 2:
        times = expected.shape[1] // q.scales[1].shape[1]
        expected = expected * np.repeat(q.scales[1].astype(np.float32), times, axis=1)
    found = gguf.scales_of(raw, kind, shape)
    np.testing.assert_array_equal(found.reshape(3, -1), expected)


def test_plain_numbers_have_no_scales():
    assert gguf.scales_of(np.zeros(64, np.uint8), TYPES["F32"], (2, 8)) is None
    assert gguf.scales_of(np.zeros(82, np.uint8), TYPES["IQ2_S"], (1, 256)).shape == (1, 16)
