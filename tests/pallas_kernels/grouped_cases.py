"""Groups of rows with an expert each: random operands, and what they must give in float64."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from a16_cases import Case

from pallas_kernels import Prepacked


@dataclasses.dataclass(frozen=True)
class Groups:
    """A grouped problem.

    Attributes:
        case: sizes, formats and types; `case.m` rows, some of which may belong to no expert.
        sizes: rows of each expert.
        first, stop: the experts that have a weight; None for all.
    """

    case: Case
    sizes: tuple[int, ...]
    first: int = 0
    stop: int | None = None

    @property
    def experts(self) -> range:
        """Experts that have a weight."""
        return range(self.first, len(self.sizes) if self.stop is None else self.stop)

    def weight(self) -> Prepacked:
        """Return the stacked weight."""
        plains = [self.case.plain(expert) for expert in self.experts]
        return self.case.pack(jax.tree.map(lambda *a: np.stack(a), *plains))

    def operands(self) -> dict[str, object]:
        """Return all operands but the weight."""
        return {
            "x": self.case.activations()["x"],
            "group_sizes": jnp.asarray(self.sizes, jnp.int32),
            "first": self.first,
        }

    @property
    def mine(self) -> np.ndarray:
        """Whether each row belongs to an expert with a weight."""
        owner = np.full(self.case.m, -1)
        owner[: sum(self.sizes)] = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return (owner >= self.experts.start) & (owner < self.experts.stop)

    def expected(self) -> np.ndarray:
        """Return [rows, n] in float64, zero in rows that belong to no expert here."""
        x = self.case.activations()["x"].astype(np.float64)
        y = np.zeros((self.case.m, self.case.n))
        begins = np.cumsum([0, *self.sizes])
        for expert in self.experts:
            rows = slice(begins[expert], begins[expert + 1])
            y[rows] = x[rows] @ self.case.dense(self.case.plain(expert)).T
        return y


def structs(case: Case, experts: int) -> tuple[object, ...]:
    """Return the types of x, weight and group sizes, without values."""
    given = case.structs()
    weight = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((experts, *leaf.shape), leaf.dtype), given["weight"]
    )
    return given["x"], weight, jax.ShapeDtypeStruct((experts,), jnp.int32)


def patterns(experts: int, rows: Sequence[int], seed: int = 0) -> np.ndarray:
    """Return every pattern of empty experts, [2**experts, experts]; others have random rows."""
    rng = np.random.default_rng(seed)
    filled = (np.arange(2**experts)[:, None] >> np.arange(experts)) & 1
    return filled * rng.choice(rows, filled.shape)
