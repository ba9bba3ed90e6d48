"""Operands of the grouped 8-bit matmul, for the interpreter, lowering and GPU tests."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
from a8_cases import Case


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """One grouped problem: rows of each expert, and a problem that every expert has."""

    sizes: tuple[int, ...]
    case: Case

    def __str__(self) -> str:
        return f"{len(self.sizes)} experts of {max(self.sizes)}-{self.case}"

    @property
    def rows(self) -> int:
        """All experts' rows."""
        return sum(self.sizes)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return operand name -> (shape, dtype)."""
        shapes = dataclasses.replace(self.case, m=self.rows).shapes()
        for name in ("w", "w_scale"):
            shape, dtype = shapes[name]
            shapes[name] = (len(self.sizes), *shape), dtype
        return {**shapes, "group_sizes": ((len(self.sizes),), "int32")}

    def operands(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random operands."""
        case = dataclasses.replace(self.case, m=self.rows)
        experts = [case.operands(seed + i) for i in range(len(self.sizes))]
        weights = {name: np.stack([e[name] for e in experts]) for name in ("w", "w_scale")}
        return {**experts[0], **weights, "group_sizes": np.array(self.sizes, np.int32)}

    def expected(self, operands: dict[str, np.ndarray]) -> np.ndarray:
        """Return the float64 result, one expert after the other."""
        ends = np.cumsum(self.sizes)
        parts = []
        for expert, (begin, end) in enumerate(zip(ends - self.sizes, ends, strict=True)):
            rows = slice(begin, end)
            x_scale = operands["x_scale"]
            if self.case.x_scale == "1x128":
                x_scale = x_scale[:, rows]
            elif self.case.x_scale == "token":
                x_scale = x_scale[rows]
            parts.append(
                oracle.matmul_a8(
                    operands["x_q"][rows],
                    x_scale,
                    operands["w"][expert],
                    operands["w_scale"][expert],
                    w_block=self.case.w_block,
                )
            )
        return np.concatenate(parts)

    @property
    def options(self) -> dict:
        """Return the keyword arguments that are no arrays."""
        return {"w_block": self.case.w_block, "out_dtype": jnp.dtype(self.case.out)}


LAYOUTS = (
    Case(0),
    Case(0, x="int8", w="int8"),
    Case(0, x_scale="1x128", w_scale="128x128"),
    Case(0, x_scale="tensor", w_scale="tensor"),
    Case(0, x_scale="token", w_scale="64x64", out="float16"),
    Case(0, x_scale="1x128", w_scale="channel"),
    Case(0, n=320, k=320, x_scale="1x128", w_scale="128x128"),
)
