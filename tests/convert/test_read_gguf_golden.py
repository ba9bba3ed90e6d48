"""Blocks that llama.cpp wrote, decoded as the gguf package decodes them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxquant as jq
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.formats import gguf
from jaxquant.formats.gguf_codebook import CODEBOOK_TYPES
from tests.formats.test_gguf import oracle

FOLDER = Path(__file__).parent.parent / "golden" / "gguf-llamacpp"
EXPECTED = load_file(FOLDER / "expected.safetensors")
WRITTEN_BY_OTHERS = {"MXFP4", "NVFP4"}


def test_every_type_that_llama_cpp_writes_is_here():
    types = {*gguf.BLOCK_FORMATS, *CODEBOOK_TYPES} - {"Q8_1", "Q8_K"} - WRITTEN_BY_OTHERS
    assert {name.removesuffix(".weight") for name in EXPECTED} == types


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_are_decoded_bit_for_bit(name):
    if name.removesuffix(".weight") in CODEBOOK_TYPES:
        oracle()
    file = open_gguf(FOLDER / "rows.gguf")
    expected = EXPECTED[name]
    assert file.array(name).tobytes() == expected.tobytes()
    assert np.asarray(jq.dequantize(file.qtensor(name))).tobytes() == expected.tobytes()
