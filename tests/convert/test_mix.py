"""Checkpoints that were smoothed for themselves are not mixed with others."""

import warnings

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.convert.mix import _rescaled as rescaled
from jaxquant.errors import PlanError
from jaxquant.formats.base import FormatWarning
from jaxquant.models import ModelConfig
from jaxquant.transforms.numeric import dequantize, quantize
from tests.convert.writer import write_checkpoint
from tests.small_models import CONFIGS, random_tensors

LAYER = "model.layers.1."


def checkpoint(folder, tensors):
    """AWQ in groups of 16, rounded to nearest."""
    write_checkpoint(folder / "dense", tensors, CONFIGS["llama"])
    jq.export_pretrained(folder / "dense", folder / "awq", format="awq", scheme="w4a16_g16_asym")
    return folder / "awq"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model; its AWQ files as they are, smoothed before down_proj, and smoothed behind a norm."""
    folder = tmp_path_factory.mktemp("mix")
    tensors = random_tensors(ModelConfig.from_hf(CONFIGS["llama"]))
    write_checkpoint(folder / "base", tensors, CONFIGS["llama"])

    def smoothed(size, divided, *multiplied):
        factors, made = np.exp(np.random.default_rng(0).normal(size=size)), dict(tensors)
        old = made[f"{LAYER}{divided}.weight"]
        made[f"{LAYER}{divided}.weight"] = (old.T / factors).T.astype(old.dtype)
        for name in multiplied:
            made[f"{LAYER}{name}.weight"] = (made[f"{LAYER}{name}.weight"] * factors).astype(
                old.dtype
            )
        return made

    checkpoint(folder / "plain", tensors)
    checkpoint(folder / "inner", smoothed(48, "mlp.up_proj", "mlp.down_proj"))
    norm = smoothed(32, "post_attention_layernorm", "mlp.up_proj", "mlp.gate_proj")
    checkpoint(folder / "norm", norm)
    return folder


def loaded(folders, tmp_path, source, *keys):
    lines = "".join(f'    "{key}": awq_int4\n' for key in keys)
    text = f"mixed_precision:\n  base_model_path: {folders / 'base'}\n"
    text += f"  awq_int4_path: {folders / source / 'awq'}\n  weight_mapping:\n{lines}"
    (tmp_path / "plan.yaml").write_text(text)
    return jq.from_pretrained(folders / "base", plan=tmp_path / "plan.yaml")


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_one_of_two_that_were_scaled_for_each_other_is_doubted(part, folders, tmp_path):
    key = f"model.layers.*.mlp.{part}.weight"
    with pytest.warns(FormatWarning, match=r"layers\.1\.mlp\.down_proj.*AWQ and SmoothQuant"):
        loaded(folders, tmp_path, "inner", key)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FormatWarning)
        loaded(folders, tmp_path, "plain", key)
        loaded(folders, tmp_path, "inner", "model.layers.*.mlp.*.weight")


@pytest.mark.parametrize("scheme,found", [("nvfp4a16", "e2m1"), ("w4a16_g16", "")])
def test_int4_means_integers(scheme, found, folders, tmp_path):
    other, base = tmp_path / scheme, folders / "base"
    jq.export_pretrained(base, other, format="compressed-tensors", scheme=scheme)
    (tmp_path / "plan.yaml").write_text(
        f"mixed_precision:\n  base_model_path: {base}\n  int4_path: {other}\n"
        '  weight_mapping:\n    "model.layers.0.self_attn.q_proj.weight": int4\n'
    )
    if not found:
        jq.from_pretrained(base, plan=tmp_path / "plan.yaml")
        return
    with pytest.raises(PlanError, match=rf"q_proj.*{found}.*not as int4.*integer codes"):
        jq.from_pretrained(base, plan=tmp_path / "plan.yaml")


def test_weights_that_were_scaled_for_another_norm_are_refused(folders, tmp_path):
    with pytest.raises(PlanError, match=r"post_attention_layernorm\.weight differs"):
        loaded(folders, tmp_path, "norm", "model.layers.*.mlp.up_proj.weight")


def test_a_norm_that_was_scaled_does_not_matter_to_what_follows_later(folders, tmp_path):
    loaded(folders, tmp_path, "norm", "model.layers.*.mlp.down_proj.weight")


def test_coarse_codes_are_told_from_smoothing():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(256, 128)).astype(np.float32)
    factors = np.exp(rng.normal(size=(256, 1)) / 8).astype(np.float32)

    def seen(scheme, factor):
        made = np.asarray(dequantize(quantize(w * factor, scheme, ("out", "in"))))
        return rescaled(w, made) and rescaled(made, w)

    assert [seen(scheme, 1) for scheme in ("w2a16_g128", "w4a16_g128", "fp8")] == [False] * 3
    assert [seen(scheme, factors) for scheme in ("w4a16_g128", "fp8")] == [True] * 2
