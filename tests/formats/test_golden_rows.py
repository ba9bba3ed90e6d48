"""Golden bytes through whole formats: what the tools that define them write for known values."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxquant.arrays.codes import E2M1_VALUES
from jaxquant.convert.read import survey
from jaxquant.convert.read_checkpoint import open_checkpoint
from jaxquant.formats.base import FormatWarning
from jaxquant.transforms.numeric import dequantize
from tests.formats.cases import CASES
from tests.formats.test_formats import build, value

CODES = {
    3: (list(range(-4, 4)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    4: (list(range(-8, 8)) * 2, [0x76543210, 0xFEDCBA98] * 2),
    8: ([-128, -1, 0, 127] * 8, [0xFF807F00] * 8),
}


@pytest.mark.parametrize("bits", sorted(CODES))
def test_compressed_tensors_words(bits):
    """A file with these words in its first row holds these codes there."""
    case = CASES[f"ct-packed-{bits}b"]
    codes, words = CODES[bits]
    packed = case.arrays["weight_packed"].copy()
    packed[0, : len(words)] = np.array(words, np.uint32).view(np.int32)
    got = value(build(case, weight_packed=packed).load())[0, : len(codes)]
    np.testing.assert_array_equal(
        got, np.array(codes) * case.arrays["weight_scale"][0, 0].astype("f4")
    )


ZEROS = {"4b-v1": 0x77777777, "4b-v2": 0x88888888, "8b-v1": 0x7F7F7F7F, "8b-v2": 0x80808080}


@pytest.mark.parametrize("name", ZEROS)
def test_symmetric_gptq_zero_points(name):
    module = build(CASES[f"gptq-{name}-sym"])
    zeros = module.format.encode(module.load(), module.spec)["qzeros"]
    assert set(np.asarray(zeros).view(np.uint32).reshape(-1).tolist()) == {ZEROS[name]}


@pytest.mark.parametrize("name", ["ct-nvfp4", "modelopt-nvfp4", "ct-mxfp4"])
def test_fp4_byte(name):
    """The even input lies in the low nibble: 1.0 is code 2, -6.0 is code 15."""
    case = CASES[name]
    suffix = "weight_packed" if "weight_packed" in case.arrays else "weight"
    octets = case.arrays[suffix].copy()
    octets[0, 0] = 0xF2
    got = value(build(case, **{suffix: octets}).load())[0, :2]
    assert (E2M1_VALUES[2], E2M1_VALUES[15]) == (1.0, -6.0)
    assert got[0] > 0 and got[1] == -6 * got[0]


def test_nf4_byte():
    """The first element lies in the high nibble."""
    case = CASES["bnb-nf4"]
    octets = case.arrays["weight"].copy()
    octets[0, 0] = 0x2F
    got = value(build(case, weight=octets).load())[0, :2]
    table = case.arrays["weight.quant_map"] * case.arrays["weight.absmax"][0]
    np.testing.assert_array_equal(got, table[[2, 15]].astype(np.float32))


def test_hqq_byte():
    """Row ``r`` lies in the high nibble, row ``r`` and half the rows in the low one."""
    case = CASES["hqq-4b"]
    octets = case.arrays["W_q"].copy()
    octets[0, 0] = 0x2F
    groups = octets.size * 2 // case.arrays["scale"].size
    got = value(build(case, W_q=octets).load()).reshape(-1, groups)
    scale, zero = (case.arrays[name].astype(np.float32)[:, 0] for name in ("scale", "zero"))
    half = len(got) // 2
    assert got[0, 0] == pytest.approx((2 - zero[0]) * scale[0])
    assert got[half, 0] == pytest.approx((15 - zero[half]) * scale[half])


def test_scales_of_fused_shards():
    """Three per-tensor scales are those of the q, k and v rows, in this order."""
    case = CASES["fp8-fused-qkv"]
    got = value(build(case).load())
    codes = case.arrays["weight"].astype(np.float32)
    with np.errstate(invalid="ignore"):
        rows = np.nanmax(np.where(codes != 0, got / codes, np.nan), axis=1)
    changes = [rows[0], *rows[1:][~np.isclose(rows[1:], rows[:-1])]]
    np.testing.assert_allclose(changes, case.arrays["weight_scale"], rtol=1e-6)


def test_exponent_scales_in_both_dtypes():
    case = CASES["ct-mxfp4"]
    plain = value(build(case).load())
    typed = case.arrays["weight_scale"].view(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(value(build(case, weight_scale=typed).load()), plain)


def test_awq_float_zeros_mean_gemv_fast():
    """Whatever version the config names: they are added, not subtracted in steps."""
    case = CASES["awq-gemv-fast"]
    assert case.arrays["qzeros"].dtype == np.float16
    other = dataclasses.replace(case, config=case.config | {"version": "gemm"})
    with pytest.warns(FormatWarning, match="gemm"):
        got = value(build(other).load())
    np.testing.assert_array_equal(got, value(build(case).load()))


@pytest.mark.parametrize("empty", [{}, None])
def test_an_empty_config_is_none(empty, tmp_path):
    weight = np.ones((8, 16), np.float16)
    save_file({"layers.0.up_proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": empty}))
    found = survey(open_checkpoint(tmp_path)).modules["layers.0.up_proj"]
    assert found.format.name == "dense"
    np.testing.assert_array_equal(np.asarray(dequantize(found.load())), weight)
