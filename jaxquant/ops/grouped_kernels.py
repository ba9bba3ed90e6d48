"""The Pallas kernels of ``grouped_matmul``: which one takes a run of a bank, with which operands.

As in :mod:`jaxquant.ops.kernels`, static facts alone decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jaxquant.arrays.bank import Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.activations import gate, quantize_activation
from jaxquant.ops.kernels import (
    a8_activation,
    a8_refusal,
    kernel_reason,
    quantize,
    quantize_options,
    quantize_refusal,
    scale_layout,
    w_block,
)
from jaxquant.ops.prepared import Prepared, refusal

# From how many rows on a form of the activations is made only for the runs that read it: for fewer
# rows, to find out which they are takes longer than to make all.
SELECTIVE = 1024


class GroupedCandidate(NamedTuple):
    """A kernel for one run of a bank.

    Attributes:
        name: the op in ``pallas_kernels``.
        reason: why it does not take the problem, None when it does.
        run: ``run(operand, part, first, into)``: the :class:`Operand`, the run's weight, its first
            position in the bank, and the array that takes the run's rows and keeps the others (None
            for any values there).
        form: which form of the activations it reads, as :class:`Operand` tells them apart.
    """

    name: str
    reason: str | None
    run: Callable[[Operand, Any, int, jax.Array | None], jax.Array]
    form: Any


@dataclasses.dataclass
class Operand:
    """The activations of one grouped matmul, in the forms that kernels read, each made once.

    Attributes:
        x: ``[tokens, in]``; ``[tokens, 2 in]`` when ``gated``.
        sizes: ``[experts]`` rows of each position of the bank.
        source: int32 ``[rows]``, the row of ``x`` that each row is; None for the rows of ``x``.
        gated: whether rows are ``silu(gate) * up`` of the halves of ``x``.
        readers: form -> the runs that read it.
        layer: int32, which layer's weights to use where they are stacks of all layers', else None.
        interpret: run kernels under the GPU interpreter.
    """

    x: jax.Array
    sizes: jax.Array
    source: jax.Array | None
    gated: bool
    readers: dict[Any, list[Run]]
    layer: jax.Array | None
    interpret: bool
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the product."""
        return (self.x if self.source is None else self.source).shape[0]

    def _source_of(self, form: Any) -> jax.Array | None:
        """``source``, negative for rows of runs that do not read this form."""
        if len(self.readers) == 1 or self.rows < SELECTIVE:
            return self.source
        ends, row = jnp.cumsum(self.sizes), jnp.arange(self.rows, dtype=jnp.int32)
        read = jnp.zeros(self.rows, bool)
        for run in self.readers[form]:
            first = ends[run.start] - self.sizes[run.start]
            read |= (row >= first) & (row < ends[run.stop - 1])
        return jnp.where(read, row if self.source is None else self.source, -1)

    def own(self, leaf: jax.Array) -> jax.Array:
        """A small leaf of the weight, ``[expert, ...]``."""
        return leaf if self.layer is None else leaf[self.layer]

    def options(self, first: int, into: jax.Array | None) -> dict[str, Any]:
        """What every kernel is told of a run besides its operands."""
        return {"first": first, "into": into, "layer": self.layer, "interpret": self.interpret}

    def plain(self) -> jax.Array:
        """``[rows, in]`` in the type of ``x``."""
        if None not in self.made:
            source = self._source_of(None)
            if source is not None and pk.gather_rows_refusal(self.x, gated=self.gated) is None:
                made = pk.gather_rows(self.x, source, gated=self.gated, interpret=self.interpret)
            else:
                made = gate(self.x) if self.gated else self.x
                made = made if self.source is None else made[self.source]
            self.made[None] = made
        return self.made[None]

    def quantized(self, part: QTensor, form: Any) -> pk.Quantized:
        """Codes and scales as ``part`` wants them, for kernels."""
        if form in self.made:
            return self.made[form]
        fused = {"gated": self.gated, "source": self._source_of(form)}
        if self._makes_both(part, fused):
            options = quantize_options(part) | fused
            made = pk.quantize_and_keep(self.x, **options, interpret=self.interpret)
            self.made[None], self.made[form] = made
        else:
            self.made[form] = quantize(self.x, part, self.interpret, **fused)
        return self.made[form]

    def _makes_both(self, part: QTensor, fused: dict[str, Any]) -> bool:
        """Whether the kernel that quantizes for ``part`` makes the plain rows besides.

        Where forms are made for the rows of their readers alone, each has a kernel of its own.
        """
        wanted = None in self.readers and None not in self.made and self.rows < SELECTIVE
        moved = self.gated or self.source is not None
        return wanted and moved and quantize_refusal(self.x, part, **fused) is None


def grouped_candidates(
    x: jax.ShapeDtypeStruct, part: QTensor | Prepared, experts: int, first: int = 0
) -> list[GroupedCandidate]:
    """Every kernel with its reason for one run.

    Args:
        x: ``[rows, in]``.
        part: the run's stacked weight.
        experts: positions of the whole bank.
        first: the run's first one.
    """
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    if isinstance(part, Prepared):
        reason = kernel_reason(
            lambda: pk.grouped_a16_problem(x, part.packed, sizes, first=first),
            pk.GROUPED_A16_KERNELS,
        )
        return [GroupedCandidate("grouped_matmul_a16", reason, _run_a16, None)]
    if part.act is not None:
        reason = _refused_a8(x, part, sizes, first)
        return [GroupedCandidate("grouped_matmul_a8", reason, _run_a8, _form(part))]
    if part.layout.dense:
        reason = _refused_dense(x, part, sizes, first)
        return [GroupedCandidate("grouped_matmul_dense", reason, _run_dense, None)]
    why_not = refusal(part) or "it is not in kernel order: jaxquant.prepare_model does that"
    return [GroupedCandidate("grouped_matmul_a16", why_not, _run_a16, None)]


def _expert_of_row(sizes: jax.Array, first: int, experts: int, rows: int) -> jax.Array:
    """Which of a run's experts each row belongs to; any of them for rows of other runs."""
    passed = jnp.cumsum(sizes)[None] <= jnp.arange(rows)[:, None]
    return jnp.clip(jnp.sum(passed, 1, dtype=jnp.int32) - first, 0, experts - 1)


def _run_a16(operand: Operand, part: Prepared, first: int, into: jax.Array | None) -> jax.Array:
    x = operand.plain()
    if part.pre_scale is not None or part.perm is not None:
        experts = part.lead[-1]
        expert = _expert_of_row(operand.sizes, first, experts, operand.rows)
        if part.pre_scale is not None:
            scale = operand.own(part.pre_scale).reshape(experts, -1)
            x = x * scale[expert].astype(x.dtype)
        if part.perm is not None:
            x = jnp.take_along_axis(x, operand.own(part.perm)[expert], axis=1)
    return pk.grouped_matmul_a16(x, part.packed, operand.sizes, **operand.options(first, into))


def _refused_dense(
    x: jax.ShapeDtypeStruct, part: QTensor, sizes: jax.ShapeDtypeStruct, first: int
) -> str | None:
    if part.layout.axes != ("out", "in"):
        return "axes are not ('out', 'in'): to_axes(q, ('out', 'in'))"
    if part.perm is not None or part.pre_scale is not None:
        return "act-order and pre-scales have no kernel beside plain weights"
    return kernel_reason(
        lambda: pk.grouped_dense_problem(x, part.data[0], sizes, first=first),
        pk.GROUPED_DENSE_KERNELS,
    )


def _run_dense(operand: Operand, part: QTensor, first: int, into: jax.Array | None) -> jax.Array:
    x, options = operand.plain(), operand.options(first, into)
    return pk.grouped_matmul_dense(x, part.data[0], operand.sizes, **options)


def _refused_a8(
    x: jax.ShapeDtypeStruct, part: QTensor, sizes: jax.ShapeDtypeStruct, first: int
) -> str | None:
    if reason := a8_refusal(part):
        return reason
    assert part.act is not None
    if not part.act.symmetric:
        return "activations with zero points have no grouped kernel"
    codes, x_scale = a8_activation(x, part, _row_layout(part))
    w_scale = jax.ShapeDtypeStruct(part.scales[0].shape, jnp.float32)
    return kernel_reason(
        lambda: pk.grouped_a8_problem(
            codes,
            x_scale,
            part.data[0],
            w_scale,
            sizes,
            first=first,
            w_block=w_block(part),
            out_dtype=x.dtype,
        ),
        pk.GROUPED_A8_KERNELS,
    )


def _row_layout(part: QTensor) -> str:
    """Layout of the activations' scales: static ones are of an expert, so of each of its rows."""
    layout = scale_layout(part)
    return "1x128" if layout == "1x128" else "token"


def _form(part: QTensor) -> Any:
    """What tells one form of quantized activations from another.

    Static scales are the experts' own: their runs read the rows as they are.
    """
    return None if part.act_scale is not None else part.act


def _static_codes(operand: Operand, part: QTensor, first: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of all rows by the scale of each one's expert."""
    assert part.act is not None
    expert = _expert_of_row(operand.sizes, first, part.lead[-1], operand.rows)
    bare = dataclasses.replace(part, data=(), scales=(), zeros=())

    def one(row: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = quantize_activation(row, dataclasses.replace(bare, act_scale=scale))
        return made.codes, made.scale

    codes, scale = jax.vmap(one)(operand.plain(), operand.own(part.act_scale).reshape(-1)[expert])
    return codes.astype(part.act.code.storage), scale


def _run_a8(operand: Operand, part: QTensor, first: int, into: jax.Array | None) -> jax.Array:
    form = _form(part)
    if form is None:
        codes, x_scale = _static_codes(operand, part, first)
    else:
        codes, x_scale, _ = operand.quantized(part, form)
    return pk.grouped_matmul_a8(
        codes,
        x_scale,
        part.data[0],
        part.scales[0].astype(jnp.float32),
        operand.sizes,
        w_block=w_block(part),
        out_dtype=operand.x.dtype,
        **operand.options(first, into),
    )
