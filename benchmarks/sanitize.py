"""Run every kernel on small problems, for compute-sanitizer to watch: see sanitize.sh.

Usage: python benchmarks/sanitize.py [--op NAME] [--tokens 5 64 200] [--seconds 300]
"""

import argparse
import concurrent.futures
import os
import time

import jax

from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case
from pallas_kernels.bench.cases import CASES

N, K = 256, 512


def prepare(case: Case, tokens: int):
    """Return a compiled problem and its operands."""
    m = tokens * shapes.TOP_K if case.op.startswith("grouped") else tokens
    operands = case.operands(m, N, K, 0)
    return jax.jit(lambda operands: case.call(operands, None)).lower(operands).compile(), operands


def main() -> None:
    """Run the ops of the bench, one program each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 64, 200])
    parser.add_argument("--seconds", type=float, default=1e9, help="start no problem after this")
    arguments = parser.parse_args()
    start = time.perf_counter()
    problems = [
        (case, tokens)
        for tokens in arguments.tokens
        for case in CASES
        if not arguments.op or case.name in arguments.op
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        programs = pool.map(lambda problem: prepare(*problem), problems)
        for (case, tokens), (call, operands) in zip(problems, programs, strict=True):
            name = f"{case.name} {tokens}"
            if time.perf_counter() - start > arguments.seconds:
                print(name, "no time left", flush=True)
                continue
            jax.block_until_ready(call(operands))
            print(name, "ran", flush=True)


if __name__ == "__main__":
    main()
