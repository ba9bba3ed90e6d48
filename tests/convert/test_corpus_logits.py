"""Whole models of the corpus: logits against those of the peers that made the checkpoints.

Three things bound how close they can be:

* weight-only checkpoints agree to float32 rounding;
* with quantized activations a value on a rounding boundary falls one code further in one of two
  float32 programs, and on random networks of this size such a flip is worth up to 2e-2 in the
  logits of its token and of later ones; every other token agrees to float32 rounding;
* two folders quantize expert inputs of whole batches with one scale (see ``PER_BATCH_EXPERTS``).
"""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxquant as jq
from jaxquant.arrays.bank import ExpertBank
from jaxquant.transforms.numeric import weight_only

ROOT = os.environ.get("JAXQUANT_CORPUS")
pytestmark = [
    pytest.mark.corpus,
    pytest.mark.skipif(ROOT is None, reason="JAXQUANT_CORPUS names no folder"),
    pytest.mark.filterwarnings("ignore"),
]
FAMILIES = ("gptq", "awq", "ct-", "ct012", "fp8block", "modelopt", "bnb")
NAMES = (
    sorted(
        p.name
        for p in Path(ROOT).iterdir()
        if p.name.startswith(FAMILIES) and (p / "logits.safetensors").is_file()
    )
    if ROOT
    else []
)
# The peer's file says that its logits were made with dequantized weights and plain activations,
# because its own kernels need a GPU, although the checkpoint asks for dynamic activations.
PLAIN_ACTIVATIONS = (
    "fp8block-hf-dsv3",
    "fp8block-hf-qwen3",
    "modelopt-fp8-llama",
    "modelopt-fp8-qwen3moe",
    "modelopt-nvfp4-llama",
    "modelopt-w4a8awq-llama",
)
# compressed-tensors reduces over all but the first two axes for a "token" scale; an expert's input
# has only two, so the peer's simulation takes one scale for all tokens of an expert.  Logits then
# depend on the batch; here a token's never do, so only the weights are compared.
PER_BATCH_EXPERTS = ("ct-fp8-dynamic-qwen3moe", "ct012-w8a8-int8-dyn-mixtral")
# Folders in which a rounding flip takes the whole array past 5e-3.
FLIPPED = ("ct-fp8-block-llama", "ct-w8a8-int8-dyn-llama")


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def without_activation_quantization(model):
    """The same model with plain activations."""
    for _, node in nnx.iter_graph(model):
        if not isinstance(node, jq.QWeight):
            continue
        value = node.get_value()
        if isinstance(value, ExpertBank):
            parts = tuple(weight_only(part) for part in value.parts)
            node.set_value(dataclasses.replace(value, parts=parts))
        else:
            node.set_value(weight_only(value))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_the_peer(name):
    folder = Path(ROOT) / name
    expected = load_file(folder / "logits.safetensors")
    ids = jnp.asarray(expected["input_ids"].astype(np.int32))
    model = jq.from_pretrained(folder, dtype=jnp.float32)
    quantizes = any(row.activations != "-" for row in jq.explain(model).rows)
    if name in PLAIN_ACTIVATIONS or name in PER_BATCH_EXPERTS:
        key = "logits" if name in PLAIN_ACTIVATIONS else "logits_weight_only"
        assert quantizes and relative(model(ids), expected[key]) > 1e-2
        plain = without_activation_quantization(model)
        assert relative(plain(ids), expected[key]) < 2e-4
        return
    logits = np.asarray(model(ids))
    error = relative(logits, expected["logits"])
    if not quantizes:
        assert error < 2e-4
    elif name in FLIPPED:
        assert error < 2e-2
        per_token = np.linalg.norm(logits - expected["logits"], axis=-1)
        exact = per_token / np.linalg.norm(expected["logits"], axis=-1) < 1e-5
        assert exact.mean() > 0.5, "flips touch some tokens; a wrong formula touches all"
    else:
        assert error < 5e-3
    if quantizes:
        plain = without_activation_quantization(model)
        assert relative(plain(ids), expected["logits"]) > 2e-2, "activations do matter here"


def test_the_corpus_has_all_families():
    assert len(NAMES) >= 30
    assert {prefix for prefix in FAMILIES if any(name.startswith(prefix) for name in NAMES)} == {
        *FAMILIES
    }
