"""ExpertPlan and ExpertBank: experts of one layer, each in its own layout.

Positions in a bank are not expert ids: experts are sorted so that equal layouts stand next to each
other (a *run*), and ids are remapped by a constant table.  Router columns are never permuted.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from jaxquant.arrays.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Run:
    """Bank positions ``start`` to ``stop`` (exclusive), all of one layout."""

    start: int
    stop: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("runs",))
@dataclasses.dataclass(frozen=True)
class ExpertBank:
    """One projection of all experts of a layer, in bank order.

    Attributes:
        parts: one stacked QTensor ``[stop - start, out, in]`` per run.
        runs: the static position range of each part.
    """

    parts: tuple[QTensor, ...]
    runs: tuple[Run, ...]

    @property
    def experts(self) -> int:
        """Number of bank positions."""
        return self.runs[-1].stop
