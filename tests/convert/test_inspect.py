"""What ``inspect`` says of every format: each tensor once, with its bytes and its scales."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from jaxquant.cli import main
from jaxquant.convert.inspect import inspect_checkpoint, module_scales
from jaxquant.convert.read import QuantizedModule, survey
from jaxquant.convert.read_checkpoint import open_checkpoint
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.formats import FORMATS
from jaxquant.formats.gguf_codebook import CODEBOOK_TYPES, codebook_scales, dequantize_codebook
from jaxquant.formats.gguf_types import TYPES
from tests.formats.cases import CASES
from tests.formats.test_gguf import oracle, random_blocks

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
PLAIN = ("dense", "BF16", "F16", "F32", "I32")


def scale_range(q):
    """Smallest and largest product of a weight's scales, None where it has none."""
    if not q.scales:
        return None
    product = functools.reduce(np.multiply, [np.asarray(s, np.float32) for s in q.scales])
    return float(product.min()), float(product.max())


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_with_the_scales_it_has_when_loaded(folder):
    checkpoint = open_checkpoint(GOLDEN / folder)
    report = inspect_checkpoint(GOLDEN / folder)
    assert sum(e.nbytes for e in report.entries) == sum(
        tensor.nbytes for tensor in checkpoint.tensors.values()
    )
    contents = survey(checkpoint)
    assert {e.name for e in report.entries} == {*contents.modules, *contents.tensors}
    assert len(report.entries) == len(contents.modules) + len(contents.tensors)
    quantized = [e for e in report.entries if not e.format.startswith(PLAIN)]
    assert len(quantized) >= 4
    for e in quantized:
        module = contents.modules[e.name]
        assert e.scales == scale_range(module.load()) and 0 < e.scales[0] <= e.scales[1]
        assert e.shape == module.shape and e.bits == 8 * module.nbytes / np.prod(e.shape)


def test_json_holds_what_the_table_shows(capsys):
    folder = GOLDEN / "ct-nvfp4a16-llama"
    assert main(["inspect", str(folder), "--json"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    report = inspect_checkpoint(folder)
    assert report.columns == ["tensor", "format", "shape", "bits/weight", "bytes", "scales"]
    for row, found in zip(report.rows, tensors, strict=True):
        scales = "{:.3g} .. {:.3g}".format(*found["scales"]) if found["scales"] else "-"
        shape = "x".join(map(str, found["shape"]))
        bits, nbytes = f"{found['bits']:.2f}", str(found["nbytes"])
        assert row == [found["name"], found["format"], shape, bits, nbytes, scales]


def test_scales_of_every_format():
    formats = {fmt.name: fmt for fmt in FORMATS}
    for name, case in CASES.items():
        fmt, raw = formats[case.format], case.module()
        spec = fmt.spec(case.config, raw)
        shape = fmt.shape(spec, raw)
        module = QuantizedModule(case.path, fmt, spec, raw.tensors, shape)
        found = module_scales(module)
        found = None if found is None else (float(found.min()), float(found.max()))
        assert found == scale_range(module.load()), name


def test_every_block_type_of_gguf_has_scales():
    file = GOLDEN / "gguf-llamacpp" / "rows.gguf"
    report = inspect_checkpoint(file)
    tensors = open_gguf(file).tensors
    assert [e.name for e in report.entries] == list(tensors)
    for e in report.entries:
        kind = tensors[e.name].kind
        assert e.bits == 8 * kind.bytes / kind.elements
        assert (e.scales is None) == e.format.startswith(PLAIN), e.name
        assert e.scales is None or np.isfinite(e.scales).all()


@pytest.mark.parametrize("name", CODEBOOK_TYPES)
def test_scales_of_codebook_types_lead_to_entries_of_the_codebook(name):
    oracle()
    kind = TYPES[name]
    blocks = random_blocks(name, (8, 256)).reshape(8, kind.bytes)
    scales = codebook_scales(blocks, kind)
    values = dequantize_codebook(blocks, kind, name).reshape(*scales.shape, -1)
    entries = np.unique(np.abs(values / scales[..., None]).round(4))
    few = {"IQ1": {0.125, 0.875, 1.125}, "IQ2": {8, 25, 43}, "IQ3": set(range(1, 63))}
    assert set(entries.tolist()) <= few[name[:3]] and len(entries) > 2
