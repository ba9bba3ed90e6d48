"""How far bfloat16 paths drift from float32 through the layers of a random Llama-3-8B-shaped model.

Usage: python benchmarks/gpu_drift.py [--layers 16] [--schemes fp8 w4a16_g128] [--json FILE]

Each row gives the relative distance of hidden states after 1, 2, 4 ... layers.  ``float32`` keeps
everything but the quantized codes in float32; ``nudged`` is ``float32`` with embeddings off by
2^-12, which says how much of a distance any rounding at all would cause.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import jaxquant as jq
from jaxquant.models import build_model
from jaxquant.nn.attention import Step

TOKENS, VOCAB = 32, 1024


def config_of(layers: int, small: bool) -> jq.ModelConfig:
    """The model's configuration."""
    sizes = (512, 1024, 8, 4) if small else (4096, 14336, 32, 8)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return jq.ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": layers,
            "vocab_size": VOCAB,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            **dict(zip(names, sizes, strict=True)),
        }
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key: jax.Array, shape: tuple[int, int], scheme: str):
    """A random quantized weight."""
    w = jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5
    return jq.quantize(w, scheme, ("out", "in"))


def parts(config: jq.ModelConfig, scheme: str) -> tuple[dict, dict]:
    """Weights and plain arrays of the model, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys_values = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys_values, hidden),
        "self_attn.v_proj": (keys_values, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config.num_layers)
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) * len(layers) + 2))
    ones = jnp.ones(hidden, jnp.bfloat16)
    weights = {"lm_head": draw(next(keys), (VOCAB, hidden), "bf16")}
    embeddings = jax.random.normal(next(keys), (VOCAB, hidden), jnp.bfloat16)
    arrays = {"model.embed_tokens.weight": embeddings, "model.norm.weight": ones}
    for n in layers:
        for name, shape in shapes.items():
            weights[f"model.layers.{n}.{name}"] = draw(next(keys), shape, scheme)
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{n}.{name}.weight"] = ones
    return weights, arrays


@functools.partial(jax.jit, static_argnums=(0, 3))
def run_layer(graph, state, x, backend, step):
    """One decoder layer, compiled once for all of them."""
    with jq.backend(backend):
        return nnx.merge(graph, state)(x, step, None)[0]


def hidden_states(model, config: jq.ModelConfig, backend: str, dtype) -> dict[int, jax.Array]:
    """Hidden states after every power of two of layers, in float32."""
    ids = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    x = model.model.embed_tokens(ids).astype(dtype)
    step = Step.at(config.rope, ids)
    states = {}
    for n, layer in enumerate(model.model.layers, 1):
        x = run_layer(*nnx.split(layer), x, backend, step)
        if n & (n - 1) == 0:
            states[n] = x.astype(jnp.float32)
    return states


def distances(scheme: str, config: jq.ModelConfig) -> dict[str, dict[int, float]]:
    """Relative distances between the paths, by number of layers."""
    weights, arrays = parts(config, scheme)
    name = "model.embed_tokens.weight"
    noise = 1 + 2**-12 * jax.random.normal(jax.random.key(5), arrays[name].shape)
    nudged = {**arrays, name: arrays[name].astype(jnp.float32) * noise}
    bare = {key: dataclasses.replace(weight, act=None) for key, weight in weights.items()}

    def run(weights, arrays, backend, dtype):
        model = build_model(config, weights, arrays, dtype=dtype)
        model = jq.prepare_model(model) if backend == "auto" else model
        return hidden_states(model, config, backend, dtype)

    states = {
        "kernels": run(weights, arrays, "auto", jnp.bfloat16),
        "xla": run(weights, arrays, "xla", jnp.bfloat16),
        "float32": run(weights, arrays, "xla", jnp.float32),
        "nudged": run(weights, nudged, "xla", jnp.float32),
        "unquantized activations": run(bare, arrays, "xla", jnp.float32),
    }
    pairs = [("kernels", "xla"), *((a, "float32") for a in ("kernels", "xla", "nudged"))]
    pairs += [(a, "unquantized activations") for a in ("kernels", "xla", "float32")]
    return {
        f"{a} - {b}": {
            n: float(jnp.linalg.norm(states[a][n] - y) / jnp.linalg.norm(y))
            for n, y in states[b].items()
        }
        for a, b in pairs
    }


def main() -> None:
    """Measure every scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--schemes", nargs="+", default=["fp8", "w4a16_g128"])
    parser.add_argument("--small", action="store_true", help="a size for trying the script out")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    config = config_of(arguments.layers, arguments.small)
    report = {}
    for scheme in arguments.schemes:
        report[scheme] = distances(scheme, config)
        for pair, drift in report[scheme].items():
            print(scheme, pair, *(f"{n}: {value:.4f}" for n, value in drift.items()), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
