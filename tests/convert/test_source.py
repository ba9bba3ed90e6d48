"""Checkpoints that contradict their config.json or hold values that no model can use."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.errors import FormatError, PlanError
from jaxquant.formats.base import FormatWarning
from jaxquant.models import ModelConfig
from tests.convert.writer import write_checkpoint
from tests.formats.cases import CASES
from tests.small_models import CONFIGS, random_tensors

IDS = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
TIED = "llama-tied-mha"


def tensors_of(name):
    return random_tensors(ModelConfig.from_hf(CONFIGS[name]))


def logits(folder, tensors, **config):
    model = jq.from_pretrained(write_checkpoint(folder, tensors, config), dtype=jnp.float32)
    return np.asarray(model(IDS))


def test_an_output_layer_of_its_own_is_used_against_the_config(tmp_path):
    """As transformers does where both tensors are stored and differ."""
    tensors = tensors_of(TIED)
    embedding = tensors["model.embed_tokens.weight"]
    own = embedding[::-1].copy()
    with pytest.warns(FormatWarning, match="lm_head.weight differs"):
        found = logits(tmp_path / "a", tensors | {"lm_head.weight": own}, **CONFIGS[TIED])
    tied = logits(tmp_path / "b", tensors, **CONFIGS[TIED])
    np.testing.assert_allclose(found, tied[..., ::-1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, tied, atol=1e-2)


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path):
    tensors = tensors_of(TIED)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = write_checkpoint(tmp_path / "m", tensors | head, CONFIGS[TIED])
    model = jq.from_pretrained(folder)
    assert model.lm_head is None and "lm_head" in dict(model.report.ignored)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.norm.weight", np.int8),
        ("model.layers.0.self_attn.q_proj.bias", np.int32),
        ("model.layers.1.input_layernorm.weight", np.bool_),
    ],
)
def test_norms_and_biases_are_floats(name, dtype, tmp_path):
    tensors = tensors_of("qwen2")
    tensors[name] = tensors[name].astype(dtype)
    with pytest.raises(PlanError) as caught:
        logits(tmp_path / "m", tensors, **CONFIGS["qwen2"])
    assert f"{name}: found {np.dtype(dtype)} values" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("gptq-4b-v1-sym", "gptq or awq"),
        ("awq-gemm", "gptq or awq"),
        ("ct-packed-4b", "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("config", [None, {"quant_method": "fp8", "activation_scheme": "dynamic"}])
def test_codes_of_another_method_are_named(case, method, config, tmp_path):
    arrays = {f"model.layers.0.mlp.up_proj.{s}": a for s, a in CASES[case].arrays.items()}
    given = {} if config is None else {"quantization_config": config}
    with pytest.raises(FormatError) as caught:
        jq.read_quantized(write_checkpoint(tmp_path / "m", arrays, given))
    error = caught.value
    assert error.found.startswith(f"quantized weights of {method}")
    assert ("config describes fp8" if config else "no quantization_config") in error.rule


def test_an_embedding_of_integers_is_no_quantized_module(tmp_path):
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    arrays = {"model.embed_tokens.weight": np.zeros((8, 8), np.int32)}
    folder = write_checkpoint(tmp_path / "m", arrays, {"quantization_config": quant})
    with pytest.raises(FormatError) as caught:
        jq.read_quantized(folder)
    assert "dtype I32; an unquantized weight is" in str(caught.value)


def test_modules_that_are_odd_alike_give_one_warning(tmp_path):
    case = CASES["awq-gemm"]
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(5)]
    arrays = {f"{name}.{s}": array for name in names for s, array in case.arrays.items()}
    config = {"quantization_config": case.config | {"version": "gemv"}}
    folder = write_checkpoint(tmp_path / "m", arrays, config)
    with pytest.warns(FormatWarning) as caught:
        assert sorted(jq.read_quantized(folder)) == names
    (warning,) = caught
    assert f"{names[0]}.qweight: the config says gemv" in str(warning.message)
    assert "4 more modules" in str(warning.message)


def test_warnings_of_a_refused_checkpoint_leave_no_trace(tmp_path):
    case = CASES["awq-gemm"]
    arrays = {f"a.{s}": array for s, array in case.arrays.items()}
    arrays |= {"b.qweight": case.arrays["qweight"]}
    config = {"quantization_config": case.config | {"version": "gemv"}}
    folder = write_checkpoint(tmp_path / "m", arrays, config)
    shown = warnings.showwarning
    with pytest.raises(FormatError, match="missing"):
        jq.read_quantized(folder)
    assert warnings.showwarning is shown


@pytest.mark.parametrize("single", ["0.up_proj.weight", "1.down_proj.weight"])
def test_experts_are_stacked_or_single(single, tmp_path):
    stem = "model.layers.0.mlp.experts"
    arrays = {f"{stem}.gate_up_proj": np.ones((2, 16, 8), np.float16)}
    arrays[f"{stem}.down_proj"] = np.ones((2, 8, 8), np.float16)
    assert len(jq.read_quantized(write_checkpoint(tmp_path / "a", arrays))) == 6
    arrays[f"{stem}.{single}"] = np.zeros((8, 8), np.float16)
    with pytest.raises(FormatError, match=f"stored as {stem}.{single} too"):
        jq.read_quantized(write_checkpoint(tmp_path / "b", arrays))


def quantized(folder, arrays, quant, **tensors):
    """A llama whose linears of the layers are all replaced by ``arrays(weight)``."""
    made = tensors_of("llama") | tensors
    for name in [n for n in made if n.endswith("_proj.weight")]:
        path, weight = name.removesuffix(".weight"), made.pop(name)
        made |= {f"{path}.{suffix}": array for suffix, array in arrays(weight).items()}
    config = CONFIGS["llama"] | {"quantization_config": quant}
    return jq.from_pretrained(write_checkpoint(folder, made, config))


def hqq_arrays(weight):
    """As transformers saves an HQQ linear: 4 bits in groups of 16, and every setting a tensor."""
    rows = np.asarray(weight, np.float32).reshape(-1, 16)
    scale = np.abs(rows).max(1, keepdims=True) / 7
    codes = np.clip(np.rint(rows / scale) + 8, 0, 15).astype(np.uint8)
    first, second = np.split(codes, 2)
    numbers = {"nbits": 4, "group_size": 16, "axis": 1, "view_as_float": 0, "optimize": 1}
    return {
        "W_q": first << 4 | second,
        "scale": scale.astype(np.float16),
        "zero": np.full(scale.shape, 8, np.float16),
        "shape": np.array(weight.shape, np.int64),
        **{name: np.array(value, np.int32) for name, value in numbers.items()},
        "packing": np.frombuffer(b"4bit_u8", np.uint8),
    }


def test_a_model_of_hqq_loads_with_its_settings_left_out(tmp_path):
    params = {"nbits": 4, "group_size": 16, "axis": 1}
    quant = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}
    model = quantized(tmp_path / "m", hqq_arrays, quant)
    assert {found.format for found in model.report.formats} == {"hqq", "dense"}
    assert "model.layers.0.mlp.up_proj.nbits" in dict(model.report.ignored)


def int8_arrays(weight, zero=0):
    weight = np.asarray(weight, np.float32)
    scale = np.abs(weight).max(1, keepdims=True) / 127
    return {
        "weight": np.rint(weight / scale).astype(np.int8),
        "weight_scale": scale,
        "weight_zero_point": np.full(scale.shape, zero, np.int8),
        "input_scale": np.ones(1, np.float32),
    }


INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"W8A8": ["Linear"]},
    "ignore": ["lm_head"],
}


def test_zero_points_of_symmetric_weights_and_unused_scales_are_left_out(tmp_path):
    """Older versions of compressed-tensors wrote zero points of 0."""
    ignored = dict(quantized(tmp_path / "m", int8_arrays, INT8).report.ignored)
    assert "model.layers.1.self_attn.k_proj.weight_zero_point" in ignored
    assert "model.layers.1.self_attn.k_proj.input_scale" in ignored


def test_scales_of_an_observer_are_left_out(tmp_path):
    def observed(weight):
        return int8_arrays(weight, 3) | {"weight": np.asarray(weight)}

    with pytest.warns(FormatWarning, match="frozen"):
        model = quantized(tmp_path / "m", observed, INT8 | {"quantization_status": "frozen"})
    assert {found.format for found in model.report.formats} == {"dense"}


def test_other_tensors_beside_a_weight_stay_errors(tmp_path):
    with pytest.raises(PlanError, match=r"weight_scale_2: left over"):
        quantized(tmp_path / "m", lambda w: int8_arrays(w) | {"weight_scale_2": w[:1, :1]}, INT8)


def test_offsets_of_a_symmetric_cache_are_left_out(tmp_path):
    names = ["self_attn.k_zero_point", "self_attn.v_proj.v_bias"]
    zeros = {f"model.layers.0.{name}": np.zeros(1, np.float32) for name in names}
    model = quantized(tmp_path / "a", int8_arrays, INT8, **zeros)
    assert set(zeros) <= set(dict(model.report.ignored))
    ones = {name: value + 1 for name, value in zeros.items()}
    with pytest.raises(PlanError, match="left over"):
        quantized(tmp_path / "b", int8_arrays, INT8, **ones)
