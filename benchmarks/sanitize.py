"""Run every kernel once on small problems, for compute-sanitizer to watch: see sanitize.sh.

Usage: python benchmarks/sanitize.py [--op NAME] [--tokens 5 64 200]
"""

import argparse

import jax

from pallas_kernels.bench.cases import CASES

N, K = 256, 512


def main() -> None:
    """Run the ops of the bench, one program each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5, 64, 200])
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.op and case.name not in arguments.op:
            continue
        for m in arguments.tokens:
            operands = case.operands(m, N, K, 0)
            call = jax.jit(lambda operands, case=case: case.call(operands, None))
            jax.block_until_ready(call(operands))
            print(case.name, m, "ran", flush=True)


if __name__ == "__main__":
    main()
