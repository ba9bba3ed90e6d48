"""A stack of decode matmuls of Llama-3-8B's shapes in one program: kernel time and wall time.

Usage: python benchmarks/gpu_stack.py [--layers 32] [--batch 1 16] [--schemes ...] [--json FILE]

Programs are queued without waiting for each, as a decode loop does; ``wall / kernels`` says what
launches cost beyond the kernels themselves.
"""

import argparse
import functools
import json
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

import jaxquant as jq
from jaxquant.ops.prepared import prepare

HIDDEN, INNER, KV = 4096, 14336, 1024


def shapes(small: bool) -> dict[str, tuple[int, int]]:
    """Output and input features of each matmul in a layer."""
    hidden, inner, kv = (512, 1024, 256) if small else (HIDDEN, INNER, KV)
    return {
        "q": (hidden, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key: jax.Array, shape: tuple[int, int], scheme: str):
    """A random weight, quantized and in kernel order."""
    w = jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5
    return prepare(jq.quantize(w, scheme, ("out", "in")))


def layer(x: jax.Array, w: dict) -> jax.Array:
    """The matmuls of a decoder layer, joined by as little else as keeps every result in use."""
    q, k, v = (jq.matmul(x, w[name]) for name in ("q", "k", "v"))
    pad = ((0, 0), (0, q.shape[1] - k.shape[1]))
    x = x + jq.matmul(q + jnp.pad(k + v, pad), w["o"])
    return x + jq.matmul(jq.matmul(x, w["gate"]) + jq.matmul(x, w["up"]), w["down"])


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
    """Measure every scheme at every batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--schemes", nargs="+", default=["w4a16_g128", "fp8"])
    parser.add_argument("--small", action="store_true", help="a size for trying the script out")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    report = []
    for scheme in arguments.schemes:
        keys = iter(jax.random.split(jax.random.key(0), 7 * arguments.layers))
        weights = [
            {
                name: draw(next(keys), shape, scheme)
                for name, shape in shapes(arguments.small).items()
            }
            for _ in range(arguments.layers)
        ]
        for batch in arguments.batch:
            x = jnp.ones((batch, shapes(arguments.small)["q"][1]), jnp.bfloat16)
            compiled = jax.jit(stack).lower(x, weights).compile()
            row = {"scheme": scheme, "batch": batch, **measure(compiled, x, weights)}
            print(json.dumps(row), flush=True)
            report.append(row)
        del weights
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
