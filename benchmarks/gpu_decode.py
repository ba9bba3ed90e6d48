"""Decode rate of a Llama-3-8B-shaped model with random weights on one GPU, kernels against XLA.

Usage: python benchmarks/gpu_decode.py [--layers 32] [--batch 1 16] [--schemes ...]
    [--paths joined separate xla] [--json FILE]

Paths: "joined" is what `prepare_model` makes, "separate" has every weight in kernel order but q, k,
v and gate, up apart, "xla" uses no kernels of ours.  Reports milliseconds per decoded token step
(the whole loop on the device, prefill taken off); ``busy_ms`` and ``launches``, the kernels of one
step by CUPTI, ours and XLA's; and ``error``, the relative distance of the logits from those of the
first path, which it reports but does not judge.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.mosaic.gpu import profiler

import jaxquant as jq
from jaxquant.models import build_model
from jaxquant.ops.prepared import prepare

PROMPT, NEW = 128, 128
PATHS = ["joined", "separate", "xla"]


def config_of(layers: int, small: bool) -> jq.ModelConfig:
    """Llama-3-8B, or a version of it that a CPU can run."""
    return jq.ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 512 if small else 4096,
            "intermediate_size": 1024 if small else 14336,
            "num_hidden_layers": layers,
            "num_attention_heads": 8 if small else 32,
            "num_key_value_heads": 4 if small else 8,
            "vocab_size": 1024 if small else 128256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        }
    )


def random_model(config: jq.ModelConfig, scheme: str) -> jq.CausalLM:
    """Weights drawn and quantized on the device, one at a time."""
    keys = iter(jax.random.split(jax.random.key(0), 16 * config.num_layers + 16))
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def draw(shape: tuple[int, ...], name: str):
        w = jax.random.normal(next(keys), shape, jnp.bfloat16) * shape[1] ** -0.5
        return jax.jit(lambda w: jq.quantize(w, name, ("out", "in")))(w)

    weights = {"lm_head": draw((config.vocab_size, hidden), "bf16")}
    arrays = {
        "model.embed_tokens.weight": jax.random.normal(
            next(keys), (config.vocab_size, hidden), jnp.bfloat16
        ),
        "model.norm.weight": jnp.ones(hidden, jnp.bfloat16),
    }
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        for name, shape in shapes.items():
            weights[f"{prefix}.{name}"] = draw(shape, scheme)
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"{prefix}.{name}.weight"] = jnp.ones(hidden, jnp.bfloat16)
    return build_model(config, weights, arrays, dtype=jnp.bfloat16)


def on_path(model: jq.CausalLM, path: str) -> jq.CausalLM:
    """The model as a path of the command line wants it."""
    if path == "joined":
        return jq.prepare_model(model)
    copy = nnx.clone(model)
    if path == "separate":
        for _, node in list(nnx.iter_graph(copy)):
            if isinstance(node, jq.Linear):
                node.weight.set_value(prepare(node.weight.get_value()))
    return copy


def step_milliseconds(model: jq.CausalLM, batch: int) -> float:
    """Time of one decode step, from the difference of two lengths; median of three."""
    prompts = [[(7 * i + j) % 1000 for j in range(PROMPT)] for i in range(batch)]

    def seconds(new: int) -> float:
        jq.generate(model, prompts, max_new_tokens=new, eos=())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jq.generate(model, prompts, max_new_tokens=new, eos=())
            times.append(time.perf_counter() - start)
        return sorted(times)[1]

    # Both lengths share one bucket, so one compiled program and one prefill.
    return 1000 * (seconds(NEW) - seconds(NEW // 2 + 1)) / (NEW - NEW // 2 - 1)


def kernels_of_step(model: jq.CausalLM, batch: int) -> list[tuple[str, float]]:
    """Names and milliseconds of the kernels of one decode step, by CUPTI; none without a GPU."""
    if jax.default_backend() != "gpu":
        return []
    graph, state = model.split()
    token, position = jnp.ones((batch, 1), jnp.int32), jnp.full((batch, 1), PROMPT, jnp.int32)

    @jax.jit
    def step(state, cache):
        return nnx.merge(graph, state).step(token, position, cache)

    operands = state, model.empty_cache(batch, PROMPT + NEW)
    _, found = profiler.measure(step.lower(*operands).compile(), aggregate=False)(*operands)
    return found or []


def measure(model: jq.CausalLM, batch: int) -> dict:
    """One row of the report."""
    row = {"step_ms": step_milliseconds(model, batch)}
    kernels = kernels_of_step(model, batch)
    row |= {"busy_ms": sum(ms for _, ms in kernels), "launches": len(kernels)}
    return row | {"runs_on": sorted({r.kernel for r in jq.explain(model, batch=batch).rows})}


def main() -> None:
    """Measure every scheme on every path at every batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--schemes", nargs="+", default=["bf16", "fp8", "w8a8", "w4a16_g128"])
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--small", action="store_true", help="a size for trying the script out")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    report = []
    ids = jnp.arange(32, dtype=jnp.int32)[None]
    for scheme in arguments.schemes:
        plain = random_model(config_of(arguments.layers, arguments.small), scheme)
        first = None
        for path in arguments.paths:
            model = on_path(plain, path)
            with jq.backend("xla" if path == "xla" else "auto"):
                logits = model(ids)
                first = logits if first is None else first
                error = float(jnp.linalg.norm(logits - first) / jnp.linalg.norm(first))
                for batch in arguments.batch:
                    row = {"scheme": scheme, "path": path, "batch": batch, "error": error}
                    row |= {"gib": model.nbytes / 2**30, **measure(model, batch)}
                    print(json.dumps(row), flush=True)
                    report.append(row)
            del model
        del plain
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
