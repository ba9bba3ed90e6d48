"""The command line as a person uses it: exit codes, one clear line for bad input, real output."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.cli import main
from jaxquant.models import ModelConfig
from tests.convert.writer import write_checkpoint
from tests.small_models import CONFIGS, random_tensors

BUNDLED = str(Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe")


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_help_is_quick_and_lists_the_verbs():
    command = [sys.executable, "-m", "jaxquant", "--help"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    for verb in ("inspect", "convert", "generate", "eval", "explain", "bench", "demo"):
        assert verb in done.stdout
    assert min(times) < 0.5


def test_importing_the_package_does_not_import_jax():
    code = "import jaxquant, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_exists():
    for name in jq.__all__:
        assert getattr(jq, name) is not None
    assert len(jq.__all__) <= 40
    assert callable(jq.generate) and callable(jq.explain)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jq.nonsense


def test_functions_win_over_modules_whatever_is_imported_first():
    code = (
        "from jaxquant.generation import generate as g; from jaxquant.explanation import explain;"
        "import jaxquant as jq; assert jq.generate is g and jq.explain is explain"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_as_table_and_json(capsys):
    assert run("inspect", BUNDLED) == 0
    text = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in text and "bf16[out,in]" in text
    assert "bits per weight" in text
    assert run("inspect", BUNDLED, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    names = {t["name"] for t in report["tensors"]}
    assert "model.embed_tokens.weight" in names and "model.norm.weight" in names
    size = Path(BUNDLED, "model.safetensors").stat().st_size
    assert 0.97 * size < sum(t["nbytes"] for t in report["tensors"]) < size


def test_convert_then_generate_and_eval(tmp_path, capsys):
    out = tmp_path / "converted"
    assert run("convert", BUNDLED, str(out), "--scheme", "w4a16_g32", "--dtype", "float32") == 0
    assert "MiB" in capsys.readouterr().out
    assert run("generate", str(out), "--prompt", "It was the", "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out.startswith("It was the")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The sea"}\n\n{"prompt": "A man of"}\n')
    arguments = ("--prompts", str(prompts), "--max-new-tokens", "3", "--temperature", "1.0")
    assert run("generate", str(out), *arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["The sea", "A man of"]
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.load(Path(BUNDLED, "eval_tokens.npy"))[:1024])
    assert run("eval", str(out), "--tokens", str(tokens)) == 0
    quantized = float(capsys.readouterr().out.split()[-1])
    assert run("eval", BUNDLED, "--tokens", str(tokens), "--dtype", "float32") == 0
    base = float(capsys.readouterr().out.split()[-1])
    assert 1.0 < quantized / base < 1.15
    assert run("explain", str(out), "--batch", "4") == 0
    assert "int4" in capsys.readouterr().out
    assert run("convert", BUNDLED, str(out)) == 2, "nothing is overwritten"


def test_export_writes_a_file_that_reads_back_the_same(tmp_path, capsys):
    out = tmp_path / "tiny.gguf"
    assert run("export", BUNDLED, str(out), "--format", "gguf") == 0
    assert "MiB" in capsys.readouterr().out
    again = jq.from_pretrained(out, dtype=jnp.float32)
    ids = jnp.arange(10, dtype=jnp.int32)[None]
    expected = jq.from_pretrained(BUNDLED, dtype=jnp.float32)(ids)
    np.testing.assert_allclose(again(ids), expected, rtol=1e-5, atol=1e-5)
    small = tmp_path / "small.gguf"
    assert run("export", BUNDLED, str(small), "--format", "gguf", "--kind", "Q8_0") == 0
    assert small.stat().st_size < 0.7 * out.stat().st_size
    assert run("export", BUNDLED, str(out), "--format", "gguf") == 2, "nothing is overwritten"
    assert run("export", BUNDLED, str(tmp_path / "x"), "--format", "gguf", "--kind", "Q9") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.gguf", "tiny.gguf"]


def test_convert_leaves_routers_as_they_are(tmp_path, capsys):
    tensors = random_tensors(ModelConfig.from_hf(CONFIGS["qwen2-moe"]))
    source = write_checkpoint(tmp_path / "source", tensors, CONFIGS["qwen2-moe"])
    assert run("convert", str(source), str(tmp_path / "out"), "--scheme", "fp8") == 0
    loaded, written = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert loaded.startswith("loaded ") and "MiB, layers quantized to fp8" in written
    assert run("inspect", str(tmp_path / "out"), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["tensors"]
    formats = {row["name"]: row["format"] for row in rows}
    assert "e4m3" in formats["model.layers.0.mlp.shared_expert.up_proj"]
    for name in ("gate", "shared_expert_gate"):
        assert "e4m3" not in formats[f"model.layers.0.mlp.{name}"]


def test_bench_prints_rates(capsys):
    arguments = ("--batch", "2", "--prompt-tokens", "16", "--new-tokens", "4")
    assert run("bench", BUNDLED, *arguments) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["--tokens", "--text", "--prompts"])
def test_files_of_another_kind(verb, tmp_path, capsys):
    files = {"--tokens": ["empty", "archive"]}.get(verb, ["bytes"])
    np.savez(tmp_path / "archive.npz", np.arange(4))
    (tmp_path / "archive.npz").rename(tmp_path / "archive")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").touch()
    for name in files:
        found = run(
            "generate" if verb == "--prompts" else "eval", BUNDLED, verb, f"{tmp_path / name}"
        )
        error = capsys.readouterr().err
        assert found == 2 and error.startswith(f"jaxquant: error: {tmp_path / name}: ")


@pytest.mark.parametrize(
    "arguments,found",
    [
        (("inspect", "/nowhere"), "/nowhere"),
        (("generate", "/nowhere", "--prompt", "x"), "no such directory"),
        (("generate", BUNDLED, "--prompts", "/nowhere.jsonl"), "No such file"),
        (("generate", BUNDLED, "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("generate", BUNDLED, "--prompt", "x", "--dtype", "int8"), "--dtype"),
        (("convert", BUNDLED, "OUT", "--scheme", "w4a17"), "w4a17"),
        (("convert", BUNDLED, "OUT", "--plan", "/nowhere.yaml"), "No such file"),
        (("eval", BUNDLED, "--tokens", __file__), "NumPy"),
        (("eval", BUNDLED, "--text", "/nowhere.txt"), "No such file"),
        (
            (
                "eval",
                BUNDLED,
                "--tokens",
                os.path.join(BUNDLED, "eval_tokens.npy"),
                "--window",
                "1",
            ),
            "2",
        ),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(arguments, found, capsys, tmp_path):
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jaxquant: error: ") and found in captured.err
    assert len(captured.err.strip().splitlines()) == 1 and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tokens,options,found",
    [
        (np.zeros(8, np.int32), ("--window", "16"), "8 tokens for windows of 16"),
        (np.zeros(8, np.int32), ("--window", "1"), "window"),
        (np.zeros(8, np.float32), (), "token ids are integers"),
        (None, (), "No such file"),
    ],
)
def test_what_eval_reads_is_checked_before_the_model(
    tokens, options, found, tmp_path, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("jaxquant.from_pretrained", load)
    file, verb = tmp_path / "tokens.npy", "--text" if tokens is None else "--tokens"
    if tokens is not None:
        np.save(file, tokens)
    assert run("eval", BUNDLED, verb, str(file), *options) == 2
    assert found in capsys.readouterr().err


def test_prompt_files_name_the_line(tmp_path, capsys):
    for text in ("not json", '{"text": 1}', "[1]"):
        file = tmp_path / "p.jsonl"
        file.write_text('{"prompt": "fine"}\n' + text + "\n")
        assert run("generate", BUNDLED, "--prompts", str(file)) == 2
        assert "p.jsonl:2" in capsys.readouterr().err


def test_unknown_verbs_are_usage_errors():
    with pytest.raises(SystemExit) as caught:
        run("dance")
    assert caught.value.code == 2


def test_demo_writes_table_and_plot(tmp_path, monkeypatch, capsys):
    import jaxquant.demo as demo

    monkeypatch.setattr(demo, "VERSIONS", {"bf16": {}, "mixed": demo.VERSIONS["mixed"]})
    assert run("demo", "--out", str(tmp_path / "demo")) == 0
    results = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [r["version"] for r in results] == ["bf16", "mixed"]
    assert results[1]["bytes"] < 0.6 * results[0]["bytes"]
    assert 1.0 < results[1]["perplexity"] / results[0]["perplexity"] < 1.05
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 5000
    assert "| bf16 |" in (tmp_path / "demo" / "demo.md").read_text()
