"""The mixed-precision plan: resolution, strictness, hostile YAML."""

import json
import subprocess
import sys
from pathlib import Path

from jaxquant.convert.plan_file import read_plan, resolve, target_names

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")),
    )
]


def plan_of(
    tmp_path, mapping, sources="base_model_path: base\n  fp8_path: eight\n  gptq_int4_path: four"
):
    lines = "\n".join(f'    "{k}": "{v}"' for k, v in mapping.items())
    text = f"mixed_precision:\n  {sources}\n  weight_mapping:\n{lines}\n"
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return read_plan(file)


def test_the_most_specific_key_wins(tmp_path):
    mapping = {
        "model.layers.*.mlp.experts.*": "fp8",
        "model.layers.0.mlp.experts.*": "gptq_int4",
        "model.layers.0.mlp.experts.2.w2_weight": "w4a16_g32",
        "re:model.layers.1.self_attn.[qk]_proj.weight": "fp8",
    }
    chosen, problems = resolve(plan_of(tmp_path, mapping), MODULES)
    assert not problems
    assert chosen["model.layers.1.mlp.experts.0.up_proj"] == "fp8"
    assert chosen["model.layers.0.mlp.experts.0.up_proj"] == "gptq_int4"
    assert chosen["model.layers.0.mlp.experts.2.down_proj"] == "w4a16_g32"
    assert chosen["model.layers.0.mlp.experts.2.gate_proj"] == "gptq_int4"
    assert chosen["model.layers.1.self_attn.k_proj"] == "fp8"
    assert chosen["model.layers.0.self_attn.q_proj"] == "base"
    assert set(chosen) == set(MODULES)


def test_w13_means_gate_and_up():
    assert target_names("a.experts.3.gate_proj") == (
        "a.experts.3.gate_proj.weight",
        "a.experts.3.w13_weight",
    )
    assert target_names("a.experts.3.w3")[1] == "a.experts.3.w13_weight"
    assert target_names("a.experts.3.w2")[1] == "a.experts.3.w2_weight"
    assert target_names("a.q_proj") == ("a.q_proj.weight",)


def test_keys_may_use_the_names_of_the_familys_checkpoints(tmp_path):
    modules = [name for name in MODULES if "experts" in name]
    mapping = {
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": "fp8",
        "model.layers.0.block_sparse_moe.experts.1.w13_weight": "fp8",
        "model.layers.*.block_sparse_moe.experts.3.w2.weight": "gptq_int4",
        "model.layers.1.mlp.experts.2.w2_weight": "fp8",
        "model.layers.1.block_sparse_moe.experts.9.w2_weight": "fp8",
    }
    chosen, problems = resolve(plan_of(tmp_path, mapping), modules, "mixtral")
    assert {name for name, precision in chosen.items() if precision != "base"} == {
        "model.layers.0.mlp.experts.0.gate_proj",
        "model.layers.0.mlp.experts.1.gate_proj",
        "model.layers.0.mlp.experts.1.up_proj",
        "model.layers.0.mlp.experts.3.down_proj",
        "model.layers.1.mlp.experts.3.down_proj",
        "model.layers.1.mlp.experts.2.down_proj",
    }
    assert len(problems) == 1 and "no expert 9" in problems[0]
    # Another family's checkpoints have no such names.
    assert len(resolve(plan_of(tmp_path, mapping), modules, "qwen3_moe")[1]) == 4


def test_all_problems_come_together(tmp_path):
    mapping = {
        "model.layers.0.mlp.experts.9.w2_weight": "fp8",
        "model.layers.7.self_attn.q_proj.weight": "fp8",
        "model.layers.0.self_attn.?_proj.weight": "fp8",
        "model.layers.0.self_attn.q*proj.weight": "gptq_int4",
    }
    _, problems = resolve(plan_of(tmp_path, mapping), MODULES)
    text = "\n".join(problems)
    assert "no expert 9" in text and "0 to 3" in text
    assert "layers.7" in text and "matches no weight" in text
    assert "equally specific" in text and len(problems) == 3


def test_a_plan_for_235b_is_resolved_and_validated_quickly():
    """The script's figures in a process of its own, by its own CPU time on a shared machine."""
    script = Path(__file__).parents[2] / "benchmarks" / "plan_235b.py"
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["weights"] == 94 * (4 + 1 + 3 * 128) + 1 and found["keys"] > 94 * 128
    assert found["mapped"] == 94 * (4 + 3 * 128)
    assert found["cpu_s"] < 10 and found["peak_gib"] < 2


def test_globs_match_whatever_they_end_with(tmp_path):
    mapping = {
        "*up_proj.weigh?": "fp8",
        "*.experts.[0-1].w2_weight": "gptq_int4",
        "re:.*[qk]_proj.weight": "fp8",
        "*o_proj*": "fp8",
    }
    chosen, problems = resolve(plan_of(tmp_path, mapping), MODULES)
    assert not problems
    expected = {"up": {0, 1, 2, 3}, "down": {0, 1}, "gate": set()}
    for projection, experts in expected.items():
        for e in range(4):
            mapped = chosen[f"model.layers.1.mlp.experts.{e}.{projection}_proj"] != "base"
            assert mapped == (e in experts)
    attention = [chosen[f"model.layers.0.self_attn.{p}_proj"] for p in "qkvo"]
    assert attention == ["fp8", "fp8", "base", "fp8"]
