"""A stack of decode matmuls of Llama-3-8B's shapes in one program: kernel time and wall time.

Usage: python benchmarks/gpu_stack.py [--layers 32] [--batch 1 16] [--schemes ...] [--json FILE]

Every scheme runs twice: with seven weights a layer, and "joined", with q, k, v and gate, up as one
weight each, as `prepare_model` has them.  All programs are compiled in parallel, then run one after
the other.  Calls are queued without waiting for each, as in decoding; ``wall / kernels`` says
what launches cost beyond the kernels themselves.
"""

import argparse
import concurrent.futures
import functools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

import jaxquant as jq
from jaxquant.ops.prepared import prepare

HIDDEN, INNER, KV = 4096, 14336, 1024


def shapes(small: bool, joined: bool) -> dict[str, tuple[int, int]]:
    """Output and input features of each matmul in a layer."""
    hidden, inner, kv = (512, 1024, 256) if small else (HIDDEN, INNER, KV)
    outputs = {"q": hidden, "k": kv, "v": kv, "o": hidden, "gate": inner, "up": inner}
    if joined:
        outputs = {"qkv": hidden + 2 * kv, "o": hidden, "gate_up": 2 * inner}
    return {name: (out, hidden) for name, out in outputs.items()} | {"down": (hidden, inner)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key: jax.Array, shape: tuple[int, int], scheme: str):
    """A random weight, quantized and in kernel order."""
    w = jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5
    return prepare(jq.quantize(w, scheme, ("out", "in")))


def weights_of(arguments: argparse.Namespace, scheme: str, joined: bool) -> list[dict]:
    """The weights of all layers."""
    sizes = shapes(arguments.small, joined)
    keys = iter(jax.random.split(jax.random.key(0), 7 * arguments.layers))
    return [
        {name: draw(next(keys), shape, scheme) for name, shape in sizes.items()}
        for _ in range(arguments.layers)
    ]


def layer(x: jax.Array, w: dict) -> jax.Array:
    """The matmuls of a decoder layer, joined by as little else as keeps every result in use."""
    hidden = x.shape[1]
    if "qkv" in w:
        kv = (w["qkv"].extent("out") - hidden) // 2
        q, k, v = jnp.split(jq.matmul(x, w["qkv"]), [hidden, hidden + kv], axis=1)
    else:
        q, k, v = (jq.matmul(x, w[name]) for name in ("q", "k", "v"))
    x = x + jq.matmul(q + jnp.pad(k + v, ((0, 0), (0, hidden - k.shape[1]))), w["o"])
    if "gate_up" in w:
        gate, up = jnp.split(jq.matmul(x, w["gate_up"]), 2, axis=1)
    else:
        gate, up = jq.matmul(x, w["gate"]), jq.matmul(x, w["up"])
    return x + jq.matmul(gate + up, w["down"])


def stack(x: jax.Array, weights: list[dict]) -> jax.Array:
    """All layers, one after the other."""
    for w in weights:
        x = layer(x, w) * 0.5
    return x


def measure(compiled, x: jax.Array, weights: list[dict], programs: int = 10) -> dict:
    """Milliseconds of a program: its kernels by CUPTI, and wall time of queued programs."""
    jax.block_until_ready(compiled(x, weights))
    walls = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([compiled(x, weights) for _ in range(programs)])
        walls.append((time.perf_counter() - start) / programs * 1000)
    _, found = profiler.measure(compiled, aggregate=False)(x, weights)
    kernels = found or []
    spent = Counter()
    for name, milliseconds in kernels:
        spent[name[:60]] += milliseconds
    total = sum(spent.values())
    return {
        "kernels_ms": total,
        "wall_ms": min(walls),
        "wall_over_kernels": min(walls) / total if total else None,
        "launches": len(kernels),
        "spent_ms": dict(spent.most_common(8)),
    }


def main() -> None:
    """Measure every scheme at every batch, weights apart and joined."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--schemes", nargs="+", default=["w4a16_g128", "fp8"])
    parser.add_argument("--small", action="store_true", help="a size for trying the script out")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    kinds = [(scheme, joined) for scheme in arguments.schemes for joined in (False, True)]
    programs: dict[tuple, Any] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for scheme, joined in kinds:
            draws = functools.partial(weights_of, arguments, scheme, joined)
            weights, hidden = jax.eval_shape(draws), shapes(arguments.small, joined)["o"][0]
            for batch in arguments.batch:
                x = jax.ShapeDtypeStruct((batch, hidden), jnp.bfloat16)
                lowered = jax.jit(stack).lower(x, weights)
                programs[scheme, joined, batch] = pool.submit(lowered.compile)
    report = []
    for scheme, joined in kinds:
        weights = weights_of(arguments, scheme, joined)
        for batch in arguments.batch:
            compiled = programs[scheme, joined, batch].result()
            x = jnp.ones((batch, shapes(arguments.small, joined)["o"][0]), jnp.bfloat16)
            row = {"scheme": scheme, "joined": joined, "batch": batch}
            row |= measure(compiled, x, weights)
            print(json.dumps(row), flush=True)
            report.append(row)
        del weights
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
