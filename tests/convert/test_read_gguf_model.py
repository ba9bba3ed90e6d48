"""GGUF files as models: every architecture against weights that were transformed by hand."""

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.arrays.qtensor import dense
from jaxquant.convert import gguf_names
from jaxquant.convert.gguf_config import config_of
from jaxquant.convert.gguf_model import open_gguf_model
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.errors import ConfigError, FormatError, PlanError
from jaxquant.formats.base import FormatWarning
from jaxquant.models import ModelConfig, build_model
from tests.convert.gguf_bytes import ARRAY, STRING, U32, Tensor, array, build, pair, text
from tests.convert.gguf_models import (
    CASES,
    DIM,
    EXPERTS,
    HEADS,
    HIDDEN,
    LATENT,
    LAYERS,
    NOPE,
    QUERY_RANK,
    ROTATED,
    VALUE,
    VOCAB,
    metadata,
)


def write(tmp_path: Path, pairs, tensors) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(build(pairs, tensors))
    return path


def open_quietly(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FormatWarning)
        return open_gguf_model(path, **options)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_that_of_the_model(name, tmp_path):
    files, pairs, family = CASES[name]
    model = open_quietly(write(tmp_path, pairs, files.tensors("F32")))
    assert set(model.pieces) == set(files.model)
    for key, expected in files.model.items():
        value = model.load(key)
        found = np.asarray(jq.dequantize(value)) if key in model.weights else value
        np.testing.assert_array_equal(found, expected, err_msg=key)
    assert ModelConfig.from_hf(model.config).family == family


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2moe", "deepseek3 split"])
def test_quantized_models_are_built_and_run(name, tmp_path):
    """The packed model gives what the same file gives when it is dequantized."""
    files, pairs, _ = CASES[name]
    model = open_quietly(write(tmp_path, pairs, files.tensors("Q8_0")))
    config = ModelConfig.from_hf(model.config)
    for key, described in {**model.weights, **model.arrays}.items():
        value = model.load(key)
        if key in model.weights:
            assert value.layout == described.layout
            assert [a.dtype for a in value.data + value.scales] == [
                a.dtype for a in described.data + described.scales
            ]
        assert value.shape == described.shape

    def dequantized(key):
        value = model.load(key)
        return dense(np.asarray(jq.dequantize(value))) if key in model.weights else value

    plain = {key: dequantized(key) for key in model.weights}
    ids = jnp.asarray([[1, 2, 3, 5, 8, 13]], jnp.int32)
    packed = build_model(config, model.weights, model.arrays, dtype=jnp.float32, load=model.load)
    full = build_model(config, plain, model.arrays, dtype=jnp.float32, load=dequantized)
    a, b = np.asarray(packed(ids)), np.asarray(full(ids))
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-4


def test_rotary_rows():
    """The published example: rows of a head of eight, and two heads stay apart."""
    from jaxquant.convert.gguf_model import rotary_rows

    file_holds = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    np.testing.assert_array_equal(file_holds[rotary_rows(8, 1)], np.arange(8))
    both = np.concatenate([file_holds, file_holds + 8])
    np.testing.assert_array_equal(both[rotary_rows(16, 2)], np.arange(16))


def test_config(tmp_path):
    files, pairs, _ = CASES["deepseek3 split"]
    config = config_of(open_gguf(write(tmp_path, pairs, files.tensors("F32"))))
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": VOCAB,
        "num_key_value_heads": HEADS,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROTATED,
        "v_head_dim": VALUE,
        "kv_lora_rank": LATENT,
        "q_lora_rank": QUERY_RANK,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


def llama(tmp_path, more=(), drop=(), **keys):
    """A llama file with other metadata or tensors."""
    files, _, _ = CASES["llama"]
    tensors = [t for t in files.tensors("F32") if t.name not in drop]
    return write(tmp_path, metadata("llama", **keys), [*tensors, *more])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        ),
        ({"rope__scaling__factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_rope_scaling(keys, expected, tmp_path):
    kind = expected["rope_type"]
    if kind == "yarn":
        keys = keys | {"rope__scaling__yarn_log_multiplier": 0.0707}
    pairs = [
        *metadata("llama", **keys),
        pair("llama.rope.scaling.type", STRING, text(kind)),
    ]
    config = config_of(open_gguf(write(tmp_path, pairs, CASES["llama"][0].tensors("F32"))))
    assert config["rope_parameters"] == {"rope_theta": 5000.0} | expected


def test_rope_divisors_of_llama3(tmp_path):
    factors = np.linspace(1, 8, DIM // 2).astype("<f4")
    more = [Tensor("rope_freqs.weight", (DIM // 2,), 0, factors.tobytes())]
    model = open_gguf_model(llama(tmp_path, more))
    rope = ModelConfig.from_hf(model.config).rope
    from jaxquant.nn.rope import frequencies

    plain = 5000.0 ** -(np.arange(0, DIM, 2) / DIM)
    for length in (None, jnp.asarray([4]), jnp.asarray([4000])):
        found = np.asarray(frequencies(rope, length)).reshape(-1)
        np.testing.assert_allclose(found, plain / factors, rtol=1e-6)
    assert rope.magnitude == 1
    bad = [more[0]._replace(dims=(3,), data=bytes(12))]
    with pytest.raises(FormatError, match="rope_freqs"):
        open_gguf_model(llama(tmp_path, bad))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention__head_count": 0}, "0; at least 1"),
        ({"attention__head_count_kv": 0}, "0; at least 1"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "nan"),
        ({"feed_forward_length": 2.5}, "whole number"),
        ({"context_length": True}, "True"),
        ({"block_count": (1 << 31) - 1}, "2147483647 layers"),
        ({"block_count": 0}, "0 layers"),
        ({"attention__head_count": 3, "attention__head_count_kv": 3}, "rows for 3 heads"),
    ],
)
def test_metadata_that_cannot_be(keys, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        open_gguf_model(llama(tmp_path, **keys))


def test_missing_metadata_names_the_key(tmp_path):
    pairs = [p for p in metadata("llama") if b"embedding_length" not in p]
    path = write(tmp_path, pairs, CASES["llama"][0].tensors("F32"))
    with pytest.raises(FormatError, match="None") as error:
        open_gguf_model(path)
    assert error.value.where.endswith("llama.embedding_length")


def test_per_layer_arrays(tmp_path):
    def with_heads(values):
        pairs = [p for p in metadata("llama") if b"head_count_kv" not in p]
        pairs.append(pair("llama.attention.head_count_kv", ARRAY, array(U32, values)))
        return open_gguf(write(tmp_path, pairs, CASES["llama"][0].tensors("F32")))

    assert config_of(with_heads([2, 2]))["num_key_value_heads"] == 2
    with pytest.raises(FormatError, match="differs between layers"):
        config_of(with_heads([2, 4]))


def test_unknown_architecture_and_name_map(tmp_path):
    files, _, _ = CASES["llama"]
    renamed = [t._replace(name=t.name.replace("blk.", "h.")) for t in files.tensors("F32")]
    known = config_of(open_gguf(llama(tmp_path)))
    path = write(tmp_path, metadata("mystery"), renamed)
    with pytest.raises(FormatError, match="mystery"):
        open_gguf_model(path)
    assert jq.read_quantized(path)["h.0.attn_q"].shape == (HEADS * DIM, HIDDEN)
    config = {"model_type": "llama", "num_hidden_layers": LAYERS}
    with pytest.raises(PlanError) as error:
        open_gguf_model(path, config=config)
    assert len(error.value.problems) == 9 * LAYERS
    names = {
        f"h.{{}}.{stem}": f"model.layers.{{}}.{module}"
        for stem, module in gguf_names._BLOCK.items()
        if any(t.name == f"h.0.{stem}.weight" for t in renamed)
    }
    model = open_gguf_model(path, names, config)
    assert "model.layers.1.self_attn.q_proj" in jq.read_quantized(path, names=names)
    with pytest.raises(PlanError, match=r"'h\.\{\}\.attn_x': matches nothing"):
        jq.read_quantized(path, names=names | {"h.{}.attn_x": "model.layers.{}.x"})
    assert set(model.pieces) == set(files.model)
    (tmp_path / "config.json").write_text(json.dumps(known))
    loaded = jq.from_pretrained(path, names=names, config=tmp_path / "config.json")
    assert loaded(np.zeros((1, 3), np.int32)).shape == (1, 3, VOCAB)
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        jq.from_pretrained(path, names=names, config={**known, "num_hidden_layers": None})
    with pytest.raises(ConfigError, match="a directory"):
        jq.from_pretrained(tmp_path, config=known)
    value = np.asarray(jq.dequantize(model.load("model.layers.1.self_attn.k_proj")))
    # A foreign architecture's rows are taken as they are.
    np.testing.assert_array_equal(value, files.file["blk.1.attn_k.weight"])


def test_name_map_mistakes(tmp_path):
    path = llama(tmp_path)
    with pytest.raises(ConfigError, match=r"each \{\}"):
        open_gguf_model(path, {"blk.0.attn_q": "model.layers.{}.self_attn.q_proj"})
    with pytest.raises(PlanError, match="one tensor for each weight"):
        open_gguf_model(path, {"blk.{}.attn_q": "model.layers.{}.self_attn.k_proj"})


def test_tensors_without_a_name_are_all_listed(tmp_path):
    more = [Tensor(n, (8,), 0, bytes(32)) for n in ("blk.0.ssm_a", "mystery.weight")]
    with pytest.raises(PlanError) as error:
        open_gguf_model(llama(tmp_path, more))
    assert [p.split(":")[0] for p in error.value.problems] == ["blk.0.ssm_a", "mystery.weight"]


def test_tensors_without_a_part_are_ignored(tmp_path):
    names = (
        "blk.0.ffn_up.input_scale",
        f"blk.{LAYERS}.nextn.eh_proj.weight",
        "blk.7.attn_q.weight",
    )
    more = [Tensor(n, (8,), 0, bytes(32)) for n in names]
    model = open_gguf_model(llama(tmp_path, more))
    assert set(model.pieces) == set(CASES["llama"][0].model)


def test_split_latent_needs_both_parts(tmp_path):
    files, pairs, _ = CASES["deepseek3 split"]
    tensors = [t for t in files.tensors("F32") if t.name != "blk.1.attn_v_b.weight"]
    with pytest.raises(PlanError, match=r"blk\.1\.attn_v_b\.weight is missing"):
        open_quietly(write(tmp_path, pairs, tensors))
    odd = [
        t._replace(dims=(4, *t.dims[1:]), data=t.data[: len(t.data) // t.dims[0] * 4])
        if t.name == "blk.0.attn_v_b.weight"
        else t
        for t in files.tensors("F32")
    ]
    with pytest.raises(PlanError, match="attn_k_b"):
        open_quietly(write(tmp_path, pairs, odd))


def test_what_is_not_kept_packed_is_said(tmp_path):
    files, pairs, _ = CASES["deepseek3 split"]
    path = write(tmp_path, pairs, files.tensors("Q8_0"))
    with pytest.warns(FormatWarning, match="kv_b_proj of 2 layers"):
        model = open_gguf_model(path)
    assert len(model.notes) == 1
    assert model.weights["model.layers.0.self_attn.kv_b_proj"].layout.dense
    assert not model.weights["model.layers.0.self_attn.q_b_proj"].layout.dense


@pytest.mark.parametrize("name", CASES)
def test_names_are_invertible(name):
    files, _, family = CASES[name]
    for tensor in files.file:
        module = gguf_names.module_name(tensor, family)
        if module is None:
            assert "_b.weight" in tensor or "gate_up" in tensor
            continue
        if "exps" in tensor:
            single = module.replace("experts.", "experts.3.")
            assert gguf_names.gguf_name(single) == (tensor, 3)
            continue
        found, expert = gguf_names.gguf_name(module)
        if expert is not None:
            assert found == tensor.replace(f".{expert}.weight", "_exps.weight")
        else:
            assert found == tensor


def test_names_without_a_tensor():
    for name in (
        "model.layers.0.mlp.experts.1.mystery",
        "transformer.h.0.attn",
        "model.layers.0.x",
    ):
        with pytest.raises(ConfigError):
            gguf_names.gguf_name(name)
