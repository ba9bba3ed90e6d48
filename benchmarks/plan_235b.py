"""Seconds and memory to resolve and validate a plan over the names of Qwen3-235B-A22B, no weights.

Usage: python benchmarks/plan_235b.py

The names come from the model's config.  The plan gives every expert of every layer a key of its own
and the rest patterns; validation builds the abstract model, so that each weight's shape and format,
the banks of experts and what is missing or left over are checked as before loading.
"""

import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.convert.plan_file import BASE, read_plan, resolve
from jaxquant.models import ModelConfig, build_model, required_tensors

sys.path.insert(0, str(Path(__file__).parent))
from compile_time import CONFIG

SCHEMES = {
    "base": "bf16",
    "fp8": "fp8_b128",
    "gptq_int4": "w4a16_g128",
    "awq_int4": "w4a16_g128_asym",
}


def plan_text(layers: int, experts: int) -> str:
    """A key for each expert's w13, patterns for w2 and attention."""
    names = ("fp8", "gptq_int4", "awq_int4")
    lines = [f"  {name}_path: {name}" for name in names] + ["  base_model_path: base"]
    lines.append("  weight_mapping:")
    lines.append('    "model.layers.*.self_attn.?_proj.weight": "fp8"')
    for expert in range(experts):
        lines.append(f'    "model.layers.*.mlp.experts.{expert}.w2_weight": "{names[expert % 3]}"')
        for layer in range(layers):
            key = f"model.layers.{layer}.mlp.experts.{expert}.w13_weight"
            lines.append(f'    "{key}": "{names[(expert + 1) % 3]}"')
    return "mixed_precision:\n" + "\n".join(lines) + "\n"


def peak_kib() -> int:
    """Peak resident memory of this program; getrusage would count the process that started it."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1])


def main() -> None:
    """Print one JSON object."""
    config = ModelConfig.from_hf(CONFIG)
    shapes, arrays = required_tensors(config)
    names = list(SCHEMES)
    described = {
        (shape, name): jax.eval_shape(
            lambda w, scheme=SCHEMES[name]: jq.quantize(w, scheme, ("out", "in")),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        )
        for shape in set(shapes.values())
        for name in names
    }
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.yaml"
        file.write_text(plan_text(config.num_layers, CONFIG["num_experts"]))
        times = [time.perf_counter()]
        cpu = time.process_time()
        plan = read_plan(file)
        times.append(time.perf_counter())
        chosen, problems = resolve(plan, shapes)
        times.append(time.perf_counter())
        assert not problems, problems[:3]
        weights = {path: described[shapes[path], name] for path, name in chosen.items()}
        build_model(config, weights, structs)
        times.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(times)]
    print(
        json.dumps(
            {
                "weights": len(shapes),
                "keys": len(plan.mapping),
                "mapped": sum(name != BASE for name in chosen.values()),
                **dict(zip(("read_s", "resolve_s", "validate_s"), seconds, strict=True)),
                "total_s": times[-1] - times[0],
                "cpu_s": time.process_time() - cpu,
                "peak_gib": peak_kib() / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
