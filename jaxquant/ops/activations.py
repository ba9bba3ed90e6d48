"""What happens to activations before a matmul, in plain XLA ops: gates, and quantization."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as pk
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import LayoutError
from jaxquant.transforms.numeric import (
    E2M1_THRESHOLDS,
    LEAST_SCALE,
    LEAST_TENSOR_SCALE,
    encode_values,
    power_of_two_scale,
)


def gate(x: jax.Array) -> jax.Array:
    """``silu(gate) * up`` of ``[..., 2 in]``, gate then up."""
    first, second = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(first) * second


class Activated(Protocol):
    """A weight that says how its activations are quantized: a QTensor, prepared or not."""

    @property
    def act(self) -> ActSpec | None: ...
    @property
    def act_scale(self) -> Any: ...
    @property
    def act_zero(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class ExactCodes:
    """An activation as codes in the form that the XLA path computes with.

    Attributes:
        codes: ``[..., in]`` numbers of the code's alphabet, exact in float32.
        scale: ``[..., 1]`` or, with groups, ``[..., in / group]`` f32.
        zero: ``[..., 1]`` f32 zero point or None; value = (codes - zero) x scale.
        group: inputs to a scale, 0 where one scale serves the row.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    group: int

    def dequantize(self) -> jax.Array:
        """``[..., in]`` f32."""
        value = self.codes if self.zero is None else self.codes - self.zero
        if not self.group:
            return value * self.scale
        return value * jnp.repeat(self.scale, self.group, axis=-1)[..., : value.shape[-1]]

    def take(self, source: jax.Array) -> ExactCodes:
        """Rows ``source`` of ``[tokens, in]``; negative ones give any row."""

        def rows(leaf: jax.Array) -> jax.Array:
            return jnp.take(leaf, source, axis=0, mode="clip")  # to 0, where all rows share one

        zero = None if self.zero is None else rows(self.zero)
        return ExactCodes(rows(self.codes), rows(self.scale), zero, self.group)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale", "zero"),
    meta_fields=("act", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class QActivation:
    """An activation that travels quantized, from the op that made it to every matmul it enters.

    ``matmul`` takes one in place of a dense activation where the weight asks for this quantization.
    Scales lie as the kernels read them.  With R rows, the product of the leading extents:

    Attributes:
        codes: ``[..., in]`` in the storage dtype of ``act.code``.
        scale: f32, ``[R, 1]`` per token, ``[1, 1]`` per tensor, or ``[in / group, R]`` per group,
            then with R rounded up to 4 columns, of which the last are undefined.
        zero: int32, as ``scale``; None for symmetric codes.  value = (codes - zero) x scale.
        act: how it was quantized.
        dtype: what the dense activation would have; so do results.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    act: ActSpec
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the dense activation, ``[..., in]``."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Its rank."""
        return self.codes.ndim

    @classmethod
    def of(cls, made: pk.Quantized, like: jax.Array, act: ActSpec) -> QActivation:
        """The rows that were made of ``like``, in its shape (but for the last axis) and dtype."""
        codes = made.codes.reshape(*like.shape[:-1], made.codes.shape[-1])
        return cls(codes, made.scale, made.zero, act, like.dtype)

    def check(self, where: str) -> QActivation:
        """Return self after checking every leaf.

        Raises:
            LayoutError: a leaf has another shape or dtype than ``act`` and the codes' shape give.
        """
        rows, group = math.prod(self.shape[:-1]), self.act.group_size
        shape = (1, 1) if self.act.granularity == "tensor" else (rows, 1)
        if group:
            shape = (-(-self.shape[-1] // group), -(-rows // 4) * 4)
        zero = None if self.act.symmetric else jnp.int32
        if self.codes.dtype != self.act.code.storage:
            found = f"codes of {self.codes.dtype}"
            raise LayoutError(where, found, f"{self.act} has {self.act.code.storage}")
        for name, leaf, dtype in (
            ("scale", self.scale, jnp.float32),
            ("zero", self.zero, zero),
        ):
            good = leaf is None if dtype is None else leaf is not None and leaf.dtype == dtype
            if not good or (leaf is not None and leaf.shape != shape):
                found = f"a {name} {None if leaf is None else (str(leaf.dtype), leaf.shape)}"
                needed = None if dtype is None else (jnp.dtype(dtype).name, shape)
                raise LayoutError(where, found, f"{self.act} of {self.shape} has {needed}")
        return self

    def rows(self) -> pk.Quantized:
        """The operands of a kernel, codes ``[R, in]``."""
        return pk.Quantized(self.codes.reshape(-1, self.shape[-1]), self.scale, self.zero)

    def exact(self) -> ExactCodes:
        """The same for the XLA path."""
        group, lead = self.act.group_size or 0, self.shape[:-1]
        scale, zero = self.scale, self.zero
        shape = (1,) * self.ndim if self.act.granularity == "tensor" else (*lead, 1)
        if group:
            scale, shape = scale[:, : math.prod(lead)].T, (*lead, scale.shape[0])
        wide = None if zero is None else zero.astype(jnp.float32).reshape(shape)
        return ExactCodes(_rounded(self.codes), scale.reshape(shape), wide, group)


def as_rows(made: ExactCodes, act: ActSpec) -> pk.Quantized:
    """Codes of the XLA path as operands of a kernel; see :class:`QActivation` for their shapes."""
    codes = made.codes.reshape(-1, made.codes.shape[-1]).astype(act.code.storage)
    scale = made.scale.reshape(-1, made.scale.shape[-1])
    if made.group:
        scale = jnp.pad(scale.T, ((0, 0), (0, -scale.shape[0] % 4)))
    zero = None if made.zero is None else made.zero.reshape(-1, 1).astype(jnp.int32)
    return pk.Quantized(codes, scale, zero)


def _rounded(codes: jax.Array) -> jax.Array:
    """Narrow floats as float32, rounded for sure.

    XLA may keep more precision than asked for: on a GPU it drops a conversion to 8 bits and back
    where it can fuse both, and the activations would not be quantized at all.
    """
    return lax.optimization_barrier(codes).astype(jnp.float32)


def _round_to_code(x: jax.Array, spec: ActSpec) -> jax.Array:
    """Nearest number of the code's alphabet, saturating, still float32."""
    code = spec.code
    if code.kind == "float":
        return _rounded(encode_values(x, code))
    if code.kind == "table":
        assert len(E2M1_THRESHOLDS) == 7
        return jnp.asarray(code.table, jnp.float32)[encode_values(x, code)]
    return jnp.clip(jnp.round(x), code.min, code.max)


def _divide(x: jax.Array, y: Any) -> jax.Array:
    """``x / y`` to the last bit.

    XLA turns division by a constant or a broadcast value into a product with its rounded inverse.
    The last bit matters here: the extreme of a row is a rounding tie where the scale is half the
    range of codes, and another code there is another result.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(y, jnp.float32), x.shape))


def _dynamic_scale(amax: jax.Array, spec: ActSpec, tensor_scale: Any) -> jax.Array:
    """Scale of a token or group from its largest magnitude; 1 where everything is zero."""
    assert spec.levels is not None
    if spec.upper_bound is not None:
        amax = jnp.minimum(amax, spec.upper_bound)
    if spec.scale_code in ("mx", "mx_rounded"):
        return power_of_two_scale(amax, spec.code, spec.scale_code == "mx_rounded")
    scale = jnp.maximum(_divide(amax, spec.levels), LEAST_SCALE)
    if spec.scale_code == "e8m0":
        mantissa, exponent = jnp.frexp(scale)
        scale = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    elif spec.scale_code == "e4m3":
        local = jnp.clip(_divide(scale, tensor_scale), 2.0**-9, 448.0).astype(jnp.float8_e4m3fn)
        scale = jnp.maximum(_rounded(local) * tensor_scale, LEAST_SCALE)
    return jnp.where(amax > 0, scale, 1.0)


def quantize_activation(x: jax.Array, q: Activated) -> ExactCodes:
    """Quantize ``x`` as ``q.act`` says.

    Args:
        x: ``[..., in]``, any float type.
        q: a weight whose ``act`` is not None; static scales are read from its leaves.
    Returns:
        codes, scales and zero points, all float32.
    """
    spec = q.act
    assert spec is not None and spec.levels is not None
    x = x.astype(jnp.float32)
    static = None if q.act_scale is None else q.act_scale.astype(jnp.float32).reshape(())
    if static is not None and spec.granularity == "tensor":
        zero = None if q.act_zero is None else q.act_zero.astype(jnp.float32).reshape(())
        scaled = _divide(x, static) if zero is None else _divide(x, static) + zero
        ones = (1,) * x.ndim
        codes = _round_to_code(scaled, spec)
        return ExactCodes(
            codes, static.reshape(ones), None if zero is None else zero.reshape(ones), 0
        )
    group = spec.group_size if spec.granularity == "group" and spec.group_size else 0
    *lead, width = x.shape
    cells, pad = (-(-width // group), -width % group) if group else (1, 0)
    if group:
        blocks = jnp.pad(x, [(0, 0)] * len(lead) + [(0, pad)]).reshape(*lead, cells, group)
    else:
        blocks = x[..., None, :]
    axes = (-2, -1) if not group else (-1,)
    if spec.granularity == "tensor":
        axes = tuple(range(blocks.ndim))
    if spec.symmetric:
        amax = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True, initial=0.0)
        tensor_scale = static
        if spec.scale_code == "e4m3" and static is None:
            # One for each token: what a row becomes must not depend on the rows beside it.
            tensor_scale = jnp.max(amax, axis=-2, keepdims=True, initial=0.0) / (
                spec.levels * 448.0
            )
            tensor_scale = jnp.maximum(tensor_scale, LEAST_TENSOR_SCALE)
        scale, zero = _dynamic_scale(amax, spec, tensor_scale), None
        scaled = _divide(blocks, scale)
    else:
        low = jnp.min(blocks, axis=axes, keepdims=True, initial=0.0)
        high = jnp.max(blocks, axis=axes, keepdims=True, initial=0.0)
        scale = _divide(high - low, spec.code.max - spec.code.min)
        scale = jnp.where(high > low, jnp.maximum(scale, LEAST_SCALE), 1.0)
        zero = jnp.clip(
            jnp.round(spec.code.min - _divide(low, scale)), spec.code.min, spec.code.max
        )
        scaled = _divide(blocks, scale) + zero
    codes = _round_to_code(scaled, spec)
    codes = codes.reshape(*lead, width + pad)[..., :width]
    rows = (*lead, cells)
    scale = jnp.broadcast_to(scale[..., 0], (*blocks.shape[:-1],)).reshape(rows)
    if zero is not None:
        zero = jnp.broadcast_to(zero[..., 0], (*blocks.shape[:-1],)).reshape(rows)
    return ExactCodes(codes, scale, zero, group)
