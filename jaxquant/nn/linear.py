"""Linear layers over quantized weights."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxquant import ops
from jaxquant.arguments import float_dtype
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import LayoutError
from jaxquant.ops import operands
from jaxquant.ops.prepared import Prepared
from jaxquant.ops.sharded import Sharded

Weights = tuple[QTensor | Prepared | Sharded, ...]


class QWeight(nnx.Variable[Any]):
    """A Variable that holds a QTensor or an ExpertBank.

    It is no ``nnx.Param``: ``nnx.grad`` and optimisers skip integer codes.
    """


class Buffer(nnx.Variable[Any]):
    """An array of a checkpoint that is no parameter: cache scales, router corrections."""


class Linear(nnx.Module):
    """``y = x W^T + b`` with a weight in any layout.

    Attributes:
        weight: QTensor with axes ``("out", "in")``.
        bias: ``[out]`` or None.
        dtype: what inputs are cast to first; None keeps them as they are.
    """

    def __init__(
        self, weight: QTensor | Prepared | Sharded, bias: Any = None, dtype: Any = None
    ) -> None:
        weight = operands.weight("Linear", weight)
        if sorted(weight.axes) != ["in", "out"] or weight.lead:
            raise LayoutError("Linear", f"a weight {weight!r}", "axes 'out' and 'in', nothing else")
        shape = None if bias is None else getattr(bias, "shape", type(bias).__name__)
        if bias is not None and shape != (weight.extent("out"),):
            expected = f"an array with one entry for each of {weight.extent('out')} outputs"
            raise LayoutError("Linear", f"a bias of shape {shape}", expected)
        self.weight = QWeight(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = None if dtype is None else float_dtype("dtype", dtype)

    def __call__(self, x: jax.Array | ops.QActivation) -> jax.Array:
        """``[..., in] -> [..., out]`` in the dtype of ``x`` (or ``self.dtype``).

        ``x`` may be quantized already, by an op that knew the weight (see :func:`readers`).
        """
        if self.dtype is not None and not isinstance(x, ops.QActivation):
            x = x.astype(self.dtype)
        y = ops.matmul(x, self.weight.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


def readers(*linears: Linear) -> Weights:
    """The weights of linears that read one input; () where one of them casts it first."""
    if any(linear.dtype is not None for linear in linears):
        return ()
    return tuple(linear.weight.get_value() for linear in linears)
