"""Measure every candidate config: `python -m pallas_kernels.tune [--op NAME] [--out FILE]`.

A candidate counts only if its result agrees with XLA's.  The best of each problem is merged into
this GPU's own file of tuned configs where it beats the config in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import CASES, Case
from pallas_kernels.bench.timing import copies, kernel_time, program
from pallas_kernels.bench.workers import in_processes, share_memory
from pallas_kernels.problem import (
    ENTRY_KEY,
    Config,
    Kernel,
    Problem,
    current_device,
    own_tuned_path,
    select,
)

Size = tuple[int, int, int]

# Most operand sets and calls of a program: enough to leave the cache, few enough to compile soon.
MOST_CALLS = 8
# Candidates that are measured again beside the config in use, and how often.
AGAIN, ROUNDS = 3, 3
# A candidate replaces the config in use if it takes at most this part of its time.
WINS = 0.985


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


@dataclasses.dataclass
class Candidate:
    """A config that is measured for a problem.

    Attributes:
        kernel: which it is of.
        config: itself.
        program: compiled; None if it does not compile.
        times: microseconds a call of each measurement.
    """

    kernel: Kernel
    config: Config
    program: Callable | None
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def microseconds(self) -> float:
        """Return the median."""
        return statistics.median(self.times)


@dataclasses.dataclass(frozen=True)
class Found:
    """What tuning a problem found.

    Attributes:
        entries: of the table, best first.
        in_use: microseconds of the config in use.
    """

    entries: list[dict]
    in_use: float


def compile_candidate(
    case: Case, kernel: Kernel, config: Config, shapes: list, calls: int
) -> Candidate:
    """Compile a config; one that does not compile is a finding, not the end."""
    try:
        compiled = program(lambda operands: case.call(operands, config), shapes, calls)
    except Exception as error:
        message = (str(error).splitlines() or [""])[0][:150]
        print(f"  {config}: {type(error).__name__} {message}", flush=True)
        compiled = None
    return Candidate(kernel, config, compiled)


def tune(deadline: float, name_and_size: tuple[str, Size]) -> Callable[[], Found]:
    """Compile the candidates of one problem, and return what measures them.

    The best few and the config in use are measured again in turn: the fastest of many was lucky
    too.

    Args:
        deadline: time of the clock after which nothing is measured.
        name_and_size: of the case.

    Raises:
        TimeoutError: not even the config in use was measured in time.  What is returned raises it.
    """
    if time.time() > deadline:
        raise TimeoutError("no time left")
    name, size = name_and_size
    case = next(case for case in CASES if case.name == name)
    made = case.operands.lower(*size, 0)
    shapes = [made.out_info] * min(copies(case.work(*size)[1]), MOST_CALLS)
    problem = case.problem(made.out_info)
    calls = max(len(shapes), MOST_CALLS if size[0] <= 512 else 2)
    choices = dict.fromkeys([select(case.kernels, problem), *candidates(case, problem)])
    compiled = [compile_candidate(case, *choice, shapes, calls) for choice in choices]
    make = made.compile()

    def measure() -> Found:
        sets = [make(seed) for seed in range(len(shapes))]
        want = case.reference(sets[0])

        def time_again(candidate: Candidate) -> None:
            assert candidate.program
            candidate.times.append(kernel_time(candidate.program, sets, calls, 3))

        measured = []
        for candidate in compiled:
            if candidate.program is None or time.time() > deadline:
                continue
            error = relative_error(candidate.program(sets)[0], want)
            if not error < case.tolerance:
                print(f"  {name} {size} {candidate.config}: error {error:.1e}", flush=True)
                continue
            time_again(candidate)
            measured.append(candidate)
        if not measured or measured[0] is not compiled[0]:
            raise TimeoutError("the config in use was not measured")
        in_use, *others = measured
        best = sorted(others, key=lambda candidate: candidate.times[0])[:AGAIN]
        for _ in range(ROUNDS):
            for candidate in (in_use, *best):
                time_again(candidate)
        ranked = sorted([in_use, *best], key=lambda candidate: candidate.microseconds)
        ranked += sorted(
            (c for c in others if c not in best), key=lambda candidate: candidate.microseconds
        )
        entries = [entry_of(problem, size, candidate) for candidate in ranked]
        return Found(entries, round(in_use.microseconds, 2))

    return measure


def entry_of(problem: Problem, size: Size, candidate: Candidate) -> dict:
    """Return a measured candidate as an entry of the table."""
    m, n, k = size
    return {
        "kind": problem.kind,
        "m": m,
        "n": n,
        "k": k,
        **({"experts": problem.experts} if problem.experts else {}),
        "kernel": candidate.kernel.name,
        "config": dataclasses.asdict(candidate.config),
        "us": round(candidate.microseconds, 2),
        "gpu": jax.devices()[0].device_kind,
    }


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
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    share_memory()
    own = own_tuned_path(current_device())
    out = arguments.out or own
    if out is None:
        parser.error(f"{current_device().name} has no file of tuned configs: name one with --out")
    table = json.loads(own.read_text()) if own else {}
    log = []
    problems = [
        (case, size)
        for case in CASES
        if not arguments.op or case.name in arguments.op
        for size in case.sizes
        if not arguments.shape or "x".join(map(str, size)) in arguments.shape
    ]
    for index, found, why in in_processes(
        functools.partial(tune, time.time() + arguments.seconds),
        [(case.name, size) for case, size in problems],
        processes=len(problems),
        at_once=arguments.jobs,
    ):
        case, size = problems[index]
        title = f"{case.name} {'x'.join(map(str, size))}"
        if why:
            print(f"{title}: {why}", flush=True)
            continue
        log += [{"case": case.name, **entry} for entry in found.entries]
        best = found.entries[0]
        if best["us"] <= WINS * found.in_use:
            merge(table, case.op, best)
            write_table(out, table)
        shown = [f"{e['us']}: {tuple(e['config'].values())}" for e in found.entries[:3]]
        print(f"{title} in use {found.in_use}", *shown, sep=" | ", flush=True)
        if arguments.log:
            arguments.log.write_text(json.dumps(log))


if __name__ == "__main__":
    main()
