"""Checkpoints made by the peers' own tools: every dequantized weight has the peer's checksum.

The golden folders are always read; the whole corpus where ``JAXQUANT_CORPUS`` names it.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxquant.convert.read import open_checkpoint, survey
from jaxquant.convert.read_safetensors import read_safetensors
from jaxquant.transforms.numeric import dequantize

GOLDEN = Path(__file__).parent.parent / "golden"
CORPUS = os.environ.get("JAXQUANT_CORPUS")
# Two float32 factors multiply in another order than in the peer's code, or a reciprocal is rounded.
LAST_BIT = ("nvfp4",)
# The multiplier of a stored reciprocal has several reciprocals; nested scales are written plain.
NOT_REVERSIBLE = ("nvfp4", "bnb-nf4-dq")


def folders(root):
    found = Path(root).glob("*/expected.json") if root else ()
    return sorted(p.parent for p in found if (p.parent / "config.json").exists())


def check_folder(folder):
    checkpoint = open_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contents = survey(checkpoint)
    expected = json.loads((folder / "expected.json").read_text())["weights"]
    samples = read_safetensors(folder / "expected.safetensors").tensors
    assert {name.removesuffix(".weight") for name in expected} <= set(contents.modules)
    for name, entry in expected.items():
        module = contents.modules[name.removesuffix(".weight")]
        q = module.load()
        assert jax.tree.structure(q) == jax.tree.structure(module.abstract())
        weight = np.asarray(dequantize(q))
        assert list(weight.shape) == entry["shape"]
        if hashlib.sha256(weight.tobytes()).hexdigest() == entry["sha256_f32"]:
            continue
        assert any(word in folder.name for word in LAST_BIT), f"{name}: another checksum"
        ramps = np.linspace(-1, 1, weight.shape[1]), np.linspace(-1, 1, weight.shape[0])
        for got, key in (
            (weight[entry["rows"]], "rows"),
            (weight.astype(np.float64) @ ramps[0], "rowdot"),
            (ramps[1] @ weight.astype(np.float64), "coldot"),
        ):
            want = samples[f"{name}#{key}"].read()
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("folder", folders(GOLDEN), ids=lambda p: p.name)
def test_golden_weights_have_the_peers_checksum(folder):
    check_folder(folder)


@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS, reason="JAXQUANT_CORPUS is not set")
@pytest.mark.parametrize("folder", folders(CORPUS), ids=lambda p: p.name)
def test_corpus_weights_have_the_peers_checksum(folder):
    check_folder(folder)


@pytest.mark.parametrize("folder", folders(GOLDEN), ids=lambda p: p.name)
def test_every_tensor_is_on_one_side(folder):
    checkpoint = open_checkpoint(folder)
    contents = survey(checkpoint)
    claimed = [t.name for module in contents.modules.values() for t in module.raw.values()]
    assert len(claimed) == len(set(claimed))
    assert set(claimed) | set(contents.tensors) == set(checkpoint.tensors)
    assert not set(claimed) & set(contents.tensors)


@pytest.mark.parametrize(
    "folder",
    [f for f in folders(GOLDEN) if not any(word in f.name for word in NOT_REVERSIBLE)],
    ids=lambda p: p.name,
)
def test_encoding_gives_the_bytes_of_the_file(folder):
    module = next(
        m for m in survey(open_checkpoint(folder)).modules.values() if m.format.name != "dense"
    )
    arrays = module.format.encode(module.load(), module.spec)
    for suffix, tensor in module.raw.items():
        want = tensor.read()
        got = arrays[suffix]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), suffix
        assert np.ascontiguousarray(got).tobytes() == want.tobytes(), suffix
