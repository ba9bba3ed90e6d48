"""The README tells today's truth: its examples run, its names exist, its commands are real."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.cli import _parser
from jaxquant.demo import VERSIONS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def block_with(marker: str) -> str:
    found = [block for block in BLOCKS if marker in block]
    assert len(found) == 1
    return found[0]


def test_every_name_in_the_examples_exists():
    names = {
        node.attr
        for block in BLOCKS
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "jq"
    }
    assert {"from_pretrained", "quantize_model", "matmul"} <= names
    assert all(hasattr(jq, name) for name in names)


def test_the_users_own_model_is_quantized(capsys):
    scope: dict = {}
    exec(block_with("class Mixer"), scope)
    error = float(capsys.readouterr().out)
    assert 0 < error < 0.2
    assert isinstance(scope["small"].up, jq.Linear)
    assert not isinstance(scope["model"].up, jq.Linear)


def test_our_linear_in_the_users_module():
    from flax import nnx

    scope = {"nnx": nnx, "jq": jq}
    exec(block_with("class Head"), scope)
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    head = scope["Head"](
        {name: jq.quantize(w, "w4a16_g32", ("out", "in")) for name in ("gate", "out")}
    )
    y = nnx.jit(head)(jnp.ones((2, 64)))
    assert y.shape == (2, 64)
    gradient = nnx.grad(lambda m, x: m(x).sum())(head, jnp.ones((2, 64)))
    assert not jax.tree.leaves(gradient), "quantized weights are no parameters"


def test_the_checkpoint_example_runs_on_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
    scope: dict = {}
    exec(block_with("jq.save_pretrained").replace("Qwen3-8B-FP8", str(bundled)), scope)
    assert scope["logits"].shape[:2] == (1, 3) and (tmp_path / "converted").is_dir()
    one = block_with('jq.read_quantized("Llama').replace("Llama-3-8B-GPTQ", str(bundled))
    width = scope["model"].config.hidden_size
    exec(one, scope | {"x": jnp.ones((2, width))})


def test_the_mesh_example_cuts_the_bundled_model(capsys):
    bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
    scope: dict = {}
    exec(block_with("make_mesh").replace("Qwen3-30B-A3B-FP8", str(bundled)), scope)
    assert capsys.readouterr().out.strip()
    bank = scope["model"].model.layers[0].mlp.experts.gate_proj.get_value()
    leaf = bank.parts[0].data[0]
    assert len(leaf.sharding.device_set) == 4 and not leaf.sharding.is_fully_replicated


def test_commands_are_real():
    verbs = set(re.findall(r"^jaxquant (\w+)", TEXT, re.M))
    known = next(a for a in _parser()._actions if a.dest == "verb").choices
    assert verbs and verbs <= set(known)
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in TEXT and re.search(rf"^{target}:", makefile, re.M)


def test_the_demo_table_is_filled_in():
    table = TEXT.split("<!-- demo -->")[1].split("<!-- /demo -->")[0]
    for version in VERSIONS:
        assert f"| {version} |" in table


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
