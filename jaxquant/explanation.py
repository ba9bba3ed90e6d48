"""``explain``: what each weight is, which code multiplies it, and why not a faster one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxquant.arguments import instance, whole
from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.stack import unstack_layers
from jaxquant.ops.prepared import Prepared
from jaxquant.ops.select import Choice, explain_grouped, explain_matmul
from jaxquant.ops.sharded import Sharded

COLUMNS = ("path", "shape", "layout", "activations", "runs on", "MiB", "why not faster")


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
        path: module path; "" for a lone QTensor.
        shape: logical shape; for experts on a mesh, of one device's.
        layout: the layout in words.
        activations: how they are quantized, "-" for not at all.
        kernel: what runs.
        nbytes: bytes of the weight's leaves.
        reasons: every faster kernel's name and why it does not run.
    """

    path: str
    shape: tuple[int, ...]
    layout: str
    activations: str
    kernel: str
    nbytes: int
    reasons: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Rows for every weight; prints as a table."""

    rows: tuple[Row, ...]
    batch: int

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [COLUMNS]
        for row in self.rows:
            why = "; ".join(f"{name}: {reason}" for name, reason in row.reasons)
            shape = "x".join(map(str, row.shape))
            size = f"{row.nbytes / 2**20:.2f}"
            cells.append(
                (row.path, shape, row.layout, row.activations, row.kernel, size, why or "-")
            )
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
            for line in cells
        ]
        total = sum(row.nbytes for row in self.rows) / 2**20
        return "\n".join([*lines, f"{len(self.rows)} weights, {total:.2f} MiB, batch {self.batch}"])


def _of_weight(path: str, q: QTensor | Prepared | Sharded, batch: int) -> Row:
    if not isinstance(q, Sharded):
        return _row(path, q, explain_matmul(q, batch))
    row = _row(path, q.part, explain_matmul(q.part, batch))
    return dataclasses.replace(_on_each(row, q), shape=q.shape)


def _on_each(row: Row, value: Sharded) -> Row:
    """The row of one device's part."""
    return dataclasses.replace(row, kernel=f"{row.kernel} on each of {value.devices} devices")


def _of_bank(path: str, value: ExpertBank | Sharded, batch: int) -> list[Row]:
    bank = value.part if isinstance(value, Sharded) else value
    rows = [
        _row(f"{path}[{run.start}:{run.stop}]", part, explain_grouped(part, batch))
        for run, part in zip(bank.runs, bank.parts, strict=True)
    ]
    return [_on_each(row, value) for row in rows] if isinstance(value, Sharded) else rows


def _row(path: str, q: QTensor | Prepared, choice: Choice) -> Row:
    act = str(q.act) if q.act else "-"
    layout = str(q.layout)
    if isinstance(q, Prepared) and q.members:
        layout = " and ".join(f"{count} of {own}" for count, own in q.members) + " as one run"
    return Row(path, q.shape, layout, act, choice.kernel, q.nbytes, choice.reasons)


def explain(model_or_q: Any, batch: int = 1) -> Explanation:
    """Say for every weight which code multiplies it and why no faster one does.

    Args:
        model_or_q: a QTensor (prepared or not), or any NNX model that holds QTensors.
        batch: rows of activations that the matmuls see.
    Returns:
        An Explanation: ``rows`` to compute with, ``str()`` to read.
    Raises:
        ConfigError: neither a weight nor a model, or no number of rows.
    """
    batch = whole("batch", batch)
    if isinstance(model_or_q, QTensor | Prepared | Sharded):
        return Explanation((_of_weight("", model_or_q, batch),), batch)
    instance("explain", model_or_q, nnx.Module, "a QTensor or an NNX model is needed")
    rows: list[Row] = []
    graph, state = nnx.split(model_or_q)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    model = unstack_layers(nnx.merge(graph, shapes))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_value()
        bank = value.parts if isinstance(value, Sharded) else value
        if isinstance(bank, ExpertBank):
            rows += _of_bank(name, value, batch)
        elif isinstance(value, QTensor | Prepared | Sharded):
            rows.append(_of_weight(name, value, batch))
    return Explanation(tuple(rows), batch)
