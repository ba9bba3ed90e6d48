"""Measure every candidate config: `python -m pallas_kernels.tune [--op NAME] [--out FILE]`.

A candidate counts only if its result agrees with XLA's.  The best of each problem is merged into
this GPU's own file of tuned configs; delete the file's entries to start afresh.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import CASES, Case
from pallas_kernels.bench.timing import copies, measure, program
from pallas_kernels.problem import (
    ENTRY_KEY,
    Config,
    Kernel,
    Problem,
    current_device,
    own_tuned_path,
)


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Return ||got - want|| / ||want||."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def candidates(case: Case, problem: Problem) -> list[tuple[Kernel, Config]]:
    """Return the kernels and configs worth measuring for a problem."""
    return [
        (kernel, config)
        for kernel in case.kernels
        if kernel.accepts(problem) is None
        for config in kernel.candidates(problem)
    ]


def tune(case: Case, size: tuple[int, int, int], deadline: float) -> list[dict]:
    """Return the measured candidates of one problem, best first."""
    m, n, k = size
    sets = [case.operands(m, n, k, seed) for seed in range(copies(case.work(m, n, k)[1]))]
    problem = case.problem(sets[0])
    want = case.reference(sets[0])
    calls = max(len(sets), 8 if m <= 512 else 2)

    def compile_one(kernel: Kernel, config: Config):
        try:
            return program(lambda operands: case.call(operands, config), sets, calls)
        except Exception as error:  # a config that does not compile is a finding, not the end
            message = (str(error).splitlines() or [""])[0][:150]
            print(f"  {config}: {type(error).__name__} {message}", flush=True)
            return None

    entries = []
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        choices = candidates(case, problem)
        programs = list(pool.map(compile_one, *zip(*choices, strict=True)))
    for (kernel, config), compiled in zip(choices, programs, strict=True):
        if compiled is None or time.time() > deadline:
            continue
        error = relative_error(compiled(sets)[0], want)
        if not error < case.tolerance:
            print(f"  {config}: relative error {error:.1e}", flush=True)
            continue
        timing = measure(compiled, sets, calls, repeats=3)
        entries.append(
            {
                "kind": problem.kind,
                "m": m,
                "n": n,
                "k": k,
                **({"experts": problem.experts} if problem.experts else {}),
                "kernel": kernel.name,
                "config": dataclasses.asdict(config),
                "us": round(timing.kernel, 2),
                "gpu": jax.devices()[0].device_kind,
            }
        )
    return sorted(entries, key=lambda entry: entry["us"])


def write_table(path: Path, table: dict[str, list[dict]]) -> None:
    """Write a tuned table with one entry a line, which keeps merges readable."""
    ops = []
    for op, entries in sorted(table.items()):
        entries = sorted(entries, key=lambda e: (e["kind"], e["n"], e["k"], e["m"]))
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        ops.append(f' "{op}": [\n{lines}\n ]')
    path.write_text("{\n" + ",\n".join(ops) + "\n}\n")


def merge(table: dict[str, list[dict]], op: str, entry: dict) -> None:
    """Put an entry in the place of the one for the same problem."""

    def problem(e: dict) -> tuple:
        return tuple(e.get(name) for name in ENTRY_KEY)

    kept = [e for e in table.get(op, []) if problem(e) != problem(entry)]
    table[op] = [*kept, entry]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--shape", action="append", help="MxNxK; all shapes when left out")
    parser.add_argument("--out", type=Path, help="the file to write; this GPU's own by default")
    parser.add_argument("--log", type=Path, help="write every measured candidate to this file")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop measuring after this long")
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    own = own_tuned_path(current_device())
    out = arguments.out or own
    if out is None:
        parser.error(f"{current_device().name} has no file of tuned configs: name one with --out")
    table = json.loads(own.read_text()) if own else {}
    log = []
    for case in CASES:
        if arguments.op and case.name not in arguments.op:
            continue
        for size in case.sizes:
            shape = "x".join(map(str, size))
            if (arguments.shape and shape not in arguments.shape) or time.time() > deadline:
                continue
            start = time.time()
            entries = tune(case, size, deadline)
            log += [{"case": case.name, **entry} for entry in entries]
            if entries:
                merge(table, case.op, entries[0])
                best = [f"{e['us']}: {tuple(e['config'].values())}" for e in entries[:3]]
                print(
                    f"{case.name} {shape} {time.time() - start:.0f} s", *best, sep=" | ", flush=True
                )
            write_table(out, table)
            if arguments.log:
                arguments.log.write_text(json.dumps(log))


if __name__ == "__main__":
    main()
