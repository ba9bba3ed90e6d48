"""Put the results of a bench run into docs/kernels.md (bars) and docs/kernels_results.md (tables).

Each card has marks of its own there.

Usage: python tools/kernel_tables.py BENCH.json [PEERS.json ...]

BENCH.json comes from `python -m pallas_kernels.bench --json`, PEERS.json from whatever timed the
other libraries on the same card; without it the ratios that the bench wrote are shown.
"""

import argparse
import json
import re
from pathlib import Path

from pallas_kernels.bench.__main__ import compare, read_peers
from pallas_kernels.bench.bars import Row, Standing, sizes, standings
from pallas_kernels.bench.cases import CASES

DOCS = Path(__file__).parent.parent / "docs"
CASE = {case.name: case for case in CASES}
# Heading -> ops side by side, where peers are few or none.
TOGETHER = {
    "4- and 8-bit weights, us (of the memory bandwidth)": (
        "w4a16",
        "w4a16_zero",
        "w4a16_g64",
        "w4a16_g32",
        "w8a16",
        "fp8a16",
        "w4a8_int8",
        "w4a8_fp8",
    ),
    "FP4 and GGUF weights, us (of the memory bandwidth, by the bytes of the format's files)": (
        "nvfp4",
        "mxfp4",
        "q8_0",
        "q4_k",
        "q5_k",
        "q6_k",
    ),
    "Activation quantization, bfloat16 to e4m3, us (of the memory bandwidth)": tuple(
        name for name in CASE if name.startswith("quantize_")
    ),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def by_layer(row: Row) -> tuple[int, int, int]:
    """Sort by layer, then tokens."""
    m, n, k = sizes(row)
    return n, k, m


def against_peers(rows: list[Row]) -> str:
    """Return the table of one op: time, rate, both floors and the best peer by either clock."""
    lines = []
    for row in sorted(rows, key=by_layer):
        best = {}
        for clock in ("graph", "kernel"):
            ratios = {
                name: ratio[clock]
                for name, ratio in row.get("ratios", {}).items()
                if clock in ratio
            }
            if ratios:
                best[clock] = min(ratios.items(), key=lambda item: item[1])
        by_operations = row["of_floor"] > row["of_memory"] + 1e-3
        names = " / ".join(dict.fromkeys(name for name, _ in best.values()))
        lines.append(
            [
                row["shape"],
                f"{row['us']:.1f}",
                f"{row['tflops']:.0f} TFLOP/s" if by_operations else f"{row['tb_s']:.2f} TB/s",
                f"{row['bytes_us']:.1f}",
                f"{row['operations_us']:.1f}" if row["operations_us"] else "-",
                f"{100 * row['of_floor']:.0f} %",
                names or "-",
                " / ".join(f"{ratio:.2f}" for _, ratio in best.values()) or "-",
            ]
        )
    floors = ["bytes us", "operations us", "of the floor"]
    return table(["M x N x K", "us", "rate", *floors, "best peer", "peer / ours"], lines)


def side_by_side(ops: tuple[str, ...], rows: list[Row]) -> str:
    """Return the table of several ops, a column each."""
    ops = tuple(op for op in ops if any(row["op"] == op for row in rows))
    cells = {
        (row["shape"], row["op"]): f"{row['us']:.1f} ({100 * row['of_memory']:.0f} %)"
        for row in rows
    }
    # The first op of several may have been run at more sizes, which its own table shows.
    wanted = {row["shape"] for row in rows if row["op"] in ops[1:] or len(ops) == 1}
    shapes = sorted(wanted, key=lambda shape: by_layer({"shape": shape}))
    return table(
        ["M x N x K", *ops],
        [[shape, *(cells.get((shape, op), "-") for op in ops)] for shape in shapes],
    )


def bars(found: list[Standing]) -> str:
    """Return the table of bars."""
    lines = []
    for standing in found:
        bar = standing.bar
        clock = f", {standing.clock} time" if bar.quantity == "peer" else ""
        worst = "-" if standing.worst is None else f"{standing.worst[0]:.2f} ({standing.worst[1]})"
        lines.append(
            [
                bar.name + clock,
                "-" if bar.mean is None else f"{bar.mean:.2f}",
                "-" if standing.mean is None else f"{standing.mean:.2f}",
                f"{bar.worst:.2f}",
                worst,
                f"{standing.count[0]} of {standing.count[1]}",
                "yes" if standing.held else "**no**",
            ]
        )
    return table(["bar", "mean, goal", "mean", "worst, goal", "worst", "shapes", "holds"], lines)


def heading(report: dict) -> str:
    """Return what a reader needs to know of the run."""
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in report["rates_t"].items())
    missing = f" {len(report['left_out'])} problems are missing." if report["left_out"] else ""
    missing += f" {report['note']}" if "note" in report else ""
    return (
        f"One {report['device']}, jax {report['jax']}, {report['date']}. Limits measured in the "
        f"same run: memory {report['memory_tb_s']:.2f} TB/s; dense products, T operations/s: "
        f"{rates}. Ratios are the time of the best peer over ours, in queued programs against its "
        f"replayed graph, and by kernel time.{missing}"
    )


def results(report: dict, rows: list[Row]) -> str:
    """Return all tables."""
    parts = [f"## {report['device']}", heading(report)]
    grouped = {name for names in TOGETHER.values() for name in names}
    for case in CASES:
        mine = [row for row in rows if row["op"] == case.name]
        if mine and (case.name not in grouped or any("ratios" in row for row in mine)):
            parts += [f"### {case.name}", against_peers(mine)]
    for title, ops in TOGETHER.items():
        if any(row["op"] in ops for row in rows):
            parts += [f"### {title}", side_by_side(ops, rows)]
    return "\n\n".join(parts)


def put(file: Path, card: str, text: str) -> None:
    """Replace what stands between the marks of a card in a file.

    Raises:
        ValueError: the file has no such marks.
    """
    first, last = f"<!-- bench {card} -->", f"<!-- /bench {card} -->"
    old, marked = file.read_text(encoding="utf-8"), f"{first}\n{text}\n{last}"
    new, count = re.subn(f"{first}.*{last}", lambda _: marked, old, flags=re.S)
    if count != 1:
        raise ValueError(f"{file}: needs {first} and {last} once, found {count}")
    file.write_text(new, encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bench", type=Path)
    parser.add_argument("peers", type=Path, nargs="*")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the two pages")
    arguments = parser.parse_args()
    report = json.loads(arguments.bench.read_text(encoding="utf-8"))
    peers = read_peers(arguments.peers)
    rows = [compare(row, CASE[row["op"]], peers) if peers else row for row in report["rows"]]
    card, summary = report["device"], f"{heading(report)}\n\n{bars(standings(rows))}"
    put(arguments.docs / "kernels.md", card, summary)
    put(arguments.docs / "kernels_results.md", card, results(report, rows))


if __name__ == "__main__":
    main()
