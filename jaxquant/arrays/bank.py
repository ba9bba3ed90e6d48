"""ExpertPlan and ExpertBank: experts of one layer, each in its own layout.

Positions in a bank are not expert ids: experts are sorted so that equal layouts stand next to each
other (a *run*), and ids are remapped by a constant table.  Router columns are never permuted, which
would change how ties break and which groups of experts exist.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """Positions ``start`` to ``stop`` (exclusive) of experts or layers that are all alike."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """Where each expert of a layer stands, the same for all of its projections; static, hashable.

    With expert parallelism every device runs the same program, so every device holds the same runs:
    positions are device-major, ``runs`` are those of one device, and layouts that do not divide
    evenly are filled up with *ghosts*, positions that no id maps to.

    Attributes:
        order: expert id whose weights stand at each position; a ghost repeats another's weights.
        ghosts: positions that no token can reach.
        runs: for each projection, its runs of equal layout in local positions ``0 .. n/devices``.
        devices: ways of expert parallelism.
    """

    order: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    ghosts: tuple[int, ...] = ()
    devices: int = 1

    @property
    def experts(self) -> int:
        """Number of experts, without ghosts."""
        return len(self.order) - len(self.ghosts)

    @property
    def local(self) -> int:
        """Positions that one device holds."""
        return len(self.order) // self.devices

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """``[experts]`` int32: the bank position of each expert id."""
        table = np.full(self.experts, -1, np.int32)
        for position, expert in enumerate(self.order):
            if position not in self.ghosts:
                table[expert] = position
        return table


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("runs",))
@dataclasses.dataclass(frozen=True)
class ExpertBank:
    """One projection of all experts of a layer, in bank order.

    Attributes:
        parts: one stacked QTensor ``[devices * (stop - start), out, in]`` per run, device-major,
            or what :mod:`jaxquant.ops.prepared_bank` makes of it.
        runs: the static position range of each part.
    """

    parts: tuple[Any, ...]
    runs: tuple[Run, ...]

    @property
    def experts(self) -> int:
        """Number of bank positions of one device."""
        return self.runs[-1].stop

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def __repr__(self) -> str:
        runs = ", ".join(
            f"{run.start}:{run.stop} {part.layout}"
            for run, part in zip(self.runs, self.parts, strict=True)
        )
        return f"ExpertBank({runs})"


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stack", "layer"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class StackedBank:
    """One layer's bank inside a stack of layers, not cut out of it.

    A bank is large and a pass over few tokens reads few of its experts: a loop over layers that
    sliced each layer's bank would copy all of them.  Reading expert ``e`` of layer ``l`` is one
    slice of the stack instead.

    Attributes:
        stack: the banks of all layers, every leaf ``[layer, position, ...]``.
        layer: int32, which one this is.
    """

    stack: ExpertBank
    layer: jax.Array

    @property
    def experts(self) -> int:
        """Number of bank positions of one device."""
        return self.stack.experts

    def cut(self) -> ExpertBank:
        """The layer's own bank, a copy: for types, or where copies do not matter."""
        return jax.tree.map(lambda leaf: leaf[self.layer], self.stack)
