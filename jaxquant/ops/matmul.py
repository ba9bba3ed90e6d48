"""``matmul``: activations times a quantized weight."""

from __future__ import annotations

from typing import Any

import jax

from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import LayoutError
from jaxquant.ops import operands
from jaxquant.ops.activations import QActivation
from jaxquant.ops.backend import Backend, resolve
from jaxquant.ops.prepared import Prepared
from jaxquant.ops.select import run_matmul
from jaxquant.ops.sharded import Sharded, matmul_on_parts


def matmul(
    x: jax.Array | QActivation,
    q: QTensor | Prepared | Sharded,
    *,
    backend: Backend | None = None,
) -> jax.Array:
    """Multiply activations with a weight in any layout.

    Activations are quantized first as ``q.act`` says (not at all, per token, per group, static).

    Args:
        x: ``[..., in]`` float32, bfloat16 or float16, or an activation that was quantized as
            ``q.act`` says (with ``q``'s own scale, if that is static).
        q: a weight with axes ``in`` and ``out`` in some order, without leading axes; on a mesh, as
            :func:`jaxquant.prepare_model` makes it, every device multiplies with its part.
        backend: "auto", "pallas", "xla" or "interpret"; by default the surrounding
            ``jaxquant.backend(...)`` context, else "auto".
    Returns:
        ``[..., out]`` in ``x.dtype``.
    Raises:
        LayoutError: shapes or types do not fit, a leaf of ``q`` breaks its layout, ``q`` has
            leading axes, or ``x`` is quantized otherwise.
        KernelError: "pallas" or "interpret" was asked for and no kernel takes the problem.
    """
    q = operands.weight("matmul", q)
    if sorted(q.axes) != ["in", "out"] or q.lead:
        raise LayoutError(
            "matmul",
            f"a weight {q!r}",
            "axes 'in' and 'out', no leading axes",
            "use jax.vmap for stacked weights",
        )
    x = x.check("matmul") if isinstance(x, QActivation) else operands.activation("matmul", x)
    if x.shape[-1] != q.extent("in"):
        raise LayoutError(
            "matmul", f"x of shape {x.shape}", f"the last axis is in = {q.extent('in')}"
        )
    if isinstance(q, Sharded):
        if isinstance(x, QActivation):
            found, rule = "quantized activations", "a weight on a mesh quantizes on every device"
            raise LayoutError("matmul", found, rule, "pass the dense activation")
        chosen = resolve(backend)

        def run(x: jax.Array, part: QTensor | Prepared, dtype: Any) -> jax.Array:
            return run_matmul(x, part, chosen, dtype)

        return matmul_on_parts(run, x, q)
    if isinstance(x, QActivation) and (x.act != q.act or q.pre_scale is not None):
        before = ", after a pre-scale" if q.pre_scale is not None else ""
        raise LayoutError(
            "matmul",
            f"activations that are {x.act}",
            f"the weight takes {q.act or 'unquantized ones'}{before}",
            "pass the dense activation",
        )
    return run_matmul(x, q, resolve(backend))
