"""build_model: total, all problems at once, lazy, abstract; ModelConfig: what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.errors import ConfigError, PlanError
from jaxquant.models import ModelConfig, build_model, required_tensors
from jaxquant.models.source import abstract, ranges
from jaxquant.transforms.numeric import quantize
from tests.small_models import CONFIGS, random_tensors, small_model, split_tensors

IDS = np.arange(10, dtype=np.int32)[None]


def parts(name: str) -> tuple[ModelConfig, dict[str, QTensor], dict[str, np.ndarray]]:
    config = ModelConfig.from_hf(CONFIGS[name])
    return config, *split_tensors(random_tensors(config))


def problems(config: ModelConfig, weights: Any, arrays: Any) -> list[str]:
    with pytest.raises(PlanError) as error:
        build_model(config, weights, arrays, dtype=jnp.float32)
    return list(error.value.problems)


def test_all_problems_come_together():
    config, weights, arrays = parts("qwen3-moe")
    attention = "model.layers.0.self_attn"
    del weights[f"{attention}.q_proj"]
    weights[f"{attention}.k_proj"] = dense(np.zeros((24, 32), np.float32))
    arrays["model.norm.weight"] = np.zeros(33, np.float32)
    arrays["model.stray"] = np.zeros(1, np.float32)
    del weights["model.layers.1.mlp.experts.2.up_proj"]
    del weights["model.layers.1.mlp.experts.3.up_proj"]
    weights["model.layers.0.mlp.experts.6.up_proj"] = dense(np.zeros((16, 32), np.float32))
    found = problems(config, weights, arrays)
    for words in (
        f"{attention}.q_proj: missing; expected [32, 32] (out, in) = num_attention_heads 4",
        f"{attention}.k_proj: found [24, 32] (out, in); expected [16, 32] (out, in) = "
        "num_key_value_heads 2 x head_dim 8, hidden_size",
        "model.norm.weight: found [33]; expected [32]",
        "model.stray: left over",
        "model.layers.1.mlp.experts: no up_proj for experts 2-3; the config has 6",
        "model.layers.0.mlp.experts: experts 6 are too many; the config has 6",
    ):
        assert any(problem.startswith(words) for problem in found), (words, found)
    assert len(found) == 6


def test_missing_and_surplus_layers_are_one_problem_each():
    _, weights, arrays = parts("llama")
    short = ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 1})
    assert problems(short, weights, arrays) == [
        "model.layers.1: 9 tensors left over; the config has 1 layers"
    ]
    long = ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 3})
    (only,) = problems(long, weights, arrays)
    assert only.startswith("model.layers.2: missing")


def test_biases_are_asked_for_or_taken_where_present():
    config, weights, arrays = parts("qwen2")
    name = "model.layers.0.self_attn.q_proj.bias"
    del arrays[name]
    assert problems(config, weights, arrays) == [f"{name}: missing; expected [32]"]
    config, weights, arrays = parts("llama")
    arrays["model.layers.0.mlp.up_proj.bias"] = np.ones(48, np.float32)
    model = build_model(config, weights, arrays, dtype=jnp.float32)
    assert np.abs(model(IDS) - small_model("llama")(IDS)).max() > 1e-3
    arrays["model.layers.0.mlp.up_proj.bias"] = np.ones(47, np.float32)
    assert "found [47]; expected [48]" in problems(config, weights, arrays)[0]


def test_tied_head_may_be_stored_again():
    config, weights, arrays = parts("llama-tied-mha")
    assert "lm_head" not in weights
    other = weights | {"lm_head": dense(np.ones((64, 32), np.float32))}
    tied = build_model(config, weights, arrays, dtype=jnp.float32)
    assert tied.lm_head is None and build_model(config, other, arrays).lm_head is not None


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-moe", "deepseek-v3"])
def test_abstract_model_has_the_structure_of_the_real_one(name: str):
    config, weights, arrays = parts(name)
    weights["lm_head"] = quantize(weights["lm_head"].data[0], "w4a16_g8", ("out", "in"))
    shapes = build_model(config, abstract(weights), abstract(arrays), dtype=jnp.float32)
    real = build_model(config, weights, arrays, dtype=jnp.float32)
    described = nnx.split(shapes)[1]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(described))
    graph, state = nnx.split(real)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), described) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert nnx.split(shapes)[0] == graph


def test_loading_is_lazy_and_once_per_name():
    config, weights, arrays = parts("qwen3-moe")
    everything = {**weights, **arrays}
    loaded: list[str] = []
    placed: dict[str, Any] = {}

    def load(name: str) -> Any:
        loaded.append(name)
        return everything[name]

    def place(path: str, leaf: Any) -> Any:
        placed[path] = leaf
        return jax.tree.map(jnp.asarray, leaf)

    shapes = abstract(weights), abstract(arrays)
    model = build_model(config, *shapes, dtype=jnp.float32, load=load, place=place)
    assert sorted(loaded) == sorted(everything) and loaded[0] == "model.embed_tokens.weight"
    assert isinstance(placed["model.layers.0.mlp.experts.gate_proj"], ExpertBank)
    assert "model.layers.0.mlp.experts.0.gate_proj" not in placed
    assert np.array_equal(model(IDS), small_model("qwen3-moe")(IDS))


def test_nothing_is_loaded_when_the_plan_fails():
    config, weights, arrays = parts("llama")
    del weights["lm_head"]

    def load(name: str) -> Any:
        raise AssertionError(name)

    with pytest.raises(PlanError, match="lm_head"):
        build_model(config, weights, arrays, load=load)


def test_a_loaded_value_must_be_as_described():
    config, weights, arrays = parts("llama")
    name = "model.layers.1.mlp.down_proj"
    other = {**weights, **arrays, name: quantize(weights[name].data[0], "fp8", ("out", "in"))}
    with pytest.raises(PlanError, match="described as") as error:
        build_model(config, weights, arrays, load=other.__getitem__)
    assert error.value.where == name


def test_weights_are_taken_out_in_only():
    config, weights, arrays = parts("llama")
    weights["lm_head"] = dense(np.zeros((64, 32), np.float32), ("in", "out"))
    assert "lm_head: found [64, 32] (in, out)" in problems(config, weights, arrays)[0]


def test_required_tensors_of_a_large_model():
    config = ModelConfig.from_hf(
        {
            **CONFIGS["qwen3-moe"],
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "vocab_size": 151936,
        }
    )
    weights, arrays = required_tensors(config)
    assert len(weights) == 94 * (4 + 1 + 3 * 128) + 1
    assert weights["model.layers.93.mlp.experts.127.down_proj"] == (4096, 1536)
    total = sum(out * inn for out, inn in weights.values())
    total += sum(int(np.prod(shape)) for shape in arrays.values())
    assert round(total / 1e9) == 235


def test_ranges():
    assert ranges([7, 0, 1, 2]) == "0-2, 7"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": [], "model_type": "gpt2"}, "gpt2.*no such architecture"),
        ({"hidden_size": None}, "hidden_size: absent"),
        ({"num_key_value_heads": 3}, "divides"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"num_hidden_layers": 0}, "whole number from 1"),
        ({"rope_scaling": {"type": "yarn"}}, "factor: absent"),
    ],
)
def test_config_errors(change: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf({**CONFIGS["llama"], **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_group": 3}, "groups divide experts"),
        ({"topk_group": 1}, "groups divide experts"),
        ({"topk_method": "greedy"}, "noaux_tc"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor"),
    ],
)
def test_expert_config_errors(change: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf({**CONFIGS["deepseek-v3"], **change})


def test_deepseek_v2_normalization_is_refused():
    with pytest.raises(ConfigError, match="disagree"):
        ModelConfig.from_hf({**CONFIGS["deepseek-v2"], "norm_topk_prob": True})


@pytest.mark.parametrize(
    "name, change, windows",
    [
        ("qwen2", {"sliding_window": 5}, (None, None)),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        ("mistral-window", {"sliding_window": None}, (None, None)),
        ("llama", {"sliding_window": 5}, (None, None)),
    ],
)
def test_windows(name: str, change: dict[str, Any], windows: tuple[int | None, ...]):
    assert ModelConfig.from_hf({**CONFIGS[name], **change}).windows == windows


def test_layer_types_are_checked():
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig.from_hf({**CONFIGS["qwen3-layer-types"], "layer_types": ["linear_attention"]})


def test_model_type_decides_without_architectures():
    raw = {k: v for k, v in CONFIGS["mixtral"].items() if k != "architectures"}
    assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(CONFIGS["mixtral"])


def test_eos_spellings():
    for given, expected in ((7, (7,)), ([7, 9], (7, 9)), (None, ())):
        assert ModelConfig.from_hf({**CONFIGS["llama"], "eos_token_id": given}).eos == expected


def test_stop_tokens_of_the_generation_config_count():
    raw = {**CONFIGS["llama"], "eos_token_id": 7}
    assert ModelConfig.from_hf(raw, {"eos_token_id": [7, 9]}).eos == (7, 9)
    assert ModelConfig.from_hf(raw, {"do_sample": True}).eos == (7,)


def test_dtype_is_checked():
    with pytest.raises(ConfigError, match="float32"):
        build_model(*parts("llama"), dtype=jnp.int8)
