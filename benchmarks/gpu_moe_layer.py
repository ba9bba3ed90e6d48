"""A whole MoE layer on a GPU, router to weighted sum: uniform formats and a mixed one.

Usage: python benchmarks/gpu_moe_layer.py [--tokens 16 1024 4096] [--formats ...] [--json FILE]

The layer has the shapes of Qwen3-235B-A22B: 128 experts of 4096 -> 2 x 1536 -> 4096, 8 for a token.
A third of a mixed layer's experts has each of its formats.  Weights are random bits, held as
`prepare_model` holds them.  Kernel times come from CUPTI, wall times from programs in a queue.
"""

import argparse
import concurrent.futures
import itertools
import json
from collections.abc import Callable
from pathlib import Path

HIDDEN, INNER, EXPERTS, TOP_K = 4096, 1536, 128, 8
SCHEMES = {"fp8": "fp8_b128", "gptq": "w4a16_g128", "awq": "w4a16_g128_asym", "bf16": "bf16"}
MIXED = {"mixed": ("fp8", "gptq", "awq"), "mixed-bf16": ("fp8", "gptq", "bf16")}
FORMATS = (*SCHEMES, *MIXED)


def random_stack(scheme: str, shape: tuple[int, int], count: int, seed: int):
    """A stack of weights of a scheme, with random codes and scales of like size."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxquant as jq

    one = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    layout = jax.eval_shape(lambda w: jq.quantize(w, scheme, ("out", "in")), one)

    @jax.jit
    def make(key):
        leaves, structure = jax.tree.flatten(layout)
        filled = []
        for leaf, own in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            full = (count, *leaf.shape)
            if leaf.dtype == jnp.float8_e4m3fn:  # up to 1.875: no NaN
                bits = jax.random.bits(own, full, jnp.uint8) & 0xBF
                filled.append(lax.bitcast_convert_type(bits, leaf.dtype))
            elif leaf.dtype == jnp.uint8:
                # Zero points have a byte each, codes share one: both are valid up to 15.
                most = 0xFF if leaf.shape[0] == shape[0] and leaf.shape[1] * 2 == shape[1] else 15
                filled.append(jax.random.bits(own, full, jnp.uint8) & most)
            else:
                scale = jax.random.uniform(own, full, jnp.float32, 0.5, 2) / 256
                filled.append(scale.astype(leaf.dtype))
        return jax.tree.unflatten(structure, filled)

    return make(jax.random.key(seed))


def make_layer(name: str):
    """The layer in kernel order."""
    import jax
    import jax.numpy as jnp

    from jaxquant.arrays.bank import ExpertBank, ExpertPlan, Run
    from jaxquant.arrays.qtensor import dense
    from jaxquant.nn.moe import Experts, MoE, Router, Routing
    from jaxquant.nn.prepare import prepare_model

    schemes = [SCHEMES[one] for one in MIXED.get(name, (name,))]
    cuts = [EXPERTS * i // len(schemes) for i in range(len(schemes) + 1)]
    runs = tuple(Run(a, b) for a, b in itertools.pairwise(cuts))
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    banks = [
        ExpertBank(
            tuple(
                random_stack(scheme, shape, run.stop - run.start, 10 * seed + run.start)
                for scheme, run in zip(schemes, runs, strict=True)
            ),
            runs,
        )
        for seed, shape in enumerate(shapes)
    ]
    plan = ExpertPlan(tuple(range(EXPERTS)), (runs,) * 3)
    router = jax.random.normal(jax.random.key(1), (EXPERTS, HIDDEN), jnp.bfloat16) / 64
    experts = prepare_model(Experts((banks[0], banks[1], banks[2]), plan, "silu"))
    routing = Routing(EXPERTS, TOP_K, "softmax", normalize=True)
    return MoE(Router(dense(router), routing), experts)


def compiled(name: str, tokens: list[int]) -> dict[int, tuple[Callable, int]]:
    """For each number of tokens the program and its calls; weights are not made for that."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pallas_kernels.bench.timing import program

    graph, state = nnx.split(nnx.eval_shape(lambda: make_layer(name)))

    def compile_one(count: int) -> tuple[Callable, int]:
        # The layer is several times the L2 cache, but not the experts that one token reads.
        calls = 12 if count < 16 else 3
        x = jax.ShapeDtypeStruct((1, count, HIDDEN), jnp.bfloat16)
        run = program(lambda s: nnx.merge(graph, s[0])(s[1]), [(state, x)] * calls, calls)
        return run, calls

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(tokens, pool.map(compile_one, tokens), strict=True))


def measure(name: str, layers: dict[int, tuple[Callable, int]]) -> list[dict]:
    """One row for each number of tokens."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental.mosaic.gpu import profiler

    from pallas_kernels.bench.timing import measure as timed

    state = nnx.split(make_layer(name))[1]
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rows = []
    for count, (layer, calls) in layers.items():
        keys = map(jax.random.key, range(calls))
        xs = [jax.random.normal(key, (1, count, HIDDEN), jnp.bfloat16) for key in keys]
        sets = [(state, x) for x in xs]
        wall = timed(layer, sets, calls).wall
        # The layer and its parts by the same run: the clock falls in long ones.
        _, runs = profiler.measure(layer, aggregate=False, iterations=5)(sets)
        assert runs is not None
        kernels = sorted(runs, key=lambda run: sum(time for _, time in run))[len(runs) // 2]
        times: dict[str, float] = {}
        launches: dict[str, int] = {}
        for kernel, milliseconds in kernels:
            times[kernel] = times.get(kernel, 0.0) + milliseconds * 1e3 / calls
            launches[kernel] = launches.get(kernel, 0) + 1
        grouped = {k: t for k, t in times.items() if "grouped_" in k}
        others = sorted(((t, k) for k, t in times.items() if k not in grouped), reverse=True)
        rows.append(
            {
                "format": name,
                "tokens": count,
                "layer_bytes": nbytes,
                "layer_us": round(sum(times.values()), 2),
                "wall_us": round(wall, 2),
                "grouped_us": round(sum(grouped.values()), 2),
                "launches": sum(launches.values()) // calls,
                "grouped": {k: round(t, 2) for k, t in grouped.items()},
                "others": [[k, round(t, 2), launches[k] // calls] for t, k in others if t > 0.05],
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.formats:
        for row in measure(name, compiled(name, arguments.tokens)):
            rows.append(row)
            layer, grouped = row["layer_us"], row["grouped_us"]
            print(
                f"{name:10} {row['tokens']:5} tokens: layer {layer:8.1f} us (wall "
                f"{row['wall_us']:8.1f}), grouped {grouped:8.1f} us: {layer / grouped:5.2f}x, "
                f"{layer - grouped:+7.1f} us, {row['launches']} launches",
                flush=True,
            )
    for count, (name, parts) in itertools.product(arguments.tokens, MIXED.items()):
        of = {row["format"]: row for row in rows if row["tokens"] == count}
        if {name, *parts} <= set(of):
            # A third of the experts each: the mean of the uniform layers, weighted by their bytes.
            total = sum(of[part]["layer_bytes"] for part in parts)
            mean = sum(of[part]["layer_bytes"] * of[part]["layer_us"] for part in parts) / total
            plain = sum(of[part]["layer_us"] for part in parts) / len(parts)
            mixed = of[name]["layer_us"]
            print(
                f"{name} {count:5} tokens: {mixed / mean:.2f}x the uniform layers' mean weighted "
                f"by bytes, {mixed / plain:.2f}x their plain mean"
            )
    if arguments.json:
        import jax

        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
