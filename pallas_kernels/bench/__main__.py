"""Time the kernels: `python -m pallas_kernels.bench [--op NAME] [--shape MxNxK] [--json FILE]`.

First the card's own limits are measured: memory bandwidth and dense rates.  Then processes compile
the problems side by side, and when all are compiled time them, one at a time.  For each the command
prints microseconds (kernel time by CUPTI, and wall time of queued programs), TFLOP/s, TB/s, two
floors (fewest bytes over the memory bandwidth, operations over the dense rate), the per cent of the
longer one, and the ratio to each peer of `--against FILE`, a JSON of
{kernel: {"MxNxK": {"kernel": us, "graph": us}}}, for experts "<tokens>xNxKxE<experts>k<top k>":
above 1, the peer takes longer.  "kernel" is compared with our kernel time, "graph", the peer's time
in a replayed CUDA graph, with our wall time.  At the end stand the bars, and which of them hold.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.bars import BARS, Row, standings
from pallas_kernels.bench.cases import CASES, Case
from pallas_kernels.bench.limits import Limits, measure_limits
from pallas_kernels.bench.measuring import prepare
from pallas_kernels.bench.workers import in_processes, share_memory

Peers = dict[str, dict[str, Any]]

# Clock of a peer's time -> the time of ours that it is compared with.
OURS = {"kernel": "us", "graph": "wall_us"}


def rows_of(shape: str) -> str:
    """Return the rows x N x K of a peer's shape, which may be <tokens>xNxKxE<experts>k<top k>."""
    tokens, n, k, *layer = shape.split("x")
    top_k = int(layer[0].partition("k")[2]) if layer else 1
    return f"{int(tokens) * top_k}x{n}x{k}"


def read_peers(files: Iterable[Path]) -> Peers:
    """Read the times of the kernels that cases name as peers; files hold other things besides."""
    named = {name for case in CASES for name in case.peers}
    return {
        name: {rows_of(shape): clocks for shape, clocks in times.items()}
        for file in files
        for name, times in json.loads(file.read_text()).items()
        if name in named
    }


def compare(row: Row, case: Case, peers: Peers) -> Row:
    """Return the row with the ratios, by clock, to each peer that was measured at its shape."""
    ratios = {
        name: {
            clock: round(us / row[OURS[clock]], 3)
            for clock, us in peers[name][row["shape"]].items()
        }
        for name in case.peers
        if row["shape"] in peers.get(name, {})
    }
    return {**row, "ratios": ratios} if ratios else row


def raised_by_peers(limits: Limits, peers: Peers) -> Limits:
    """Return the limits, raised to what a peer reached on this card at its largest products."""
    for case in CASES:
        for name in case.peers:
            for shape, times in peers.get(name, {}).items():
                m, n, k = map(int, shape.split("x"))
                if case.rate and m >= 2048 and (us := times.get("kernel")):
                    limits = limits.raised(case.rate, case.work(m, n, k)[0], us)
    return limits


def line(row: Row) -> str:
    """Return a row as a line of text."""
    ratios = " ".join(
        f"{name} " + "/".join(f"{ratio:.2f}" for ratio in clocks.values())
        for name, clocks in row.get("ratios", {}).items()
    )
    return (
        f"{row['op']:17} {row['shape']:16} {row['us']:9.2f} us (wall {row['wall_us']:9.2f}) "
        f"{row['tflops']:7.1f} TFLOP/s {row['tb_s']:5.2f} TB/s "
        f"floors {row['bytes_us']:.1f} {row['operations_us']:.1f} us "
        f"{100 * row['of_floor']:5.1f} % | {ratios} | {row['config']}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted({name for case in CASES for name in (case.name, case.op)})
    parser.add_argument("--op", choices=names, action="append", help="a case, or all of an op")
    parser.add_argument("--shape", action="append", help="MxNxK; all shapes when left out")
    parser.add_argument("--bars", action="store_true", help="the problems that a bar asks for")
    parser.add_argument("--json", type=Path, help="write limits, rows and standings to this file")
    parser.add_argument("--against", type=Path, action="append", default=[], help="peers' times")
    parser.add_argument("--repeats", type=int, default=5, help="programs timed for each median")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no timing after this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--quiet", action="store_true", help="print the standings alone")
    arguments = parser.parse_args()

    share_memory()
    start = time.perf_counter()
    peers = read_peers(arguments.against)
    device = jax.devices()[0].device_kind
    limits = raised_by_peers(measure_limits(), peers)
    rates = ", ".join(f"{name} {rate * 1e-12:.0f}" for name, rate in limits.rates.items())
    print(f"{device}: memory {limits.memory * 1e-12:.2f} TB/s; T operations/s: {rates}", flush=True)

    problems = [
        (case, size)
        for case in CASES
        if not arguments.op or {case.name, case.op} & set(arguments.op)
        for size in case.sizes
        if not arguments.shape or "x".join(map(str, size)) in arguments.shape
        if not arguments.bars or any(bar.asks(case.name, size) for bar in BARS)
    ]
    rows: dict[int, Row] = {}
    left_out: list[str] = []
    deadline = time.time() + arguments.seconds
    try:
        for index, row, why in in_processes(
            functools.partial(prepare, limits, arguments.repeats, deadline),
            [(case.name, size) for case, size in problems],
            processes=arguments.jobs,
            at_once=arguments.jobs,
        ):
            case, size = problems[index]
            if why:
                left_out.append(f"{case.name} {'x'.join(map(str, size))}: {why}")
                continue
            rows[index] = compare(row, case, peers)
            if not arguments.quiet:
                print(line(rows[index]), flush=True)
    finally:  # what was measured before an interrupt is worth keeping
        ordered = [rows[index] for index in sorted(rows)]
        found = standings(ordered)
        for text in (*left_out, *found):
            print(text)
        if arguments.json:
            report = {
                "device": device,
                "jax": jax.__version__,
                "date": datetime.date.today().isoformat(),
                "memory_tb_s": round(limits.memory * 1e-12, 3),
                "rates_t": {name: round(rate * 1e-12, 1) for name, rate in limits.rates.items()},
                "rows": ordered,
                "left_out": left_out,
                "standings": [str(standing) for standing in found],
            }
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{len(rows)} of {len(problems)} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
