"""The Pallas kernels of ``matmul``: which one takes a weight, with which operands.

Every function here decides by static facts alone (layouts, shapes, dtypes, the device) and gives a
reason where it declines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

import pallas_kernels as pk
from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.activations import QActivation, as_rows, gate, quantize_activation
from jaxquant.ops.prepared import Prepared, refusal

GROUP = 128
_FP8 = ("e4m3", "e5m2")


class Candidate(NamedTuple):
    """A kernel for one problem.

    Attributes:
        name: the op in ``pallas_kernels``.
        reason: why it does not take the problem, None when it does.
        run: ``run(x, weight, interpret)`` with ``x`` ``[rows, in]``, dense or quantized.
    """

    name: str
    reason: str | None
    run: Callable[[Any, Any, bool], jax.Array]


def spread_refusal(weight: Any) -> str | None:
    """Why a weight that lies on a mesh has no kernel, or None if it lies on one device.

    XLA cannot split a kernel: it would gather the whole weight on every device, at every call.
    """
    for leaf in jax.tree.leaves(weight):
        if isinstance(leaf, jax.Array):
            mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
            axes = zip(mesh.axis_types, mesh.shape.values(), strict=True) if mesh else ()
            devices = math.prod(size for kind, size in axes if kind != AxisType.Manual)
            if devices > 1:
                return f"it lies on a mesh of {devices} devices: call it inside jax.shard_map"
    return None


def candidates(x: jax.ShapeDtypeStruct, weight: QTensor | Prepared) -> list[Candidate]:
    """Every kernel with its reason for one matmul; ``x`` is ``[rows, in]``."""
    if isinstance(weight, Prepared):
        if weight.act is None:
            return [Candidate("matmul_a16", _refused_a16(x, weight), _run_a16)]
        return [Candidate("matmul_w4a8", _refused_w4a8(x, weight), _run_w4a8)]
    packed = "matmul_a16" if weight.act is None else "matmul_w4a8"
    why_not = refusal(weight) or "it is not in kernel order: jaxquant.prepare_model does that"
    found = [Candidate(packed, why_not, _run_a16)]
    if weight.act is not None:
        found.append(Candidate("matmul_a8", _refused_a8(x, weight), _run_a8))
    return found


def kernel_reason(problem: Callable[[], pk.Problem], kernels: tuple[pk.Kernel, ...]) -> str | None:
    """The joint reason of all bodies behind one op."""
    try:
        found = problem()
    except pk.KernelError as error:
        return " ".join(str(error).split())
    reasons = [kernel.accepts(found) for kernel in kernels]
    return None if None in reasons else "; ".join(dict.fromkeys(r for r in reasons if r))


def _refused_a16(x: jax.ShapeDtypeStruct, weight: Prepared) -> str | None:
    return kernel_reason(lambda: pk.a16_problem(x, weight.packed), pk.A16_KERNELS)


def _run_a16(x: jax.Array, weight: Prepared, interpret: bool) -> jax.Array:
    if weight.pre_scale is not None:
        x = x * weight.pre_scale.reshape(-1).astype(x.dtype)
    return pk.matmul_a16(x, weight.packed, perm=weight.perm, interpret=interpret)


def _codes_of(x: jax.ShapeDtypeStruct, weight: QTensor | Prepared) -> jax.ShapeDtypeStruct:
    assert weight.act is not None
    return jax.ShapeDtypeStruct(x.shape, weight.act.code.storage)


def _refused_w4a8(x: jax.ShapeDtypeStruct, weight: Prepared) -> str | None:
    scale = jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)
    codes = _codes_of(x, weight)
    return kernel_reason(
        lambda: pk.w4a8_problem(codes, scale, weight.packed, out_dtype=x.dtype), pk.W4A8_KERNELS
    )


def _run_w4a8(x: jax.Array | QActivation, weight: Prepared, interpret: bool) -> jax.Array:
    if weight.pre_scale is not None and not isinstance(x, QActivation):
        x = x * weight.pre_scale.reshape(-1).astype(x.dtype)
    quantized = quantize(x, weight, interpret)
    codes = quantized.codes if weight.perm is None else quantized.codes[:, weight.perm]
    return pk.matmul_w4a8(
        codes, quantized.scale, weight.packed, out_dtype=x.dtype, interpret=interpret
    )


def scale_layout(q: QTensor | Prepared) -> str | None:
    """Name of the activation scale's layout for the kernels, None where they have none."""
    act = q.act
    assert act is not None
    if act.scale_code != "f32" or act.upper_bound is not None:
        return None
    if act.granularity == "tensor" and not act.dynamic:
        return "tensor"
    if act.granularity == "token" and act.dynamic:
        return "token"
    whole = act.granularity == "group" and act.group_size == GROUP and act.symmetric
    return "1x128" if whole and act.dynamic else None


def quantize_options(q: QTensor | Prepared) -> dict[str, Any]:
    """What ``pk.quantize`` has to know to make the codes that a weight asks for."""
    act, layout = q.act, scale_layout(q)
    assert act is not None and layout is not None
    options: dict[str, Any] = {"dtype": act.code.storage, "layout": layout}
    if layout != "tensor":
        return options | {"symmetric": act.symmetric}
    zero = None if q.act_zero is None else q.act_zero.astype(jnp.int32).reshape(1, 1)
    return options | {"scale": q.act_scale.astype(jnp.float32).reshape(1, 1), "zero": zero}


def quantize_refusal(
    x: jax.Array | jax.ShapeDtypeStruct, q: QTensor | Prepared, **fused: Any
) -> str | None:
    """Why no kernel makes the codes of ``x`` ``[rows, in]``, or None; ``fused`` as in ``pk``."""
    if reason := spread_refusal(q):
        return reason
    act, options = q.act, quantize_options(q)
    assert act is not None
    if options["layout"] != "tensor" and act.symmetric and act.levels != act.code.max:
        return f"{act.levels} levels are not those of the kernels"
    return kernel_reason(lambda: pk.quantize_problem(x, **options, **fused), pk.QUANTIZE_KERNELS)


def quantize(
    x: jax.Array | QActivation,
    q: QTensor | Prepared,
    interpret: bool,
    *,
    gated: bool = False,
    source: jax.Array | None = None,
) -> pk.Quantized:
    """Codes and scales in the kernels' form, by a kernel where one makes the same codes.

    Args:
        x: ``[tokens, in]``; ``[tokens, 2 in]`` when ``gated``; or codes, which have to be as ``q``
            wants them, neither gated nor gathered.
        q: the weight that says how.
        interpret: run the kernel under the GPU interpreter.
        gated: quantize ``silu(gate) * up``, the halves of each row of ``x``.
        source: int32 ``[rows]``, the row of ``x`` that each row is made of; rows of a negative one
            have no defined values.
    """
    if isinstance(x, QActivation):
        return x.rows()
    assert q.act is not None
    if quantize_refusal(x, q, gated=gated, source=source) is None:
        options = quantize_options(q) | {"gated": gated, "source": source}
        return pk.quantize(x, **options, interpret=interpret)
    made = quantize_activation(gate(x) if gated else x, q)
    return as_rows(made if source is None else made.take(source), q.act)


def a8_refusal(q: QTensor) -> str | None:
    """Why a weight, or a stack of them, is none for kernels of 8-bit operands; None if it is."""
    layout = q.layout
    if q.act is None:
        return "its activations are not quantized"
    if layout.axes != ("out", "in"):
        return "axes are not ('out', 'in'): to_axes(q, ('out', 'in'))"
    if q.perm is not None or q.pre_scale is not None:
        return "act-order and pre-scales have no 8-bit kernel"
    both_fp8 = layout.code.name in _FP8 and q.act.code.name in _FP8
    if not both_fp8 and (layout.code.name, q.act.code.name) != ("int8", "int8"):
        return f"{q.act.code.name} x {layout.code.name} is no 8-bit pair"
    if layout.affine != "symmetric" or len(layout.scales) != 1:
        return "the weight has zero points or a second scale"
    if scale_layout(q) is None:
        return f"activations {q.act} have no kernel"
    return None


def a8_activation(
    x: jax.ShapeDtypeStruct, q: QTensor | Prepared, layout: str
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Types of the codes and scales of ``x`` ``[rows, in]``."""
    rows = x.shape[0]
    scales = {"tensor": (1, 1), "token": (rows, 1), "1x128": (-(-x.shape[1] // GROUP), rows)}
    return _codes_of(x, q), jax.ShapeDtypeStruct(scales[layout], jnp.float32)


def _refused_a8(x: jax.ShapeDtypeStruct, q: QTensor) -> str | None:
    if reason := a8_refusal(q):
        return reason
    assert q.act is not None
    codes, x_scale = a8_activation(x, q, scale_layout(q) or "")
    w_scale = jax.ShapeDtypeStruct(q.scales[0].shape, jnp.float32)
    asymmetric = not q.act.symmetric
    zero = jax.ShapeDtypeStruct(x_scale.shape, jnp.int32) if asymmetric else None
    w_sum = jax.ShapeDtypeStruct(q.shape[:1], jnp.int32) if asymmetric else None
    return kernel_reason(
        lambda: pk.a8_problem(
            codes,
            x_scale,
            q.data[0],
            w_scale,
            w_block=w_block(q),
            x_zero=zero,
            w_sum=w_sum,
            out_dtype=x.dtype,
        ),
        pk.A8_KERNELS,
    )


def w_block(q: QTensor) -> tuple[int, int] | None:
    """The weight's block for the kernels; None for one scale per channel or for all."""
    block, group = q.layout.scales[0]
    return None if group == WHOLE and block in (WHOLE, 1) else (block, group)


def _run_a8(x: jax.Array | QActivation, q: QTensor, interpret: bool) -> jax.Array:
    assert q.act is not None
    quantized = quantize(x, q, interpret)
    # The correction of a zero point needs the weight's row sums.
    w_sum = None if q.act.symmetric else jnp.sum(q.data[0], axis=1, dtype=jnp.int32)
    return pk.matmul_a8(
        quantized.codes,
        quantized.scale,
        q.data[0],
        q.scales[0].astype(jnp.float32),
        w_block=w_block(q),
        x_zero=quantized.zero,
        w_sum=w_sum,
        out_dtype=x.dtype,
        interpret=interpret,
    )
