"""Activations that leave a norm or a gate quantized, for all the weights that read them.

In decoding a launch costs as much as the work in it.  A norm and the quantization after it are one
kernel here, and the codes are made once for the projections that share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as pk
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import LayoutError
from jaxquant.ops import operands
from jaxquant.ops.activations import QActivation, as_rows, gate, quantize_activation
from jaxquant.ops.backend import Backend, resolve
from jaxquant.ops.kernels import quantize_options, quantize_refusal, scale_layout
from jaxquant.ops.prepared import Prepared
from jaxquant.ops.select import rows_of, tries_kernels
from jaxquant.ops.sharded import Sharded

Weight = QTensor | Prepared | Sharded


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Root mean square normalisation over the last axis, in float32.

    Args:
        x: ``[..., features]``, any float type.
        weight: ``[features]``, any float type.
        epsilon: added to the mean square.
    Returns:
        ``[..., features]`` in the dtype of ``x``.
    Raises:
        LayoutError: ``x`` is no such array, or ``weight`` has another shape.
    """
    x = operands.activation("rms_norm", x)
    if weight.shape != x.shape[-1:]:
        raise LayoutError("rms_norm", f"a weight of shape {weight.shape}", f"x is {x.shape}")
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def rms_norm_quantize(
    x: jax.Array,
    weight: jax.Array,
    epsilon: float,
    readers: Sequence[Weight],
    *,
    backend: Backend | None = None,
) -> jax.Array | QActivation:
    """:func:`rms_norm`, quantized once for the weights that read the result where they agree.

    Weights agree when all quantize their input, in the same way and without scales of their own:
    per token or per group of 128, with scales computed from the input.  A lone weight may have
    static scales and zero points.  The kernel quantizes the float32 norm; where no kernel does
    all of this, the result is dense, and each matmul quantizes it after rounding to ``x``'s dtype.

    Args:
        x: ``[..., features]``, any float type.
        weight: ``[features]`` of the norm.
        epsilon: added to the mean square.
        readers: all weights that the result is multiplied with.
        backend: as for :func:`jaxquant.matmul`; it never raises for want of a kernel.
    Returns:
        What :func:`jaxquant.matmul` takes with each of ``readers``: a QActivation, or the dense
        ``[..., features]`` where they do not agree or there is no kernel.
    Raises:
        LayoutError: shapes do not fit, or a reader is no weight.
    """
    x = operands.activation("rms_norm_quantize", x)
    _check_readers("rms_norm_quantize", readers, x.shape[-1])
    plain = functools.partial(rms_norm, weight=weight, epsilon=epsilon)
    fused = {"rms_weight": weight, "rms_epsilon": epsilon}
    return _quantized(x, readers, plain, fused, backend)


def silu_mul_quantize(
    gate_up: jax.Array, readers: Sequence[Weight], *, backend: Backend | None = None
) -> jax.Array | QActivation:
    """``silu(gate) * up`` of ``[..., 2 * inner]``, gate first, as by :func:`rms_norm_quantize`."""
    gate_up = operands.activation("silu_mul_quantize", gate_up)
    if gate_up.shape[-1] % 2:
        found = f"gate and up of shape {gate_up.shape}"
        raise LayoutError("silu_mul_quantize", found, "[..., 2 * inner] is needed")
    _check_readers("silu_mul_quantize", readers, gate_up.shape[-1] // 2)
    return _quantized(gate_up, readers, gate, {"gated": True}, backend)


def _check_readers(where: str, readers: Sequence[Weight], width: int) -> None:
    if not isinstance(readers, list | tuple):
        found = f"readers of type {type(readers).__name__}"
        raise LayoutError(where, found, "a list or tuple of weights is needed")
    for q in readers:
        if operands.weight(where, q).extent("in") != width:
            raise LayoutError(where, f"{q!r} as a reader", f"it would read {width} inputs")


def _common(readers: Sequence[Weight]) -> QTensor | Prepared | None:
    """A weight that quantizes its input as all of ``readers`` do, or None."""
    # On a mesh each device quantizes what it multiplies.
    known = [q for q in readers if not isinstance(q, Sharded)]
    if not known or len(known) < len(readers):
        return None
    first = known[0]
    if first.act is None or scale_layout(first) is None:
        return None
    if any(q.act != first.act or q.pre_scale is not None for q in known):
        return None
    # Whether static scales are equal is in their values, which a traced program does not know.
    return first if len(known) == 1 or first.act.dynamic else None


def _quantized(
    x: jax.Array,
    readers: Sequence[Weight],
    plain: Callable[[jax.Array], jax.Array],
    fused: dict[str, Any],
    backend: Backend | None,
) -> jax.Array | QActivation:
    reader, backend = _common(readers), resolve(backend)
    if reader is None:
        return plain(x)
    act = reader.act
    assert act is not None

    def xla(x: jax.Array) -> QActivation:
        return QActivation.of(as_rows(quantize_activation(plain(x), reader), act), x, act)

    def kernel(x: jax.Array, interpret: bool = False) -> QActivation:
        rows = x.reshape(-1, x.shape[-1])
        options = quantize_options(reader) | fused
        return QActivation.of(pk.quantize(rows, **options, interpret=interpret), x, act)

    shapes = {name: value for name, value in fused.items() if name != "rms_epsilon"}
    if not tries_kernels(backend) or quantize_refusal(rows_of(x), reader, **shapes) is not None:
        return plain(x)
    if backend == "auto":
        return lax.platform_dependent(x, cuda=kernel, default=xla)
    return kernel(x, interpret=backend == "interpret")
