"""Export to GGUF: what is written is what is read back, and what the gguf package decodes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.convert.gguf_config import config_of
from jaxquant.convert.gguf_export import exact_type, export_gguf, metadata_from
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.errors import ConfigError, FormatError
from jaxquant.formats import gguf, gguf_encode
from jaxquant.formats.gguf_types import TYPES
from jaxquant.models import ModelConfig
from jaxquant.transforms.numeric import as_numpy, quantize
from tests.convert.gguf_bytes import STRING, build, pair, text
from tests.convert.gguf_models import CASES, metadata
from tests.convert.test_read_gguf_model import open_quietly
from tests.formats.test_gguf import KEPT, oracle, random_blocks


def opened(tmp_path, name, kind="Q8_0"):
    files, pairs, _ = CASES[name]
    path = tmp_path / "source.gguf"
    path.write_bytes(build(pairs, files.tensors(kind)))
    model = open_quietly(path)
    return model, ModelConfig.from_hf(model.config)


def value_of(loaded) -> np.ndarray:
    if isinstance(loaded, np.ndarray):
        return loaded
    return np.asarray(loaded.data[0] if loaded.layout.dense else jq.dequantize(loaded))


@pytest.mark.parametrize("name", CASES)
def test_models_round_trip_exactly(name, tmp_path):
    model, config = opened(tmp_path, name)
    path = tmp_path / "copy.gguf"
    export_gguf(path, config, model.weights, model.arrays, model.load)
    again = open_quietly(path)
    assert ModelConfig.from_hf(again.config) == config
    assert set(again.pieces) == set(model.pieces)
    for key in model.weights:
        before, after = model.load(key), again.load(key)
        assert after.layout == before.layout, key
        for a, b in zip((*before.data, *before.scales), (*after.data, *after.scales), strict=True):
            np.testing.assert_array_equal(a, b)
    for key in model.arrays:
        np.testing.assert_array_equal(model.load(key), again.load(key))


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "deepseek2"])
def test_the_tensors_are_those_of_the_source_file(name, tmp_path):
    """Byte for byte: permuted rows are permuted again, experts stacked again."""
    model, config = opened(tmp_path, name)
    path = tmp_path / "copy.gguf"
    export_gguf(path, config, model.weights, model.arrays, model.load)
    copy = open_gguf(path)
    assert set(copy.tensors) == set(model.file.tensors)
    for key, tensor in model.file.tensors.items():
        if key == "token_embd.weight":  # an array to the model, hence float32
            continue
        assert copy.tensors[key].shape == tensor.shape
        assert copy.tensors[key].read().tobytes() == tensor.read().tobytes(), key


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_models_are_quantized_to_one_type(kind, tmp_path):
    package = oracle()
    model, config = opened(tmp_path, "llama", "F32")
    path = tmp_path / "copy.gguf"
    export_gguf(path, config, model.weights, model.arrays, model.load, kind=kind)
    for tensor in package.GGUFReader(path).tensors:
        source = model.file.array(tensor.name)
        wanted = kind if source.ndim > 1 else "F32"
        assert tensor.tensor_type.name == wanted
        expected = package.quants.quantize(source, package.GGMLQuantizationType[wanted])
        assert tensor.data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", KEPT)
def test_exact_type_of_gguf_weights(name):
    q = gguf.decode(random_blocks(name, (4, 512)), TYPES[name], (4, 512))
    # The two ternary types decode to the same layout.
    assert exact_type(q).name == {"TQ1_0": "TQ2_0"}.get(name, name)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a16_g128", "F32"),  # bfloat16 scales
        ("w8a16_g64", "F32"),
        ("w4a16_g64_asym", "F32"),
        ("fp8_b128", "F32"),
        ("nvfp4a16", "NVFP4"),
        ("mxfp4a16", "MXFP4"),
        ("bf16", "BF16"),
        ("f16", "F16"),
    ],
)
def test_exact_type_of_other_weights(scheme, expected):
    w = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    assert exact_type(quantize(w, scheme, ("out", "in"))).name == expected


def with_half_scales(scheme: str):
    w = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    q = as_numpy(quantize(w, scheme, ("out", "in")))
    return dataclasses.replace(q, scales=(q.scales[0].astype(np.float16),))


@pytest.mark.parametrize(
    ("scheme", "expected"), [("w4a16_g128", "Q4_0"), ("w5a16_g64", "Q5_0"), ("w8a16_g32", "Q8_0")]
)
def test_larger_groups_are_split_without_loss(scheme, expected):
    q = with_half_scales(scheme)
    kind = exact_type(q)
    assert kind.name == expected
    raw = gguf_encode.encode(q, kind)
    np.testing.assert_array_equal(gguf.dequantize(raw, kind, q.shape), np.asarray(jq.dequantize(q)))


def test_weights_of_other_formats_keep_their_values(tmp_path):
    """Mixed layouts, act-order and pre-scales: everything is written exactly."""
    model, config = opened(tmp_path, "qwen3", "F32")
    loaded = {key: model.load(key) for key in model.pieces}
    rng = np.random.default_rng(1)
    schemes = ["nvfp4a16", "fp8_b128", "w4a16_g32_asym"]
    for key, scheme in zip(list(model.weights)[1:], schemes, strict=False):
        w = np.asarray(jq.dequantize(loaded[key]))
        loaded[key] = as_numpy(quantize(w, scheme, ("out", "in")))
    expected = {key: value_of(loaded[key]) for key in loaded}
    sorted_rows = "model.layers.1.mlp.gate_proj"
    perm = rng.permutation(64).astype(np.int32)
    plain = np.asarray(jq.dequantize(loaded[sorted_rows]))
    moved = as_numpy(quantize(plain[:, perm], "w8a16_g32", ("out", "in")))
    loaded[sorted_rows] = dataclasses.replace(moved, perm=perm)
    expected[sorted_rows] = np.asarray(jq.dequantize(loaded[sorted_rows]))
    scaled = "model.layers.1.mlp.up_proj"
    factors = rng.uniform(0.5, 2, size=(1, 64)).astype(np.float32)
    loaded[scaled] = dataclasses.replace(loaded[scaled], pre_scale=factors)
    expected[scaled] = expected[scaled] * factors
    weights = {key: loaded[key] for key in model.weights}
    path = tmp_path / "copy.gguf"
    export_gguf(path, config, weights, model.arrays, loaded.__getitem__)
    again = open_quietly(path)
    for key, value in expected.items():
        np.testing.assert_array_equal(value_of(again.load(key)), value, err_msg=key)
    assert len(again.load(list(model.weights)[1]).scales) == 2


def test_experts_of_several_formats_share_a_type(tmp_path):
    model, config = opened(tmp_path, "qwen3moe", "F32")
    loaded = {key: model.load(key) for key in model.pieces}
    for key in model.weights:
        if ".mlp.experts." in key and "down" not in key:
            odd = ".experts.1.up" in key and ".layers.0." in key
            q = random_blocks("MXFP4" if odd else "NVFP4", model.weights[key].shape, len(key))
            kind = TYPES["MXFP4" if odd else "NVFP4"]
            scale = None if odd else np.float32([0.1 + loaded[key].data[0][0, 0] ** 2])
            loaded[key] = gguf.decode(q, kind, model.weights[key].shape, key, scale)
    weights = {key: loaded[key] for key in model.weights}
    path = tmp_path / "copy.gguf"
    export_gguf(path, config, weights, model.arrays, loaded.__getitem__)
    again = open_quietly(path)
    assert again.file.tensors["blk.0.ffn_up_exps.weight"].dtype == "F32"
    assert again.file.tensors["blk.1.ffn_up_exps.weight"].dtype == "NVFP4"
    assert again.file.tensors["blk.1.ffn_up_exps.scale"].shape == (4,)
    for key in weights:
        np.testing.assert_array_equal(value_of(again.load(key)), value_of(loaded[key]), key)


@pytest.mark.parametrize("name", ["llama", "deepseek2"])
def test_yarn_round_trip(name, tmp_path):
    _, _, family = CASES[name]
    arch = "llama" if family == "llama" else "deepseek2"
    more = {
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
    }
    if arch == "deepseek2":
        more["rope.scaling.yarn_log_multiplier"] = 0.0707
    files, pairs, _ = CASES[name]
    scaling = metadata(arch, **{k.replace(".", "__"): v for k, v in more.items()})[-len(more) :]
    kind = pair(f"{arch}.rope.scaling.type", STRING, text("yarn"))
    path = tmp_path / "source.gguf"
    path.write_bytes(build([*pairs, *scaling, kind], files.tensors("F32")))
    model = open_quietly(path)
    config = ModelConfig.from_hf(model.config)
    assert config.rope.kind == "yarn"
    export_gguf(tmp_path / "copy.gguf", config, model.weights, model.arrays, model.load)
    again = ModelConfig.from_hf(config_of(open_gguf(tmp_path / "copy.gguf")))
    assert again.rope == config.rope
    assert again.latent == config.latent


def test_llama3_rope_becomes_divisors(tmp_path):
    model, _ = opened(tmp_path, "llama", "F32")
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = ModelConfig.from_hf(dict(model.config) | {"rope_parameters": scaling})
    path = tmp_path / "copy.gguf"
    export_gguf(path, config, model.weights, model.arrays, model.load)
    from jaxquant.nn.rope import frequencies

    again = ModelConfig.from_hf(config_of(open_gguf(path))).rope
    length = jnp.asarray([100])
    expected = np.asarray(frequencies(config.rope))
    np.testing.assert_allclose(np.asarray(frequencies(again, length))[0], expected, rtol=1e-6)
    assert not np.allclose(
        expected, np.asarray(frequencies(dataclasses.replace(again, kind="default")))
    )


def test_what_gguf_cannot_say(tmp_path):
    model, config = opened(tmp_path, "llama", "F32")
    rope = dataclasses.replace(config.rope, kind="dynamic")
    with pytest.raises(ConfigError, match="dynamic"):
        metadata_from(dataclasses.replace(config, rope=rope))
    with pytest.raises(ConfigError, match="full attention"):
        metadata_from(dataclasses.replace(config, windows=(64, None)))
    with pytest.raises(ConfigError, match="Q4_K"):
        export_gguf(tmp_path / "x", config, {}, {}, model.load, kind="Q4_K")
    with pytest.raises(ConfigError, match="no GGUF tensor"):
        export_gguf(tmp_path / "x", config, {}, {"mystery": np.ones(3)}, model.load)


def test_a_missing_expert_is_named(tmp_path):
    model, config = opened(tmp_path, "mixtral", "F32")
    weights = {k: q for k, q in model.weights.items() if ".layers.1.mlp.experts.2.up" not in k}
    with pytest.raises(FormatError, match=r"\[0, 1, 3\]") as error:
        export_gguf(tmp_path / "x", config, weights, model.arrays, model.load)
    assert error.value.where == "model.layers.1.mlp.experts.up_proj"
    assert not (tmp_path / "x").exists()
