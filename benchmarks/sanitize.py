"""Run every kernel on small problems, for compute-sanitizer to watch: see sanitize.sh.

Usage: python -m benchmarks.sanitize [--op NAME] [--tokens 5 64 200] [--seconds 300] [--shard 0 5]
       python -m benchmarks.sanitize --fault memcheck
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import time

import jax

from benchmarks.sanitize_faults import FAULTS
from benchmarks.sanitize_problems import Work, works


def prepare(work: Work, tokens: int):
    """Return a compiled problem and its operands."""
    make, call = work
    operands = jax.jit(make, static_argnums=0)(tokens)
    return jax.jit(call).lower(operands).compile(), operands


def main() -> None:
    """Run a share of all kernels on every number of tokens, one program each."""
    named = works()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=list(named), action="append")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 200, 64])
    parser.add_argument("--seconds", type=float, default=1e9, help="start no problem after this")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "OF"))
    parser.add_argument("--fault", choices=FAULTS, help="run only a kernel that is wrong")
    arguments = parser.parse_args()
    if arguments.fault:
        jax.block_until_ready(jax.jit(FAULTS[arguments.fault])())
        return
    start = time.perf_counter()
    shard, shards = arguments.shard
    problems = [(name, m) for m in arguments.tokens for name in arguments.op or named]
    mine = problems[shard::shards]
    # One compiles while another runs: the shards share the processor's cores.
    with concurrent.futures.ThreadPoolExecutor(1 if shards > 1 else os.cpu_count()) as pool:
        programs = [pool.submit(prepare, named[name], tokens) for name, tokens in mine]
        for (name, tokens), program in zip(mine, programs, strict=True):
            if time.perf_counter() - start > arguments.seconds:
                program.cancel()
                print(name, tokens, "no time left", flush=True)
                continue
            call, operands = program.result()
            jax.block_until_ready(call(operands))
            print(name, tokens, "ran", flush=True)
    print("shard ended")


if __name__ == "__main__":
    main()
