"""What every GGUF block codec is: a record of two inverse functions and the grid of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxquant.arrays.codes import Code
from jaxquant.formats.gguf_types import GgmlType


class Parts(NamedTuple):
    """The contents of ``n`` blocks of ``elements`` inputs each, taken apart.

    Attributes:
        patterns: stored code patterns ``[n, elements]``, uint8 (int8 for an int8 code).
        scales: one array ``[n, elements // step]`` per scale step of the block format.
        zeros: likewise the factors of the offset.
    """

    patterns: np.ndarray
    scales: tuple[np.ndarray, ...]
    zeros: tuple[np.ndarray, ...] = ()


class BlockFormat(NamedTuple):
    """One block codec.

    Attributes:
        type: its element type.
        code: alphabet of the codes.
        scale_steps: inputs that share a cell of each scale leaf, finest first.
        zero_steps: inputs that share a cell of each offset leaf; empty when symmetric.
        split: ``split(blocks uint8 [n, bytes]) -> Parts``.
        join: the inverse, ``join(parts) -> uint8 [n, bytes]``; None for types that only exist at
            run time and are never written.
    """

    type: GgmlType
    code: Code
    scale_steps: tuple[int, ...]
    zero_steps: tuple[int, ...]
    split: Callable[[np.ndarray], Parts]
    join: Callable[[Parts], np.ndarray] | None
