"""Logits of the GGUF corpus against llama.cpp's own.

llama.cpp quantizes activations and attends in float16, so that its logits are 2 to 5 % from those
of the weights that the file holds.  With that arithmetic emulated (``tests/oracle/llamacpp.py``)
tokens agree to float32 rounding until an activation at the middle between two codes falls to the
other side: such a step of 1/127 is worth up to 3 % of a token, and later tokens, on these networks.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.convert.gguf_model import GgufModel, open_gguf_model
from jaxquant.models import CausalLM, ModelConfig, build_model
from jaxquant.transforms.numeric import dequantize
from tests.oracle import llamacpp

pytestmark = [
    pytest.mark.corpus,
    pytest.mark.filterwarnings("ignore"),
]
ROOT = os.environ.get("JAXQUANT_CORPUS")
FILES = sorted(Path(ROOT or ".").glob("gguf-llamacpp-*/*.gguf")) if ROOT else []


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def built(model: GgufModel, packed: bool = True) -> CausalLM:
    """The model with the weights of the file, or with the same weights dequantized."""

    def load(name: str):
        value = model.load(name)
        return dense(np.asarray(dequantize(value))) if isinstance(value, QTensor) else value

    config = ModelConfig.from_hf(model.config)
    if packed:
        return build_model(config, model.weights, model.arrays, dtype=jnp.float32, load=model.load)
    weights = {
        name: dense(jax.ShapeDtypeStruct(q.shape, np.dtype(np.float32)))
        for name, q in model.weights.items()
    }
    return build_model(config, weights, model.arrays, dtype=jnp.float32, load=load)


def distance(a: np.ndarray, b: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.linalg.norm(a - b, axis=axis) / np.linalg.norm(b, axis=axis)


def test_logits_are_those_of_llama_cpp(path: Path, monkeypatch: pytest.MonkeyPatch):
    model = open_gguf_model(path)
    reference = load_file(path.parent / "logits.safetensors")
    ids, theirs = jnp.asarray(reference["input_ids"]), reference[path.stem.split(".")[-1]]
    plain = np.asarray(built(model)(ids))
    assert distance(plain, np.asarray(built(model, packed=False)(ids))) < 1e-4
    emulated = np.asarray(llamacpp.emulate(built(model), model, monkeypatch)(ids))
    tokens = distance(emulated, theirs, axis=-1)
    assert distance(emulated, theirs) < 2e-2
    # Where a step falls depends on the machine's float32 sums, and all later tokens of its row see
    # it.  First tokens attend to themselves alone: with only these two right the test must fail.
    assert np.sort(tokens, axis=None)[3] < 2e-6, "some tokens agree to float32 rounding"
    assert distance(plain, theirs) > 1.5e-2, "a comparison that notices quantized activations"
