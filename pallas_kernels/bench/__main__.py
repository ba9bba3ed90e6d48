"""Time the kernels: `python -m pallas_kernels.bench [--op NAME] [--shape MxNxK] [--json FILE]`.

For every problem it prints microseconds (kernel time and queued wall time), the rate reached, the
per cent of the floor (fewest bytes over the copy bandwidth of an H200, or operations over the
highest rate seen there, whichever is longer), and the ratio to each peer named in `--against FILE`,
a JSON of {kernel: {"MxNxK": microseconds}}.  A ratio above 1 says that the peer takes longer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax

from pallas_kernels.bench.cases import CASES, Case
from pallas_kernels.bench.timing import copies, measure, program
from pallas_kernels.problem import select

# Bytes read plus written per second by a large device-to-device copy on an H200.
COPY_BANDWIDTH = 4.3e12

Size = tuple[int, int, int]


def prepare(case: Case, size: Size) -> tuple[Callable, list, int]:
    """Return the compiled program of a problem, its operand sets and its number of calls."""
    m, n, k = size
    sets = [case.operands(m, n, k, seed) for seed in range(copies(case.work(m, n, k)[1]))]
    calls = max(len(sets), 8 if m <= 512 else 2)
    return program(lambda operands: case.call(operands, None), sets, calls), sets, calls


def run(case: Case, size: Size, prepared: tuple[Callable, list, int]) -> dict:
    """Time one problem with the config that selection chooses."""
    m, n, k = size
    operations, nbytes = case.work(m, n, k)
    compiled, sets, calls = prepared
    kernel, config = select(case.kernels, case.problem(sets[0]))
    timing = measure(compiled, sets, calls)
    floor = max(nbytes / COPY_BANDWIDTH, operations / case.rate) * 1e6
    return {
        "op": case.name,
        "shape": f"{m}x{n}x{k}",
        "us": round(timing.kernel, 2),
        "wall_us": round(timing.wall, 2),
        "tflops": round(operations / timing.kernel * 1e-6, 1),
        "tb_s": round(nbytes / timing.kernel * 1e-6, 3),
        "floor_us": round(floor, 2),
        "of_floor": round(floor / timing.kernel, 3),
        "kernel": kernel.name,
        "config": str(config),
    }


def compare(row: dict, case: Case, peers: dict[str, dict[str, float]]) -> dict:
    """Return the row with the ratio to each peer that was measured at its shape."""
    ratios = {
        name: round(peers[name][row["shape"]] / row["us"], 3)
        for name in case.peers
        if row["shape"] in peers.get(name, {})
    }
    return {**row, "ratios": ratios, "best": min(ratios.values())} if ratios else row


def summary(rows: list[dict]) -> str:
    """Return geometric mean and worst ratio to the best peer of each shape."""
    best = [row["best"] for row in rows if "best" in row]
    if not best:
        return ""
    mean = math.exp(sum(map(math.log, best)) / len(best))
    return f"against the best peer of each of {len(best)}: {mean:.3f} geometric mean, " + (
        f"{min(best):.3f} worst"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--shape", action="append", help="MxNxK; all shapes when left out")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--against", type=Path, action="append", default=[], help="peers' times")
    arguments = parser.parse_args()

    peers: dict[str, dict[str, float]] = {}
    for file in arguments.against:
        peers.update(json.loads(file.read_text()))
    print(jax.devices()[0].device_kind)
    report = []
    for case in CASES:
        if arguments.op and case.name not in arguments.op:
            continue
        rows = []
        sizes = [
            size
            for size in case.sizes
            if not arguments.shape or "x".join(map(str, size)) in arguments.shape
        ]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(functools.partial(prepare, case), sizes))
        for size, prepared in zip(sizes, programs, strict=True):
            row = compare(run(case, size, prepared), case, peers)
            rows.append(row)
            ratios = " ".join(
                f"{name} {ratio:.2f}" for name, ratio in row.get("ratios", {}).items()
            )
            print(
                f"{case.name:10} {row['shape']:16} {row['us']:9.2f} us "
                f"(wall {row['wall_us']:9.2f}) "
                f"{row['tflops']:7.1f} TFLOP/s {row['tb_s']:5.2f} TB/s "
                f"{100 * row['of_floor']:5.1f} % | {ratios} | {row['config']}",
                flush=True,
            )
        print(case.name, summary(rows))
        report += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
