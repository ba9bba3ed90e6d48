"""Export: what is written reads back bit for bit, and what a format cannot hold is refused."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tokenizers import processors

import jaxquant as jq
from jaxquant import cli
from jaxquant.convert import export as exporter
from jaxquant.convert.load import tokenizer_of
from jaxquant.convert.read import open_checkpoint, survey
from jaxquant.convert.source import open_source
from jaxquant.convert.write_safetensors import Entry, Piece, write_safetensors
from jaxquant.errors import ConfigError, FormatError
from jaxquant.formats.arrange import Arrangement, same
from jaxquant.formats.base import FormatWarning
from jaxquant.formats.names import ignored_by
from jaxquant.formats.targets import TARGETS, patterns
from jaxquant.models import ModelConfig
from jaxquant.transforms.numeric import as_numpy, requantize
from tests.convert.export_cases import (
    BUNDLED,
    CASES,
    GOLDEN,
    LAST_BIT,
    Case,
    export,
    source_of,
    values,
)
from tests.convert.test_read_gguf_tokenizer import LLAMA3, trained
from tests.convert.writer import write_checkpoint
from tests.formats.cases import gptq
from tests.small_models import CONFIGS, random_tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


def expected(case, item):
    """The weight that must come back: quantized if asked for, in the form of the format."""
    q, target = as_numpy(item.load()), TARGETS[case.format]
    if q.layout.dense and not case.scheme:
        return q
    if case.scheme:
        q = as_numpy(requantize(q, case.scheme))
        if target.scale_dtype:
            scales = tuple(scale.astype(target.scale_dtype) for scale in q.scales)
            q = dataclasses.replace(q, scales=scales)
    arrangement = target.arrange(q)
    assert isinstance(arrangement, Arrangement), arrangement
    return arrangement.adapt(q)


def differs(q, again, last_bit=False):
    """What is not the same, bit for bit (but for the last one of NVFP4's tensor scale), or None."""
    if q.layout != again.layout:
        return f"{q.layout} became {again.layout}"
    for name in ("code", "granularity", "dynamic", "symmetric", "group_size", "upper_bound"):
        if getattr(q.act, name, None) != getattr(again.act, name, None):
            return f"activations {q.act} became {again.act}"
    left, right = jax.tree.leaves(q), jax.tree.leaves(again)
    if [(a.dtype, a.shape) for a in left] != [(a.dtype, a.shape) for a in right]:
        return "other leaves"
    for a, b in zip(left, right, strict=True):
        near = last_bit and a.shape == (1, 1) and np.allclose(a, b, rtol=2**-23, atol=0)
        if a.tobytes() != np.asarray(b).tobytes() and not near:
            return "other bytes"
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_an_export_reads_back_bit_for_bit(root, case):
    out = export(case, root)
    before, after = open_source(source_of(case, root)), open_source(out)
    assert list(before.weights) == list(after.weights)
    assert {*before.arrays} == {*after.arrays}
    for name, item in before.weights.items():
        if case.scheme and not re.search(r"layers\.[12]\.", name):
            continue
        kept = case._replace(scheme=None) if name.endswith(".gate") else case
        again = as_numpy(after.weights[name].load())
        found = differs(expected(kept, item), again, any(word in case.label for word in LAST_BIT))
        assert found is None, f"{name}: {found}"
    for name, item in before.arrays.items():
        value, again = np.asarray(item.load()), np.asarray(after.arrays[name].load())
        assert (value.dtype, value.tobytes()) == (again.dtype, again.tobytes()), name


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_bit_is_noticed(root, name):
    case = next(case for case in CASES if case.format == name)
    out = export(case, root / name)
    source = open_source(source_of(case, root))
    module = next(n for n, item in source.weights.items() if not item.abstract.layout.dense)
    tensor = next(iter(survey(open_checkpoint(out)).modules[module].raw.values()))
    data = bytearray((out / "model.safetensors").read_bytes())
    data[data.index(np.ascontiguousarray(tensor.read()).tobytes()[:64])] ^= 1
    (out / "model.safetensors").write_bytes(data)
    again = as_numpy(open_source(out).weights[module].load())
    assert differs(expected(case, source.weights[module]), again) == "other bytes"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_ignore_list_covers_what_is_not_quantized(root, case):
    """By the family's own rule; lm_head is left out by default in GPTQ."""
    out = root / case.label
    out = out if out.exists() else export(case, root)
    checkpoint = open_checkpoint(out)
    config = checkpoint.quant_config or {}
    coverage = TARGETS[case.format].format.coverage(config)
    for path, module in survey(checkpoint).modules.items():
        covered = ignored_by(coverage, path) is not None or not coverage.targeted(path)
        assert covered == (module.format.name == "dense"), path


def test_config_and_tokenizer_stay_the_same(root):
    out = export(Case("bundled", "gptq", "w8a16"), root / "config")
    before, after = (json.loads((p / "config.json").read_text()) for p in (BUNDLED, out))
    assert after.pop("quantization_config")["bits"] == 8
    assert before == after
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (BUNDLED / name).read_bytes()
    assert not (out / "eval_tokens.npy").exists()
    assert not list(out.parent.glob(".*")), "no temporary directory is left"


def test_links_out_of_the_source_are_not_copied(tmp_path):
    folder = shutil.copytree(GOLDEN / "gptq-4b-dynamic-llama", tmp_path / "source")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(FormatError) as raised:
        jq.export_pretrained(folder, tmp_path / "out", format="gptq")
    assert "links to" in raised.value.found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "source"]


def test_a_gguf_file_becomes_a_directory(tmp_path):
    file, out = tmp_path / "tiny.gguf", tmp_path / "out"
    jq.export_pretrained(BUNDLED, file, format="gguf", kind="Q8_0")
    jq.export_pretrained(file, out, format="compressed-tensors")
    before, after = open_source(file), open_source(out)
    assert before.config == after.config
    for name in list(before.weights)[::9]:
        q, again = before.weights[name].load(), after.weights[name].load()
        assert differs(as_numpy(q), as_numpy(again)) is None
    model = jq.from_pretrained(out, dtype=jnp.float32)
    text = "Once upon a time"
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


@pytest.mark.parametrize("target", ["gptq", "awq", "compressed-tensors"])
def test_scales_of_both_signs_read_back(target, tmp_path):
    """Those of symmetric weights of AutoRound."""
    case, path = gptq(4, 64, shape=(64, 192)), "model.layers.0.mlp.down_proj"
    config = CONFIGS["llama"] | {"hidden_size": 64, "intermediate_size": 192}
    tensors = random_tensors(ModelConfig.from_hf(config | {"num_hidden_layers": 1}))
    del tensors[f"{path}.weight"]
    signs = np.where(np.arange(64) % 2, 1, -1).astype(np.float16)
    arrays = case.arrays | {"scales": case.arrays["scales"] * signs}
    tensors |= {f"{path}.{suffix}": array for suffix, array in arrays.items()}
    quant = case.config | {"provider": "auto-round"}
    config |= {"num_hidden_layers": 1, "quantization_config": quant}
    source = write_checkpoint(tmp_path / "source", tensors, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FormatWarning)
        jq.export_pretrained(source, tmp_path / "out", format=target)
        found, want = (jq.read_quantized(f)[path] for f in (tmp_path / "out", source))
    np.testing.assert_array_equal(jq.dequantize(found), jq.dequantize(want))


def test_gguf_keeps_what_a_tokenizer_puts_around_a_text(tmp_path):
    config = CONFIGS["llama"] | {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1}
    source = write_checkpoint(
        tmp_path / "source", random_tensors(ModelConfig.from_hf(config)), config
    )
    original = trained(LLAMA3)
    original.post_processor = processors.TemplateProcessing(
        single=["<|begin|>", "$A"], special_tokens=[("<|begin|>", 0)]
    )
    original.save(str(source / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, old in (("a.gguf", source), ("b.gguf", tmp_path / "a.gguf")):
        jq.export_pretrained(old, tmp_path / name, format="gguf")
        found = tokenizer_of(tmp_path / name)
        assert found is not None and found.chat_template == "{{ messages }}"
        assert found.special == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
        assert found.encode("Hello") == original.encode("Hello").ids
        assert found.encode("Hello")[0] == 0
    odd = processors.TemplateProcessing(
        single=["<|end|>", "<|begin|>", "$A"], special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    original.post_processor = odd
    original.save(str(source / "tokenizer.json"))
    with pytest.warns(FormatWarning, match="around a text"):
        jq.export_pretrained(source, tmp_path / "c.gguf", format="gguf")


def test_a_converted_directory_is_exported_as_its_source_is(tmp_path):
    saved, source = tmp_path / "saved", tmp_path / "source"
    shutil.copytree(GOLDEN / "gptq-4b-dynamic-llama", source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    jq.save_pretrained(jq.from_pretrained(source), saved)
    for path in (source, saved):
        jq.export_pretrained(path, tmp_path / f"{path.name}-out", format="gptq")
    before, after = tmp_path / "source-out", tmp_path / "saved-out"
    tensors = [open_checkpoint(path).tensors for path in (before, after)]
    assert set(tensors[0]) == set(tensors[1])
    for name, tensor in tensors[0].items():
        again = tensors[1][name]
        assert (tensor.dtype, tensor.read().tobytes()) == (again.dtype, again.read().tobytes())
    configs = [json.loads((path / "config.json").read_text()) for path in (before, after)]
    assert configs[1] == configs[0] | {"eos_token_id": [2, 7]}
    assert open_source(before).config == open_source(after).config
    with pytest.raises(ConfigError, match="converted already"):
        jq.export_pretrained(saved, tmp_path / "x", format="gptq", names={"a": "b"})
    layouts = saved / "layouts.json"
    layouts.write_text(json.dumps({**json.loads(layouts.read_text()), "published": None}))
    with pytest.raises(FormatError, match="convert the checkpoint again"):
        jq.export_pretrained(saved, tmp_path / "x", format="gptq")
    assert not (tmp_path / "x").exists()


def cached(folder, source, **scales):
    """A copy of a golden folder with scales of a key-value cache."""
    checkpoint = open_checkpoint(GOLDEN / source)
    arrays = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    for layer in range(2):
        for part, value in scales.items():
            arrays[f"model.layers.{layer}.self_attn.{part}_scale"] = np.float32(value) * (layer + 1)
    return write_checkpoint(folder, arrays, dict(checkpoint.config))


@pytest.mark.parametrize("shape,strategy", [((), "tensor"), ((2, 1, 1), "attn_head")])
def test_cache_scales_are_kept_where_the_format_has_them(tmp_path, shape, strategy):
    value = np.full(shape, 0.25, np.float32)
    source = cached(tmp_path / "source", "ct-mixed-fp8attn-w4mlp-llama", k=value, v=2 * value)
    jq.export_pretrained(source, tmp_path / "out", format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == strategy
    before, after = open_source(source), open_source(tmp_path / "out")
    names = [name for name in before.arrays if name.endswith("_scale")]
    assert len(names) == 4
    for name in names:
        np.testing.assert_array_equal(before.arrays[name].load(), after.arrays[name].load())


def test_cache_scales_without_a_place_are_left_out_with_a_warning(tmp_path):
    source = cached(tmp_path / "source", "gptq-4b-dynamic-llama", k=0.25, v=0.5)
    with pytest.warns(FormatWarning, match="4 scales of the key-value cache"):
        jq.export_pretrained(source, tmp_path / "out", format="gptq")
    assert not [name for name in open_source(tmp_path / "out").arrays if name.endswith("_scale")]


REFUSED = [
    # source, format, scheme, what the message must have in: where, found, rule, action
    ("fp8block-dsstyle-dsv3", "gptq", None, r"mlp\.\w+_proj: e4m3", "e4m3 codes", "2, 3, 4 or 8"),
    ("fp8block-dsstyle-dsv3", "awq", None, "scale 128x128", "and 39 more", "4-bit integers"),
    ("awq-g64-gemm-llama-s", "fp8", None, "uint4.*zero point 1x64", "uint4 codes", "e4m3 with"),
    ("bnb-nf4-dq-llama", "compressed-tensors", None, "nf4", "nf4 codes", "integers of 2 to 8"),
    ("ct012-w4a16-actorder-group-llama", "compressed-tensors", None, "", "act-order", "holds"),
    ("ct012-w4a16-actorder-group-llama", "awq", None, "", "act-order", "holds"),
    ("gptq-4b-dynamic-llama", "awq", None, "down_proj: int8", "int8 codes", "4-bit"),
    ("modelopt-w4a8awq-llama", "compressed-tensors", None, "", "pre-scale", "holds"),
    ("ct-w8a8-int8-static-asymact-llama", "gptq", None, "", "activations quantized", "of 16 bits"),
    ("bundled", "gptq", "w4a8_g32", "int4", "int8 dynamic per token", "of 16 bits"),
    ("bundled", "gptq", "w5a16_g32", "int5", "int5 codes", "2, 3, 4 or 8"),
    ("bundled", "compressed-tensors", "nvfp4", "e2m1", "without a calibrated scale", "NVFP4"),
    ("bundled", "fp8", "fp8a16", "e4m3", "activations of 16 bits", "e4m3 activations"),
]


@pytest.mark.parametrize("source,format,scheme,where,found,rule", REFUSED)
def test_what_a_format_cannot_hold_is_refused(tmp_path, source, format, scheme, where, found, rule):
    path = source_of(Case(source, format), tmp_path)
    with pytest.raises(FormatError) as raised:
        jq.export_pretrained(path, tmp_path / "out", format=format, scheme=scheme)
    error = raised.value
    assert error.where.startswith("model.layers.") and re.search(where, error.where)
    assert found in error.found and rule in error.rule
    assert "--scheme" in error.action and "--format" in error.action
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    "arguments,error,where",
    [
        ({"format": "gptq"}, FormatError, "gptq"),
        ({"format": "marlin"}, ConfigError, "format"),
        ({"format": "gptq", "kind": "Q8_0"}, ConfigError, "kind"),
        ({"format": "gguf", "scheme": "fp8"}, ConfigError, "scheme"),
        ({"format": "gptq", "scheme": "w4a17"}, ConfigError, "scheme"),
        ({"format": "awq", "scheme": "w4a16_g96"}, ConfigError, "model.layers.0."),
    ],
)
def test_bad_arguments_name_what_is_wrong(tmp_path, arguments, error, where):
    with pytest.raises(error) as raised:
        jq.export_pretrained(BUNDLED, tmp_path / "out", **arguments)
    assert raised.value.where.startswith(where)
    assert raised.value.action or raised.value.rule
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
@pytest.mark.parametrize("format", ["gptq", "gguf"])
def test_what_exists_is_never_overwritten(tmp_path, kind, format):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError) as raised:
        jq.export_pretrained(GOLDEN / "gptq-4b-dynamic-llama", out, format=format)
    assert raised.value.where == str(out) and raised.value.action
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, source, config):
        assert list(folder.iterdir()), "weights are written by now"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "_write_config", fail)
    with pytest.raises(OSError, match="No space"):
        export(Case("gptq-4b-dynamic-llama", "gptq"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_awq_has_one_group_size():
    plan = {
        "a.q_proj": Arrangement(same, None, (128,)),
        "a.k_proj": Arrangement(same, None, (128,)),
        "a.v_proj": Arrangement(same, None, (64,)),
    }
    with pytest.raises(FormatError) as raised:
        TARGETS["awq"].describe(plan, [], None)
    assert raised.value.where == "a.v_proj"
    assert "64" in raised.value.found and "a.q_proj has 128" in raised.value.found


def test_awq_names_must_not_contain_one_another():
    """Its list is matched by substring: a router's name would leave out a gate projection."""
    plan = {"model.layers.0.mlp.gate_proj": Arrangement(same, None, (128,))}
    with pytest.raises(FormatError) as raised:
        TARGETS["awq"].describe(plan, ["model.layers.0.mlp.gate"], None)
    assert raised.value.where == "model.layers.0.mlp.gate_proj"
    TARGETS["awq"].describe(plan, ["model.layers.0.mlp.gatekeeper"], None)


PATHS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
    for layer in range(3)
    for expert in range(3)
    for part in ("gate", "up")
] + [f"model.layers.{layer}.mlp.gate" for layer in range(3)]


@pytest.mark.parametrize(
    "chosen",
    [
        lambda path: "up_proj" in path,
        lambda path: "layers.1." in path and "experts" in path,
        lambda path: "experts.1." in path,
        lambda path: path.endswith("layers.2.mlp.experts.0.gate_proj"),
        lambda path: path.endswith("gate"),
    ],
)
def test_patterns_match_their_paths_and_no_others(chosen):
    paths = [path for path in PATHS if chosen(path)]
    others = [path for path in PATHS if not chosen(path)]
    found = patterns(paths, others)
    assert len(found) <= len(paths)
    for path in PATHS:
        assert any(re.match(pattern, path) for pattern in found) == (path in paths), path
    assert not any(re.match(pattern, f"{paths[0]}_more") for pattern in found)


def test_shards_have_an_index_and_read_back(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3), "b": (), "c": (1000,), "d": (2, 2), "e": (0, 4)}
    arrays = {n: rng.normal(size=s).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    calls = []

    def piece(*names):
        entries = tuple(Entry(name, "BF16", shapes[name]) for name in names)
        return Piece(entries, lambda: calls.append(names) or {n: arrays[n] for n in names})

    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path, [piece("a", "b"), piece("c"), piece("d", "e")], limit=40)
    assert calls == [("a", "b"), ("c",), ("d", "e")]
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    read = open_checkpoint(tmp_path).tensors
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        assert read[name].read().tobytes() == array.tobytes()


def test_an_array_that_is_not_as_announced_is_refused(tmp_path):
    pieces = [Piece((Entry("a", "F32", (2,)),), lambda: {"a": np.zeros(3, np.float32)})]
    with pytest.raises(FormatError) as raised:
        write_safetensors(tmp_path, pieces)
    assert raised.value.where == "a" and "[3]" in raised.value.found


def test_the_command_line_knows_every_format():
    assert set(cli.EXPORTS) == {*TARGETS, "gguf"}


def test_a_plan_becomes_groups(tmp_path):
    """Experts of several precisions in one checkpoint, for tools that go by targets."""
    schemes = {0: "fp8_tensor", 1: "w4a16_g32", 2: "w4a16_g32", 3: "w8a8"}
    rules = "".join(
        f'    "model.layers.*.mlp.experts.{e}.*": {scheme}\n' for e, scheme in schemes.items()
    )
    plan = tmp_path / "plan.yaml"
    head = f"mixed_precision:\n  base_model_path: {BUNDLED}\n  weight_mapping:\n"
    plan.write_text(head + rules)
    out = tmp_path / "out"
    jq.export_pretrained(BUNDLED, out, format="compressed-tensors", plan=plan)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(targets) == 4 * 4 * 3, "an expert's number is not left open where others differ"
    weights = open_source(out).weights
    for name in ("model.layers.2.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.3.down_proj"):
        q = open_source(BUNDLED).weights[name].load()
        made = requantize(q, schemes[int(name.split(".")[5])])
        np.testing.assert_array_equal(values(weights[name].load()), values(made))
    assert weights["model.layers.0.mlp.experts.4.up_proj"].abstract.layout.dense
