"""Run every kernel on small problems, for compute-sanitizer to watch: see sanitize.sh.

Usage: python benchmarks/sanitize.py [--op NAME] [--tokens 5 64 200] [--seconds 300]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import gather_rows, grouped_matmul_a16, grouped_matmul_dense, prepack, quantize
from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case
from pallas_kernels.bench.cases import CASES
from pallas_kernels.bench.cases_grouped import group_sizes
from pallas_kernels.record import E2M1, E4M3

N, K, EXPERTS = 256, 512, 16
Operands = dict[str, Any]
# Operands of a number of tokens, and what is run on them.
Work = tuple[Callable[[int], Operands], Callable[[Operands], Any]]


def _nvfp4(rows: int) -> Operands:
    keys = jax.random.split(jax.random.key(0), 3)
    scales = jax.random.randint(keys[1], (EXPERTS, N, K // 16), 40, 80, jnp.int32)
    scales = lax.bitcast_convert_type(scales.astype(jnp.uint8), jnp.dtype(E4M3))
    codes = jax.random.bits(keys[0], (EXPERTS, N, K // 2), jnp.uint8)
    factors = jnp.ones((EXPERTS, 1, 1), jnp.float32)
    return {
        "x": jax.random.normal(keys[2], (rows, K), jnp.bfloat16),
        "weight": prepack(codes, (scales, factors), code=E2M1, group=16, factor_block=N),
        "group_sizes": group_sizes(rows // shapes.TOP_K, EXPERTS, 0),
    }


def _dense(rows: int) -> Operands:
    return {
        "x": jnp.ones((rows, K), jnp.bfloat16),
        "w": jnp.ones((EXPERTS, N, K), jnp.bfloat16),
        "group_sizes": group_sizes(rows // shapes.TOP_K, EXPERTS, 0),
    }


def _rows(tokens: int) -> Operands:
    """Rows of tokens for their experts; every eighth row is nobody's."""
    source = jnp.arange(tokens * shapes.TOP_K, dtype=jnp.int32)
    source = jnp.where(source % 8 == 7, -1, source * 5 % tokens)
    return {"x": jnp.ones((tokens, 2 * K), jnp.bfloat16), "source": source}


def _quantize_rows(layout: str, gated: bool, given: Operands) -> Any:
    return quantize(**given, dtype=jnp.float8_e4m3fn, layout=layout, gated=gated)


def _gather(gated: bool, given: Operands) -> jax.Array:
    return gather_rows(given["x"], given["source"], gated=gated)


def _of_experts(make: Callable[[int], Operands]) -> Callable[[int], Operands]:
    return lambda tokens: make(tokens * shapes.TOP_K)


# What the bench has no row for.
MORE: dict[str, Work] = {
    "grouped_nvfp4": (_of_experts(_nvfp4), lambda given: grouped_matmul_a16(**given)),
    "grouped_dense": (_of_experts(_dense), lambda given: grouped_matmul_dense(**given)),
    "gather": (_rows, functools.partial(_gather, False)),
    "gather_gated": (_rows, functools.partial(_gather, True)),
    "quantize_token_gather": (_rows, functools.partial(_quantize_rows, "token", False)),
    "quantize_1x128_gather": (_rows, functools.partial(_quantize_rows, "1x128", True)),
}


def _of_case(case: Case, rows: int) -> Operands:
    return case.operands(rows, N, K, 0)


def _call_case(case: Case, operands: Operands) -> Any:
    return case.call(operands, None)


def works() -> dict[str, Work]:
    """Return name -> operands and call of every kernel."""
    found: dict[str, Work] = {}
    for case in CASES:
        make = functools.partial(_of_case, case)
        make = _of_experts(make) if case.op.startswith("grouped") else make
        found[case.name] = make, functools.partial(_call_case, case)
    return found | MORE


def prepare(work: Work, tokens: int):
    """Return a compiled problem and its operands."""
    make, call = work
    operands = make(tokens)
    return jax.jit(call).lower(operands).compile(), operands


def main() -> None:
    """Run every kernel on every number of tokens, one program each."""
    named = works()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=list(named), action="append")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 64, 200])
    parser.add_argument("--seconds", type=float, default=1e9, help="start no problem after this")
    arguments = parser.parse_args()
    start = time.perf_counter()
    problems = [(name, m) for m in arguments.tokens for name in arguments.op or named]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        programs = pool.map(lambda problem: prepare(named[problem[0]], problem[1]), problems)
        for (name, tokens), (call, operands) in zip(problems, programs, strict=True):
            if time.perf_counter() - start > arguments.seconds:
                print(name, tokens, "no time left", flush=True)
                continue
            jax.block_until_ready(call(operands))
            print(name, tokens, "ran", flush=True)


if __name__ == "__main__":
    main()
