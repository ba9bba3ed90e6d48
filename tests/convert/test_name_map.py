"""A user's own name map, on names alone and on whole checkpoints."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant.cli import main
from jaxquant.convert.name_map import read_names, rename
from jaxquant.errors import ConfigError, JaxquantError, PlanError

BUNDLED = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
NAMES = ["h.0.q.weight", "h.1.q.weight", "h.1.q.bias", "norm.scale", "table.weight"]
IDS = jnp.arange(8, dtype=jnp.int32)[None]
FOREIGN = (
    (r"model\.layers\.(\d+)\.self_attn\.", r"blocks.\1.attention."),
    (r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.gate_proj", r"blocks.\1.ff.\2.in"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"blocks.\1.norm1.g"),
    (r"model\.embed_tokens\.weight", r"table.weight"),
)
MAP = {
    r"re:blocks\.(\d+)\.attention\.(\w+_(?:proj|norm))": r"model.layers.\1.self_attn.\2",
    "blocks.{}.ff.{}.in": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blocks.{}.norm1.g": "model.layers.{}.input_layernorm.weight",
    "table": "model.embed_tokens",
}


@pytest.mark.parametrize(
    "entries,expected",
    [
        ({"norm.scale": "model.norm.weight"}, {"norm.scale": "model.norm.weight"}),
        ({"h.1.q": "l.1"}, {"h.1.q.weight": "l.1.weight", "h.1.q.bias": "l.1.bias"}),
        ({"h.{}.q.weight": "l.{}"}, {"h.0.q.weight": "l.0", "h.1.q.weight": "l.1"}),
        ({r"re:h\.(\d)\.(q)\.bias": r"\2.\1"}, {"h.1.q.bias": "q.1"}),
        (
            {"h.1.q.weight": "one", r"re:h\.\d\.q.weight": "any"},
            {"h.0.q.weight": "any", "h.1.q.weight": "one"},
        ),
    ],
)
def test_entries(entries, expected):
    assert rename(read_names(entries), NAMES, "x") == expected


@pytest.mark.parametrize(
    "entries,found",
    [
        ({"norm": "n", "h.2.q": "l.2"}, "'h.2.q': matches nothing"),
        ({"re:norm": "n", "re:nor": "m"}, "'re:nor': matches nothing"),
        ({"h.{}.q.weight": "l"}, "h.1.q.weight: becomes l, as h.0.q.weight does"),
        ({"norm.scale": "table.weight"}, "table.weight: becomes table.weight, as norm.scale does"),
        ({"re:norm.*": "a", "re:.*scale": "b"}, "norm.scale: entries disagree"),
    ],
)
def test_entries_that_do_not_fit(entries, found):
    with pytest.raises(PlanError, match=re.escape(found)):
        rename(read_names(entries), NAMES, "x")


@pytest.mark.parametrize(
    "entries",
    [
        *({}, ["a"], {"a": 3}, {"a": ""}, {"": "a"}, {"a" * 513: "a"}, {"re:": "a"}),
        *({"a": "b.{}"}, {"re:(a+)+$": "b"}, {"re:(a": "b"}, {"re:(a)": r"\2"}, {"re:a": r"\0"}),
    ],
)
def test_entries_that_are_none(entries, tmp_path):
    file = tmp_path / "names.yaml"
    file.write_text(yaml.safe_dump(entries))
    with pytest.raises(ConfigError) as error:
        read_names(file)
    assert str(file) in error.value.where


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """The bundled model under names of another program."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(BUNDLED, folder)
    tensors = {}
    # torch-free reading of bfloat16 goes through jax.
    with safe_open(BUNDLED / "model.safetensors", "flax") as file:
        for name in file.keys():  # noqa: SIM118
            new = name
            for pattern, target in FOREIGN:
                new = re.sub(pattern, target, new)
            tensors[new] = np.asarray(file.get_tensor(name))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_checkpoint_with_other_names(foreign, tmp_path, capsys):
    with pytest.raises(PlanError):
        jq.from_pretrained(foreign)
    file = tmp_path / "names.yaml"
    file.write_text(yaml.safe_dump(MAP))
    model = jq.from_pretrained(foreign, names=file, dtype=jnp.float32)
    expected = jq.from_pretrained(BUNDLED, dtype=jnp.float32)(IDS)
    np.testing.assert_array_equal(model(IDS), expected)
    found = jq.read_quantized(foreign, names={k: v for k, v in MAP.items() if "norm1" not in k})
    assert "model.layers.0.mlp.experts.1.gate_proj" in found
    assert main(["explain", str(foreign), "--names", str(file)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(foreign), "--names", str(file), "--json"]) == 0
    shown = {row["name"] for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert {
        "model.layers.0.mlp.experts.1.gate_proj",
        "model.layers.1.input_layernorm.weight",
    } <= shown
    out = tmp_path / "out.gguf"
    assert main(["export", str(foreign), str(out), "--names", str(file), "--format", "gguf"]) == 0
    np.testing.assert_array_equal(jq.from_pretrained(out, dtype=jnp.float32)(IDS), expected)
    assert main(["explain", str(foreign), "--names", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml" in capsys.readouterr().err


def test_an_entry_without_a_tensor(foreign):
    with pytest.raises(PlanError, match=r"'blocks\.\{\}\.norm9': matches nothing") as error:
        jq.from_pretrained(foreign, names=MAP | {"blocks.{}.norm9": "model.layers.{}.n"})
    assert str(foreign) in error.value.where and len(error.value.problems) == 1


def test_two_tensors_of_one_name(foreign):
    clash = MAP | {"blocks.0.attention.q_proj": "model.layers.0.self_attn.k_proj"}
    with pytest.raises(JaxquantError, match="one tensor for each weight"):
        jq.from_pretrained(foreign, names=clash)
