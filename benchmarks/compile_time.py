"""Compile time of a deep mixture of experts in mixed formats: layers repeated, and under one scan.

Usage: python benchmarks/compile_time.py [--layers 94] [--json FILE]

The model has the shapes of Qwen3-235B-A22B and no weights: every leaf is abstract.  Its experts'
projections are FP8 in blocks, int4 as GPTQ has it and int4 with zero points as AWQ has it, mixed
in every layer; attention is FP8.  Each form is traced, lowered and compiled for this machine's
default device in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
}
FORMATS = ("fp8_b128", "w4a16_g128", "w4a16_g128_asym")
TOKENS = 128


def abstract_model(layers: int):
    """The model with ``layers`` layers and abstract weights."""
    import functools

    import jax
    import jax.numpy as jnp

    import jaxquant as jq
    from jaxquant.models import ModelConfig, build_model, required_tensors

    config = ModelConfig.from_hf({**CONFIG, "num_hidden_layers": layers})
    shapes, arrays = required_tensors(config)

    @functools.cache
    def weight(shape: tuple[int, int], scheme: str):
        dense = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        return jax.eval_shape(lambda w: jq.quantize(w, scheme, ("out", "in")), dense)

    def scheme(path: str) -> str:
        if ".experts." in path:
            expert = int(path.split(".")[5])
            # down_proj is of another format than the rest of its expert.
            return FORMATS[(expert + path.endswith("down_proj")) % len(FORMATS)]
        return "fp8" if "_proj" in path else "bf16"

    weights = {path: weight(shape, scheme(path)) for path, shape in shapes.items()}
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in arrays.items()}
    return build_model(config, weights, structs)


def measure(layers: int, scan: bool, decode: bool) -> dict[str, float]:
    """Seconds of each stage, and the program's size in lines of StableHLO.

    On a machine with other work, ``compile_cpu`` says more than ``compile``: CPU seconds of all
    threads.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxquant.nn.stack import stack_layers

    start = time.perf_counter()
    model = abstract_model(layers)
    if scan:
        model = stack_layers(model)
    graph, state = model.split()

    def forward(state, ids, positions, cache):
        return nnx.merge(graph, state).step(ids, positions, cache, jnp.zeros(1, jnp.int32))

    tokens = jax.ShapeDtypeStruct((1, 1 if decode else TOKENS), np.int32)
    cache = jax.eval_shape(lambda state: nnx.merge(graph, state).empty_cache(1, 2 * TOKENS), state)
    seconds = {"build": time.perf_counter() - start}
    start = time.perf_counter()
    lowered = jax.jit(forward, donate_argnums=3).lower(state, tokens, tokens, cache)
    seconds["trace_and_lower"] = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    seconds["compile"] = time.perf_counter() - start
    seconds["compile_cpu"] = time.process_time() - cpu
    memory = compiled.memory_analysis()
    return {
        **{name: round(value, 2) for name, value in seconds.items()},
        "stablehlo_lines": lowered.as_text().count("\n"),
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1) if memory else 0.0,
    }


def main() -> None:
    """Measure all forms in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--json")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        scan, decode = "scanned" in arguments.form, "decode" in arguments.form
        print(json.dumps(measure(arguments.layers, scan, decode)))
        return
    report = {}
    for form in ("scanned prefill", "scanned decode", "unrolled prefill", "unrolled decode"):
        command = [sys.executable, __file__, "--layers", str(arguments.layers), "--form", form]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        report[form] = json.loads(done.stdout.splitlines()[-1])
        print(f"{form}: {report[form]}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
