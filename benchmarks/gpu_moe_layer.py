"""A whole MoE layer on a GPU, router to weighted sum: uniform formats and a mixed one.

Usage: python benchmarks/gpu_moe_layer.py [--tokens 16 1024 4096] [--formats ...] [--json FILE]

The layer has the shapes of Qwen3-235B-A22B: 128 experts of 4096 -> 2 x 1536 -> 4096, 8 for a token.
A third of the mixed layer's experts has each format.  Weights are random bits, held as
`prepare_model` holds them.  Kernel times come from CUPTI, wall times from programs in a queue.
"""

import argparse
import concurrent.futures
import itertools
import json
from pathlib import Path

HIDDEN, INNER, EXPERTS, TOP_K = 4096, 1536, 128, 8
SCHEMES = {"fp8": "fp8_b128", "gptq": "w4a16_g128", "awq": "w4a16_g128_asym"}
FORMATS = (*SCHEMES, "mixed")


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

    schemes = tuple(SCHEMES.values()) if name == "mixed" else (SCHEMES[name],)
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


def measure(name: str, tokens: list[int]) -> list[dict]:
    """One row for each number of tokens."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental.mosaic.gpu import profiler

    from pallas_kernels.bench.timing import measure as timed
    from pallas_kernels.bench.timing import program

    graph, state = nnx.split(make_layer(name))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # The layer is several times the L2 cache, but not the experts that one token reads.
    sets = {
        count: [
            (state, jax.random.normal(jax.random.key(seed), (1, count, HIDDEN), jnp.bfloat16))
            for seed in range(12 if count < 16 else 3)
        ]
        for count in tokens
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = pool.map(
            lambda s: program(lambda s: nnx.merge(graph, s[0])(s[1]), s, len(s)), sets.values()
        )
        layers = dict(zip(tokens, programs, strict=True))
    rows = []
    for count, layer in layers.items():
        calls = len(sets[count])
        timing = timed(layer, sets[count], calls)
        _, kernels = profiler.measure(layer, aggregate=False)(sets[count])
        times: dict[str, float] = {}
        launches: dict[str, int] = {}
        for kernel, milliseconds in kernels or []:
            times[kernel] = times.get(kernel, 0.0) + milliseconds * 1e3 / calls
            launches[kernel] = launches.get(kernel, 0) + 1
        grouped = {k: t for k, t in times.items() if "grouped_a16" in k or "matmul_a8" in k}
        others = sorted(((t, k) for k, t in times.items() if k not in grouped), reverse=True)
        rows.append(
            {
                "format": name,
                "tokens": count,
                "layer_bytes": nbytes,
                "layer_us": round(timing.kernel, 2),
                "wall_us": round(timing.wall, 2),
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
        for row in measure(name, arguments.tokens):
            rows.append(row)
            layer, grouped = row["layer_us"], row["grouped_us"]
            print(
                f"{name:6} {row['tokens']:5} tokens: layer {layer:8.1f} us (wall "
                f"{row['wall_us']:8.1f}), grouped {grouped:8.1f} us: {layer / grouped:5.2f}x, "
                f"{layer - grouped:+7.1f} us, {row['launches']} launches",
                flush=True,
            )
    for count in arguments.tokens:
        of = {row["format"]: row for row in rows if row["tokens"] == count}
        if len(of) == len(FORMATS):
            # A third of the experts each: the mean of the uniform layers, weighted by their bytes.
            total = sum(of[name]["layer_bytes"] for name in SCHEMES)
            mean = sum(of[n]["layer_bytes"] * of[n]["layer_us"] for n in SCHEMES) / total
            plain = sum(of[n]["layer_us"] for n in SCHEMES) / len(SCHEMES)
            mixed = of["mixed"]["layer_us"]
            print(
                f"mixed  {count:5} tokens: {mixed / mean:.2f}x the uniform layers' mean weighted "
                f"by bytes, {mixed / plain:.2f}x their plain mean"
            )
    if arguments.json:
        import jax

        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
