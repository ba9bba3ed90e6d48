"""Trained models: logits, perplexity and greedy tokens as transformers gives them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxquant
from jaxquant.evaluate import perplexity
from jaxquant.generation import generate
from tests.small_models import checkpoint_model

BUNDLED = Path(jaxquant.__file__).parent / "bundled" / "tiny-qwen3-moe"
TINY = json.loads((Path(__file__).parent / "golden" / "tiny_reference.json").read_text())


def test_bundled_model():
    model = checkpoint_model(BUNDLED)
    tokens = np.load(BUNDLED / "eval_tokens.npy")
    found = perplexity(model, tokens, window=TINY["window"], windows=TINY["windows"])
    assert math.isclose(found, TINY["perplexity"], rel_tol=1e-3)
    new = generate(model, [TINY["greedy_prompt"]], max_new_tokens=32)
    assert new == [TINY["greedy_32"]]


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "llama-11m", "qwen3-moe-9m", "deepseek-v3-8m"])
def test_reference_model(name: str):
    if "JAXQUANT_CORPUS" not in os.environ:
        pytest.skip("JAXQUANT_CORPUS is not set")
    folder = Path(os.environ["JAXQUANT_CORPUS"]).parent / "models"
    expected = json.loads((folder / "reference.json").read_text())["models"][name]
    reference = load_file(folder / name / "reference.safetensors")
    model = checkpoint_model(folder / name)

    logits = np.asarray(model(reference["input_ids"]))
    assert np.abs(logits - reference["logits"]).max() < 1e-4

    tokens = np.load(folder / "eval_tokens.npy")
    found = perplexity(model, tokens, window=expected["window"], windows=expected["windows"])
    assert math.isclose(found, expected["perplexity"], rel_tol=1e-3)

    prompt = expected["greedy_prompt"]
    alone = generate(model, [prompt], max_new_tokens=32)
    ragged = generate(model, [prompt[:3], prompt, prompt + prompt], max_new_tokens=32)
    assert alone == [expected["greedy_32"]]
    assert ragged[1] == expected["greedy_32"]
