"""Spot values of packed layouts, produced once with the tools that define them."""

import ml_dtypes
import numpy as np
import pytest

from jaxquant.arrays.codes import CODES, E2M1_VALUES
from jaxquant.errors import FormatError
from jaxquant.formats.base import RawModule
from jaxquant.formats.ct_packed import read_words, write_words
from jaxquant.formats.hqq import _shifts
from jaxquant.formats.marlin import INTERLEAVE, places
from jaxquant.formats.nibbles import (
    fast_to_patterns,
    gemm_to_data,
    patterns_to_fast,
    patterns_to_gemm,
)
from jaxquant.formats.qserve import patterns_to_permuted, permuted_to_patterns
from jaxquant.formats.scaled import E4M3FNUZ
from jaxquant.formats.swizzle import swizzle_scales, unswizzle_scales
from jaxquant.transforms.repack import (
    elements_to_words,
    transpose_copy,
    unpack_bits,
    words_to_elements,
)
from tests.formats.cases import CASES
from tests.oracle.packing import awq_words, fast_place, marlin_place, qserve_place

WORDS = {
    "4 bit, lowest first": (4, range(8), [0x76543210]),
    "4 bit, excess form of -8 to 7": (4, range(16), [0x76543210, 0xFEDCBA98]),
    "8 bit, excess form of -128 -1 0 127": (8, [0, 127, 128, 255], [0xFF807F00]),
    "2 bit": (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    "3 bit, dense": (3, list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    "zero points of v1, 4 bit": (4, [7] * 8, [0x77777777]),
    "zero points of v2, 4 bit": (4, [8] * 8, [0x88888888]),
    "zero points of v1, 8 bit": (8, [127] * 4, [0x7F7F7F7F]),
    "zero points of v2, 8 bit": (8, [128] * 4, [0x80808080]),
}


@pytest.mark.parametrize("name", WORDS)
def test_dense_words(name):
    bits, elements, words = WORDS[name]
    elements = np.array([list(elements)], np.uint8)
    got = elements_to_words(elements, bits)
    assert [f"{w:08X}" for w in got.view(np.uint32)[0]] == [f"{w:08X}" for w in words]
    np.testing.assert_array_equal(words_to_elements(got, bits, elements.shape[1]), elements)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_dense_words_of_any_length(bits, count):
    elements = np.random.default_rng(bits).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    words = elements_to_words(elements, bits)
    assert words.shape[1] == -(-count * bits // 32)
    np.testing.assert_array_equal(words_to_elements(words, bits, count), elements)


@pytest.mark.parametrize("bits,per_word", [(3, 10), (5, 6), (6, 5), (7, 4)])
def test_padded_words(bits, per_word):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 33)).astype(np.uint8)
    words = write_words(codes, bits, padded=True)
    assert words.shape[1] == -(-33 // per_word)
    np.testing.assert_array_equal(read_words(words, bits, 33, padded=True), codes)
    assert int(words.view(np.uint32)[0, 0]) & ((1 << bits) - 1) == codes[0, 0]


def test_awq_gemm_word():
    codes = np.arange(8, dtype=np.uint8)[:, None].repeat(8, axis=1)
    assert f"{int(patterns_to_gemm(codes).view(np.uint32)[0, 0]):08X}" == "75316420"


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (64, 200), (8, 6), (8, 5)])
def test_awq_gemm_is_a_bijection(shape):
    codes = np.random.default_rng(1).integers(0, 16, shape).astype(np.uint8)
    words = patterns_to_gemm(codes)
    np.testing.assert_array_equal(words, awq_words(codes))
    data = gemm_to_data(words)
    got = data if shape[1] % 2 else unpack_bits(data, 4, -1)
    np.testing.assert_array_equal(got, codes)


FAST = {
    (0, 0): (0, 0, 0),
    (0, 1): (0, 1, 0),
    (0, 8): (0, 0, 1),
    (0, 32): (0, 8, 0),
    (1, 0): (0, 16, 0),
    (4, 0): (1, 0, 0),
    (3, 63): (0, 63, 3),
    (2, 100): (0, 108, 0),
}


@pytest.mark.parametrize("element", FAST)
def test_awq_gemv_fast_places(element):
    row, column, nibble = FAST[element]
    assert fast_place(*element) == FAST[element], "the oracle agrees"
    codes = np.zeros((8, 128), np.uint8)
    codes[element] = 5
    words = patterns_to_fast(codes)
    assert int(words.view(np.uint16)[row, column]) == 5 << (4 * nibble)
    np.testing.assert_array_equal(fast_to_patterns(words), codes)


MARLIN4 = {
    (0, 0): (0, 0, 0),
    (1, 0): (0, 0, 4),
    (8, 0): (0, 0, 1),
    (0, 8): (0, 0, 2),
    (0, 1): (0, 16, 0),
    (0, 16): (0, 1, 0),
    (2, 0): (0, 4, 0),
    (5, 70): (0, 232, 4),
    (17, 3): (1, 48, 4),
}
MARLIN8 = {
    (0, 0): (0, 0, 0),
    (1, 0): (0, 0, 2),
    (8, 0): (0, 0, 1),
    (0, 1): (0, 32, 0),
    (0, 8): (0, 1, 0),
    (0, 16): (0, 2, 0),
    (2, 0): (0, 8, 0),
    (5, 70): (0, 464, 2),
    (17, 3): (1, 96, 2),
}


@pytest.mark.parametrize("bits,table", [(4, MARLIN4), (8, MARLIN8)])
def test_marlin_places(bits, table):
    fields = 32 // bits
    field = places(128, bits)
    assert sorted(field.reshape(-1)) == list(range(16 * 128))
    assert len(INTERLEAVE[bits]) == fields
    for (k, n), (row, word, position) in table.items():
        assert k // 16 == row
        assert divmod(int(field[k % 16, n]), fields) == (word, position)
        assert marlin_place(k, n, bits) == (row, word * fields + position), "the oracle agrees"


QSERVE = {
    (0, 0): (0, 0),
    (1, 0): (64, 0),
    (8, 0): (4, 0),
    (16, 0): (0, 1),
    (0, 1): (1, 0),
    (0, 4): (16, 0),
    (0, 16): (8, 0),
    (0, 32): (512, 0),
    (32, 0): (2048, 0),
    (37, 77): (3441, 0),
}


@pytest.mark.parametrize("element", QSERVE)
def test_qserve_places(element):
    byte, nibble = QSERVE[element]
    assert qserve_place(*element, 128) == QSERVE[element], "the oracle agrees"
    codes = np.zeros((64, 128), np.uint8)
    codes[element] = 5
    packed = patterns_to_permuted(codes)
    assert packed.view(np.uint8).reshape(-1)[byte] == 5 << (4 * nibble)
    np.testing.assert_array_equal(permuted_to_patterns(packed), codes)


def test_nvfp4_byte_has_the_even_input_low():
    low, high = 0xF2 & 15, 0xF2 >> 4
    assert (E2M1_VALUES[low], E2M1_VALUES[high]) == (1.0, -6.0)
    assert unpack_bits(np.array([[0xF2]], np.uint8), 4, -1).tolist() == [[low, high]]


def test_bitsandbytes_byte_has_the_first_element_high():
    case = CASES["bnb-nf4"]
    fmt_module = case.module()
    weight = fmt_module.need("weight").read()
    first = case.weight[0, 0] / case.arrays["weight.absmax"][0]
    table = case.arrays["weight.quant_map"]
    assert table[weight[0, 0] >> 4] == pytest.approx(first)
    assert isinstance(fmt_module, RawModule)


def test_hqq_byte_has_the_first_half_high():
    assert _shifts(4) == [4, 0]
    assert _shifts(2) == [6, 4, 2, 0]
    assert _shifts(3)[0] == 27
    assert (2 << _shifts(4)[0]) | 15 == 0x2F


def test_fnuz_bytes_are_half_of_fn_bytes():
    octets = np.arange(256, dtype=np.uint8)
    plain = (octets & 0x7F != 0x7F) & (octets != 0x80)
    fn = octets.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[plain]
    fnuz = octets.view(E4M3FNUZ.storage).astype(np.float32)[plain]
    np.testing.assert_array_equal(fnuz * 2, fn)
    assert octets.view(E4M3FNUZ.storage)[0x7F] == 240, "fn has no such number"


@pytest.mark.parametrize(
    "name,byte,value", [("e4m3", 0x7E, 448), ("e4m3", 1, 2**-9), ("e5m2", 0x7B, 57344)]
)
def test_float_bytes(name, byte, value):
    assert np.array([byte], np.uint8).view(CODES[name].storage)[0] == value


def test_transposing_words_is_a_transpose():
    words = np.arange(35 * 1100, dtype=np.int32).reshape(35, 1100)
    np.testing.assert_array_equal(transpose_copy(words), words.T)


SWIZZLE = {
    (0, 1): 1,
    (1, 0): 16,
    (32, 0): 4,
    (0, 4): 512,
    (33, 5): 533,
    (127, 7): 1023,
    (128, 0): 1024,
}


@pytest.mark.parametrize("element", SWIZZLE)
def test_swizzled_places(element):
    scales = np.zeros((200, 8), np.uint8)
    scales[element] = 7
    swizzled = swizzle_scales(scales)
    assert swizzled[SWIZZLE[element]] == 7
    assert swizzled.sum() == 7


@pytest.mark.parametrize("shape", [(128, 4), (200, 7), (1, 1), (300, 12)])
def test_swizzling_is_invertible(shape):
    scales = np.random.default_rng(0).integers(0, 120, shape).astype(np.uint8)
    scales = scales.view(ml_dtypes.float8_e4m3fn)
    back = unswizzle_scales(swizzle_scales(scales), *shape)
    assert back.dtype == scales.dtype
    np.testing.assert_array_equal(back.view(np.uint8), scales.view(np.uint8))
    with pytest.raises(FormatError, match="bytes"):
        unswizzle_scales(np.zeros(5, np.uint8), *shape)
