"""The bars that the kernels are held to, and how a run stands against them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pallas_kernels.bench import shapes

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A goal for the problems of one op in a range of tokens.

    Attributes:
        name: what the report calls it.
        ops: `--op` names of the problems that count.
        quantity: "peer" (time of the best peer of a shape over ours), "memory" (share of the
            memory bandwidth), "TB/s" (of weight codes alone) or the `--op` name that the ratio
            is to.
        mean: least geometric mean; None for none.
        worst: least value of any shape; 0 for none.
        tokens: first and last number of tokens.
        layer: (n, k), where only one layer counts.
    """

    name: str
    ops: tuple[str, ...]
    quantity: str
    mean: float | None
    worst: float
    tokens: tuple[int, int] = (1, 2**30)
    layer: tuple[int, int] | None = None

    def asks(self, op: str, size: tuple[int, int, int]) -> bool:
        """Whether a problem counts; peers of dense ops were asked for `shapes.TOKENS` only."""
        m, n, k = size
        return (
            op in self.ops
            and self.tokens[0] <= m <= self.tokens[1]
            and self.layer in (None, (n, k))
            and (self.quantity != "peer" or m in shapes.TOKENS or (n, k) in shapes.EXPERTS)
        )


_QUANTIZE = tuple(f"quantize_{s}{f}" for s in ("token", "1x128") for f in ("", "_rms", "_gated"))
_FP4, _GGUF = ("nvfp4", "mxfp4"), ("q8_0", "q4_k", "q5_k", "q6_k")
BARS = (
    Bar("fp8 token x channel", ("fp8",), "peer", 1.05, 0.92),
    Bar("int8", ("int8",), "peer", 1.10, 0.92),
    Bar("fp8 block", ("fp8_block",), "peer", 1.00, 0.90),
    Bar("grouped fp8 token x channel", ("grouped_fp8",), "peer", 1.05, 0.90),
    Bar("grouped fp8 block", ("grouped_fp8_block",), "peer", 1.05, 0.90),
    Bar("grouped W4A16", ("grouped_w4a16",), "peer", 1.30, 0.95),
    Bar("W4A16 g128, M <= 16", ("w4a16",), "peer", 1.6, 1.4, (1, 16)),
    Bar("W4A16 28672x4096, M <= 8", ("w4a16",), "TB/s", None, 3.3, (1, 8), (28672, 4096)),
    Bar("W4A16 g128, M = 64", ("w4a16",), "peer", 1.5, 1.35, (64, 64)),
    Bar("W4A16 g128, M >= 128", ("w4a16",), "peer", 1.10, 0.92, (128, 2**30)),
    Bar("W4A16 with zero points", ("w4a16_zero",), "w4a16", None, 1 / 1.08),
    Bar("W4A16 g32", ("w4a16_g32",), "w4a16", None, 1 / 1.15),
    Bar("W8A16 / FP8A16, M <= 64", ("w8a16", "fp8a16"), "memory", 0.80, 0.70, (1, 64)),
    Bar("FP4 and GGUF weights, M <= 16", (*_FP4, *_GGUF), "memory", None, 0.70, (1, 16)),
    Bar("FP4 weights, M <= 16, against Marlin", _FP4, "peer", 1.00, 0.0, (1, 16)),
    Bar("GGUF weights, M <= 16, against ggml", _GGUF, "peer", 1.00, 0.0, (1, 16)),
    Bar("quantization, M >= 1024", _QUANTIZE, "memory", 0.80, 0.70, (1024, 2**30)),
)


def sizes(row: Row) -> tuple[int, int, int]:
    """Return (m, n, k) of a row."""
    m, n, k = (int(extent) for extent in row["shape"].split("x")[:3])
    return m, n, k


def value(bar: Bar, row: Row, rows: Sequence[Row], clock: str) -> float | None:
    """Return the quantity of a bar for a row; None where what it compares with is missing."""
    if bar.quantity == "peer":
        ratios = [ratio[clock] for ratio in row.get("ratios", {}).values() if clock in ratio]
        return min(ratios, default=None)
    if bar.quantity == "memory":
        return row["of_memory"]
    _, n, k = sizes(row)
    if bar.quantity == "TB/s":
        return n * k / 2 / row["us"] * 1e-6
    other = [r for r in rows if r["op"] == bar.quantity and r["shape"] == row["shape"]]
    return other[0]["us"] / row["us"] if other else None


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a run stands against a bar.

    Attributes:
        bar: the goal.
        clock: "kernel" (kernel times) or "graph" (a peer's replayed graph over our wall time).
        count: shapes with a value, and shapes in the bar's range.
        mean: geometric mean, None without a value.
        worst: (value, op and shape) of the worst; None without a value.
    """

    bar: Bar
    clock: str
    count: tuple[int, int]
    mean: float | None
    worst: tuple[float, str] | None

    @property
    def held(self) -> bool:
        """Whether every shape was measured and the bar holds."""
        if self.mean is None or self.worst is None or self.count[0] < self.count[1]:
            return False
        return self.mean >= (self.bar.mean or 0) and self.worst[0] >= self.bar.worst

    def __str__(self) -> str:
        goal = (
            f"{self.bar.mean:.2f} / {self.bar.worst:.2f}"
            if self.bar.mean
            else (f"- / {self.bar.worst:.2f}")
        )
        got = "not measured"
        if self.mean is not None and self.worst is not None:
            got = f"{self.mean:.3f} mean, {self.worst[0]:.3f} worst at {self.worst[1]}"
        clock = f" ({self.clock})" if self.bar.quantity == "peer" else ""
        return (
            f"{'holds ' if self.held else 'MISSED'} {self.bar.name}{clock}: {got}; "
            f"bar {goal}; {self.count[0]} of {self.count[1]} shapes"
        )


def standings(rows: Sequence[Row]) -> list[Standing]:
    """Return how the rows of a run stand against every bar whose ops are among them."""
    found = []
    for bar in BARS:
        mine = [row for row in rows if bar.asks(row["op"], sizes(row))]
        for clock in ("kernel", "graph") if bar.quantity == "peer" else ("kernel",):
            values = [(value(bar, row, rows, clock), f"{row['op']} {row['shape']}") for row in mine]
            known = [(v, name) for v, name in values if v]
            if mine and (known or clock == "kernel"):  # peers need not have both clocks
                mean = math.exp(sum(math.log(v) for v, _ in known) / len(known)) if known else None
                count = (len(known), len(mine))
                found.append(Standing(bar, clock, count, mean, min(known, default=None)))
    return found
