"""from_pretrained and save_pretrained on the bundled model and on small checkpoints made here."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant.convert.inspect import inspect_plan
from jaxquant.convert.placement import logical_axes
from jaxquant.convert.save import describe
from jaxquant.errors import ConfigError, FormatError, PlanError
from jaxquant.models import ModelConfig
from tests.convert.writer import write_checkpoint
from tests.formats.cases import CASES
from tests.small_models import CONFIGS, random_tensors

BUNDLED = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
IDS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) * 7 % 2000


@pytest.fixture(scope="module")
def model():
    return jq.from_pretrained(BUNDLED, dtype=jnp.float32)


@pytest.fixture(scope="module")
def mixed(model):
    rules = {r".*self_attn.*": "fp8", r".*experts.*down.*": "w4a16_g32_asym", r".*layers.*": "w8a8"}
    return jq.quantize_model(model, rules)


def copy_of(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    return folder


def edit_tensors(folder: Path, change) -> None:
    import ml_dtypes

    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16"
        low, high = entry["data_offsets"]
        data = np.frombuffer(raw[8 + size + low : 8 + size + high], ml_dtypes.bfloat16)
        tensors[name] = data.reshape(entry["shape"]).astype(np.float32).astype(np.float16)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_report_counts_everything(model):
    report = model.report
    assert report.loaded == report.total and not report.ignored
    assert report.nbytes == model.nbytes
    assert json.loads(json.dumps(report.as_json()))["loaded"] == report.loaded
    assert "saved against bf16" in str(report)
    assert model.tokenizer is not None


def test_round_trip_is_exact(mixed, tmp_path):
    jq.save_pretrained(mixed, tmp_path / "saved")
    restored = jq.from_pretrained(tmp_path / "saved")
    assert restored.dtype == mixed.dtype and restored.config == mixed.config
    before, after = (jax.tree.leaves(nnx.state(m)) for m in (mixed, restored))
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    np.testing.assert_array_equal(mixed(IDS), restored(IDS))
    assert describe(mixed)[0] == describe(restored)[0]
    assert restored.tokenizer.encode("the world") == mixed.tokenizer.encode("the world")
    assert jq.generate(restored, ["the"], max_new_tokens=4) == jq.generate(
        mixed, ["the"], max_new_tokens=4
    )
    assert [p.name for p in tmp_path.iterdir()] == ["saved"], "no temporary directory stays"


def test_a_converted_model_computes_in_the_type_asked_for(model, tmp_path):
    assert model.dtype == jnp.float32
    jq.save_pretrained(model, tmp_path / "saved")
    assert jq.from_pretrained(tmp_path / "saved").dtype == jnp.float32
    restored, direct = (
        jq.from_pretrained(path, dtype="bfloat16") for path in (tmp_path / "saved", BUNDLED)
    )
    assert restored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored(IDS), direct(IDS))
    assert not np.array_equal(restored(IDS), model(IDS))


def test_restoring_onto_a_mesh_splits_and_agrees(mixed, tmp_path):
    jq.save_pretrained(mixed, tmp_path / "saved")
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    restored = jq.from_pretrained(tmp_path / "saved", mesh=mesh)
    weight = restored.model.layers[0].self_attn.q_proj.weight.get_value()
    shards = weight.data[0].addressable_shards
    assert len(shards) == 2 and shards[0].data.shape[0] * 2 == weight.data[0].shape[0]
    got, want = np.asarray(restored(IDS)), np.asarray(mixed(IDS))
    off = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    # Sums over shards differ in the last bit, and an fp8 activation on a tie in a whole code.
    assert np.median(off) < 1e-5 and off.max() < 5e-2, off


def test_loading_onto_a_mesh_agrees(model):
    # Its axes are explicit, where a matmul has to say how its result is split.
    mesh = jax.make_mesh((2, 2), ("ep", "tp"))
    split = jq.from_pretrained(BUNDLED, mesh=mesh, dtype=jnp.float32)
    bank = split.model.layers[0].mlp.experts.gate_proj.get_value()
    leaf = bank.parts[0].data[0]
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    np.testing.assert_allclose(split(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_stacked_layers_load_save_and_restore(model, tmp_path):
    stacked = jq.from_pretrained(BUNDLED, dtype=jnp.float32, scan_layers=True)
    assert stacked.model.stacked and len(stacked.model.layers) == 1

    def same(a: jq.CausalLM, b: jq.CausalLM) -> bool:
        return jax.tree.all(jax.tree.map(np.array_equal, nnx.state(a), nnx.state(b)))

    assert same(stacked, jq.stack_layers(model))
    jq.save_pretrained(stacked, tmp_path / "saved")
    assert same(jq.from_pretrained(tmp_path / "saved"), model)
    assert same(jq.from_pretrained(tmp_path / "saved", scan_layers=True), stacked)


def test_stacked_layers_load_onto_a_mesh(model):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("ep", "tp"))
    split = jq.from_pretrained(BUNDLED, mesh=mesh, dtype=jnp.float32, scan_layers=True)
    leaf = split.model.layers[0].mlp.experts.gate_proj.get_value().parts[0].data[0]
    assert leaf.shape[0] == 4 and leaf.addressable_shards[0].data.size * 4 == leaf.size
    np.testing.assert_allclose(split(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_logical_axes_of_modules():
    assert logical_axes("model.layers.0.self_attn.q_proj") == {"out": "inner"}
    assert logical_axes("model.layers.0.mlp.experts.down_proj") == {"in": "inner"}
    assert logical_axes("lm_head") == {"out": "vocab"}
    assert logical_axes("model.layers.0.mlp.gate") == {}


def test_saving_never_overwrites_or_leaves_halves(model, tmp_path, monkeypatch):
    target = tmp_path / "saved"
    target.mkdir()
    with pytest.raises(FormatError, match="exists"):
        jq.save_pretrained(model, target)
    target.rmdir()
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        jq.save_pretrained(model, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(version=99),
        lambda d: d.pop("config"),
        lambda d: d["config"].update({"@": "Exploit"}),
        lambda d: d["config"].pop("vocab_size"),
        lambda d: d["layouts"][0]["layout"]["code"].update(name="int99"),
        lambda d: d["weights"].update({"model.layers.0.self_attn.q_proj": 10**6}),
        lambda d: d["layouts"][0].update(leaves={}),
    ],
)
def test_damaged_descriptions_are_refused(model, tmp_path, damage):
    jq.save_pretrained(model, tmp_path / "saved")
    file = tmp_path / "saved" / "layouts.json"
    document = json.loads(file.read_text())
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(FormatError) as caught:
        jq.from_pretrained(tmp_path / "saved")
    assert "layouts.json" in caught.value.where and caught.value.action


def test_missing_arrays_are_refused(model, tmp_path):
    jq.save_pretrained(model, tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "arrays")
    with pytest.raises(FormatError, match="cannot be restored"):
        jq.from_pretrained(tmp_path / "saved")


def test_loading_is_total_in_both_directions(tmp_path):
    folder = copy_of(tmp_path)

    def change(tensors):
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        tensors["model.layers.0.self_attn.extra.weight"] = np.zeros((4, 4), np.float16)
        tensors["model.norm.weight"] = np.zeros(3, np.float16)

    edit_tensors(folder, change)
    with pytest.raises((PlanError, FormatError)) as caught:
        jq.from_pretrained(folder)
    text = str(caught.value)
    if isinstance(caught.value, PlanError):
        assert "q_proj: missing" in text and "extra: left over" in text and "model.norm" in text
    assert "experts" in text


def test_derived_tensors_are_left_out_and_reported(tmp_path):
    folder = copy_of(tmp_path)
    edit_tensors(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
        ),
    )
    report = jq.from_pretrained(folder).report
    assert report.total == report.loaded + 1
    assert dict(report.ignored) == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "derived from the config"
    }


def test_weights_do_not_alias_the_file(tmp_path):
    folder = copy_of(tmp_path)
    model = jq.from_pretrained(folder, dtype=jnp.float32)
    before = np.array(model(IDS))
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.seek(size // 2)
        handle.write(b"\x42" * (size // 2))
    np.testing.assert_array_equal(before, model(IDS))


def test_unknown_architectures_and_dtypes_are_refused(tmp_path):
    folder = copy_of(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mamba"
    config["architectures"] = ["MambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="Mamba"):
        jq.from_pretrained(folder)
    with pytest.raises(ConfigError, match="dtype"):
        jq.from_pretrained(BUNDLED, dtype=jnp.int8)
    with pytest.raises(FormatError, match="no such directory"):
        jq.from_pretrained(tmp_path / "nowhere")


def quantized_copy(tmp_path: Path, name: str, scheme: str) -> Path:
    """The bundled model as an fp8 or int8 checkpoint, written with plain NumPy."""
    import ml_dtypes

    folder = tmp_path / name
    shutil.copytree(BUNDLED, folder)
    source = jq.read_quantized(BUNDLED)
    tensors = {}
    raw = jq.from_pretrained(BUNDLED, dtype=jnp.float32)
    for key, value in describe(raw)[1].items():
        tensors[key] = np.ones(value.shape, np.float16)
    for path, q in source.items():
        w = np.asarray(jq.dequantize(q))
        if "layers" in path and not path.endswith("mlp.gate"):
            limit = 448 if scheme == "fp8" else 127
            scale = np.abs(w).max(1, keepdims=True) / limit
            codes = w / scale
            codes = (
                codes.astype(ml_dtypes.float8_e4m3fn)
                if scheme == "fp8"
                else np.round(codes).astype(np.int8)
            )
            tensors[f"{path}.weight"] = codes
            tensors[f"{path}.weight_scale"] = scale.astype(np.float32)
        else:
            tensors[f"{path}.weight"] = w.astype(np.float16)
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": f"w8a8_{scheme}"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_safetensors(file: Path, tensors: dict) -> None:
    names = {"float16": "F16", "float32": "F32", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}
    header, offset = {}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": names[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            handle.write(np.ascontiguousarray(array).tobytes())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {name: quantized_copy(root, name, name) for name in ("fp8", "int8")} | {"root": root}


def write_plan(sources, tmp_path, mapping) -> Path:
    lines = "\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in mapping.items())
    text = (
        f"mixed_precision:\n  base_model_path: {BUNDLED}\n  fp8_path: {sources['fp8']}\n"
        f"  int8_path: {sources['int8']}\n  weight_mapping:\n{lines}\n"
    )
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return file


def test_a_plan_mixes_checkpoints_down_to_the_expert(sources, tmp_path, monkeypatch):
    # The copies have norms of ones on purpose: the base's norms must be the ones that are loaded.
    from jaxquant.convert import mix

    monkeypatch.setattr(mix, "_smoothing_problems", lambda *args: [])
    plan = write_plan(
        sources,
        tmp_path,
        {
            "model.layers.*.self_attn.*.weight": "int8",
            "model.layers.*.mlp.experts.*.w13_weight": "fp8",
            "model.layers.0.mlp.experts.1.w2_weight": "w4a16_g32",
        },
    )
    model = jq.from_pretrained(BUNDLED, plan=plan, dtype=jnp.float32)
    weights, _ = describe(model)
    code = {name: q.layout.code.name for name, q in weights.items()}
    assert code["model.layers.1.self_attn.k_proj"] == "int8"
    assert code["model.layers.0.mlp.experts.3.gate_proj"] == "e4m3"
    assert code["model.layers.0.mlp.experts.1.down_proj"] == "int4"
    assert code["model.layers.0.mlp.experts.0.down_proj"] == "bf16"
    fp8 = jq.read_quantized(sources["fp8"])["model.layers.0.mlp.experts.3.gate_proj"]
    experts = model.model.layers[0].mlp.experts
    from jaxquant.transforms.experts import expert_weight

    loaded = expert_weight(experts.gate_proj.get_value(), experts.plan, 3)
    assert np.asarray(loaded.data[0]).tobytes() == np.asarray(fp8.data[0]).tobytes()
    kinds = {(f.format, f.code) for f in model.report.formats}
    assert {("fp8", "e4m3"), ("int8", "int8"), ("w4a16_g32", "int4"), ("dense", "bf16")} <= kinds
    base = jq.from_pretrained(BUNDLED, dtype=jnp.float32)
    error = np.linalg.norm(model(IDS) - base(IDS)) / np.linalg.norm(base(IDS))
    assert 1e-4 < error < 0.1


def test_a_dry_run_says_what_would_load_from_where(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"mixed_precision:\n  base_model_path: {BUNDLED}\n  weight_mapping:\n"
        '    "model.layers.*.mlp.experts.1.w13_weight": "fp8_b128"\n'
    )
    found = inspect_plan(BUNDLED, plan)
    loaded = jq.from_pretrained(BUNDLED, plan=plan).report
    assert found.plan == loaded and found.summary == str(loaded)
    assert found.columns[-1] == "from" and {row[-1] for row in found.rows} == {str(BUNDLED)}
    data = json.loads(json.dumps(found.as_json()))
    assert [f["format"] for f in data["plan"]["formats"]] == ["dense", "fp8_b128"]
    assert data["plan"]["formats"][1]["weights"] == 2 * 4


def test_a_plan_that_cannot_be_met_lists_everything(sources, tmp_path):
    plan = write_plan(
        sources,
        tmp_path,
        {
            "model.layers.0.self_attn.q_proj.weight": "fp8",
            "model.layers.0.mlp.gate.weight": "fp8",
            "model.layers.9.mlp.gate.weight": "fp8",
        },
    )
    with pytest.raises(PlanError) as caught:
        jq.from_pretrained(BUNDLED, plan=plan)
    text = "\n".join(caught.value.problems)
    assert "layers.0.mlp.gate: " in text and "not as fp8" in text
    assert "layers.9.mlp.gate.weight: matches no weight" in text
    assert "differs from the base's" in text, "the copies' norms are not the base's"


def test_a_plan_needs_an_unconverted_checkpoint(model, sources, tmp_path):
    jq.save_pretrained(model, tmp_path / "saved")
    plan = write_plan(sources, tmp_path, {"model.layers.0.mlp.gate.weight": "w8a16"})
    with pytest.raises(ConfigError, match="converted already"):
        jq.from_pretrained(tmp_path / "saved", plan=plan)


def test_read_quantized_has_every_linear(model):
    ours = jq.read_quantized(BUNDLED)
    assert set(ours) == {
        name for name, q in describe(model)[0].items() if name != "model.embed_tokens"
    }
    assert all(q.axes == ("out", "in") for q in ours.values())


def kv_arrays(config, layers):
    """Random tensors and KV scales of `layers` layers, in ModelOpt's names."""
    arrays = random_tensors(ModelConfig.from_hf(config))
    for i in range(layers):
        for part in "kv":
            name = f"model.layers.{i}.self_attn.{part}_proj.{part}_scale"
            arrays[name] = np.float32([0.02])
    return arrays


@pytest.mark.parametrize(
    "config,changes,layers,reason",
    [
        ("deepseek-v3", {}, 3, "prediction"),
        ("deepseek-v3", {}, 2, "latent"),
        ("llama", {"kv_cache_quant_algo": "NVFP4"}, 2, "NVFP4"),
    ],
)
def test_kv_scales_that_are_not_of_an_fp8_cache_are_left_out(
    config, changes, layers, reason, tmp_path
):
    config = {**CONFIGS[config], "num_hidden_layers": 2}
    quantized = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"], **changes}
    arrays = kv_arrays(config, layers)
    write_checkpoint(tmp_path, arrays, config | {"quantization_config": quantized})
    model = jq.from_pretrained(tmp_path)
    last = f"model.layers.{layers - 1}.self_attn.k_scale"
    assert reason in dict(model.report.ignored)[last]
    assert not any("scale" in str(path) for path, _ in nnx.state(model).flat_state())


def test_kv_scales_of_a_side_file_are_those_of_tensors(tmp_path):
    config = CONFIGS["llama"]
    write_checkpoint(tmp_path / "tensors", kv_arrays(config, 2), config)
    write_checkpoint(tmp_path / "file", kv_arrays(config, 0), config)
    cache = {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.02, "1": 0.02}}}
    (tmp_path / "file" / "kv_cache_scales.json").write_text(json.dumps({"kv_cache": cache}))
    ids = IDS % 64
    file, tensors = (jq.from_pretrained(tmp_path / n)(ids) for n in ("file", "tensors"))
    np.testing.assert_array_equal(file, tensors)


@pytest.mark.parametrize("root", ["language_model.model.", "model.language_model.", "model."])
def test_the_language_model_of_a_multimodal_checkpoint(root, tmp_path):
    config = CONFIGS["llama"]
    tensors = random_tensors(ModelConfig.from_hf(config))
    write_checkpoint(tmp_path / "alone", tensors, config)
    outer = {name: config[name] for name in ("eos_token_id", "tie_word_embeddings")}
    inner = {k: v for k, v in config.items() if k not in (*outer, "architectures")}
    whole = outer | {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    whole |= {"text_config": inner, "vision_config": {"num_hidden_layers": 1}}
    arrays = {name.replace("model.", root, 1): value for name, value in tensors.items()}
    other = {"vision_tower.q_proj.weight": np.ones((8, 8), np.float32)} if root != "model." else {}
    write_checkpoint(tmp_path / "whole", arrays | other, whole)
    model = jq.from_pretrained(tmp_path / "whole")
    assert [name for name, _ in model.report.ignored] == [n[:-7] for n in other]
    ids = IDS % 64
    np.testing.assert_array_equal(model(ids), jq.from_pretrained(tmp_path / "alone")(ids))
    jq.save_pretrained(model, tmp_path / "saved")
    np.testing.assert_array_equal(model(ids), jq.from_pretrained(tmp_path / "saved")(ids))
    # A type of text model that is not known is named.
    whole["text_config"] = inner | {"model_type": "qwen2_5_vl_text"}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="qwen2_5_vl_text"):
        jq.from_pretrained(tmp_path / "whole")


def test_a_quantized_embedding_is_named(tmp_path):
    tensors = random_tensors(ModelConfig.from_hf(CONFIGS["llama"]))
    case = CASES["ct-fp8-channel"]
    rows, columns = tensors.pop("model.embed_tokens.weight").shape
    for suffix, array in case.arrays.items():
        tensors[f"model.embed_tokens.{suffix}"] = array[:rows, :columns]
    write_checkpoint(tmp_path, tensors, CONFIGS["llama"] | {"quantization_config": case.config})
    with pytest.raises(FormatError, match="embed_tokens: an embedding in compressed-tensors"):
        jq.from_pretrained(tmp_path)
