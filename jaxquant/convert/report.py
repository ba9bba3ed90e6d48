"""What loading did: counts and bytes per format, what was left out, what was saved."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxquant.convert.item import Item, ModelSource


@dataclasses.dataclass(frozen=True)
class FormatCount:
    """Weights of one kind.

    Attributes:
        format: checkpoint format, or the scheme a weight was quantized with here.
        code: alphabet of the codes.
        weights: how many.
        nbytes: bytes in memory.
        dense_nbytes: bytes they would take in bf16.
    """

    format: str
    code: str
    weights: int
    nbytes: int
    dense_nbytes: int


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A loaded model in numbers.

    Attributes:
        loaded: weights and arrays that the model took.
        total: weights and arrays that the checkpoints offer; the rest is in ``ignored``.
        formats: one entry per format and code.
        array_nbytes: bytes of embeddings, norms and other arrays.
        ignored: name and reason of each tensor that takes no part.
    """

    loaded: int
    total: int
    formats: tuple[FormatCount, ...]
    array_nbytes: int
    ignored: tuple[tuple[str, str], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and arrays in memory."""
        return self.array_nbytes + sum(f.nbytes for f in self.formats)

    @property
    def saved_nbytes(self) -> int:
        """Bytes saved against the same weights in bf16."""
        return sum(f.dense_nbytes - f.nbytes for f in self.formats)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return dataclasses.asdict(self) | {"nbytes": self.nbytes, "saved": self.saved_nbytes}

    def __str__(self) -> str:
        lines = [f"loaded {self.loaded} of {self.total} tensors, {_mib(self.nbytes)}"]
        lines += [
            f"  {f.format} {f.code}: {f.weights} weights, {_mib(f.nbytes)} "
            f"({_mib(f.dense_nbytes)} in bf16)"
            for f in self.formats
        ]
        lines.append(f"  arrays: {_mib(self.array_nbytes)}")
        lines.append(f"  saved against bf16: {_mib(self.saved_nbytes)}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored:
            reasons.setdefault(reason, []).append(name)
        lines += [
            f"  left out, {why}: {len(names)}, e.g. {names[0]}" for why, names in reasons.items()
        ]
        return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def make_report(source: ModelSource) -> LoadReport:
    """Describe a source whose every item goes into the model."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in source.weights.values():
        groups.setdefault((item.format, item.abstract.layout.code.name), []).append(item)
    formats = tuple(
        FormatCount(
            name,
            code,
            len(items),
            sum(item.abstract.nbytes for item in items),
            sum(2 * item.abstract.shape[0] * item.abstract.shape[1] for item in items),
        )
        for (name, code), items in groups.items()
    )
    array_bytes = sum(
        leaf.size * leaf.dtype.itemsize
        for item in source.arrays.values()
        for leaf in jax.tree.leaves(item.abstract)
    )
    loaded = len(source.weights) + len(source.arrays)
    return LoadReport(
        loaded,
        loaded + len(source.ignored),
        formats,
        array_bytes,
        tuple(source.ignored.items()),
    )
