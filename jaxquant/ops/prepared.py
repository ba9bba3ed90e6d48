"""Prepared: a weight in the order in which kernels read it.

Made last, after sharding and stacking, by a pure transform with an exact inverse.  It is no
QTensor and has no structural operations, so the one law stays true: to cut or join a weight,
:func:`unprepare` it first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

import pallas_kernels as pk
from jaxquant.arrays.layout import WHOLE, Layout
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed", "perm", "act_scale", "act_zero", "pre_scale"),
    meta_fields=("layout", "act"),
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A weight that a kernel reads without further work.

    Attributes:
        packed: codes, scales and zero points in kernel order.
        perm, act_scale, act_zero, pre_scale, act, layout: those of the QTensor it was made from.
    """

    packed: pk.Prepacked
    layout: Layout
    perm: Any = None
    act_scale: Any = None
    act_zero: Any = None
    pre_scale: Any = None
    act: ActSpec | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, always ``("out", "in")``."""
        return self.layout.axes

    @property
    def lead(self) -> tuple[int, ...]:
        """Extents of leading axes."""
        return tuple(self.packed.records.shape[:-3])

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[*lead, out, in]``."""
        return (*self.lead, self.packed.n, self.packed.k)

    def extent(self, axis: str) -> int:
        """Elements along a named axis."""
        return self.shape[len(self.lead) + self.layout.index(axis)]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def _operand_bits(q: QTensor) -> int:
    """Bits of the operand that the codes become: 8 where a 4-bit weight meets 8-bit activations."""
    return 16 if q.act is None else 8


def refusal(q: QTensor) -> str | None:
    """Why no kernel reads ``q`` in an order of its own, or None when one does."""
    layout = q.layout
    if layout.axes != ("out", "in"):
        return "axes are not ('out', 'in')"
    four_bit = layout.code.name in ("int4", "uint4") and layout.data == ((1, 2),)
    if not four_bit and (q.act is not None or layout.code.name not in ("int8", "e4m3")):
        return f"{layout.code.name} codes are not packed for kernels"
    if len(layout.scales) != 1 or layout.affine == "offset":
        return "one scale and no offset are packed for kernels"
    if layout.zeros and (layout.zeros != layout.scales or str(q.zeros[0].dtype) != "uint8"):
        return "zero points must lie on the scale's grid"
    block, group = layout.scales[0]
    if block == WHOLE or (layout.code.name != "uint4" and layout.zeros):
        return f"a scale of {block} x {group} is not packed for kernels"
    if q.act is not None and (q.act.granularity != "token" or not q.act.symmetric):
        return f"activations {q.act} have no kernel beside 4-bit weights"
    try:
        jax.eval_shape(_pack, q)
    except pk.KernelError as error:
        return str(error).splitlines()[0]
    return None


def _pack(q: QTensor) -> pk.Prepacked:
    block, group = q.layout.scales[0]
    zeros = q.zeros[0] if q.zeros else None
    return pk.prepack(
        q.data[0],
        q.scales[0],
        zeros,
        group=None if group == WHOLE else group,
        block=block,
        operand=_operand_bits(q),
    )


def prepare(q: QTensor) -> QTensor | Prepared:
    """Bring a weight into kernel order; a weight that no kernel reorders comes back as it is."""
    if refusal(q) is not None:
        return q
    fields = (q.perm, q.act_scale, q.act_zero, q.pre_scale)
    bare = dataclasses.replace(q, perm=None, act_scale=None, act_zero=None, pre_scale=None)
    return Prepared(jax.jit(_pack)(bare), q.layout, *fields, act=q.act)


def unprepare(weight: Prepared) -> QTensor:
    """Exact inverse of :func:`prepare`."""
    plain = pk.unpack(weight.packed)
    zeros = () if plain.zeros is None else (plain.zeros,)
    return QTensor(
        (plain.codes,),
        (plain.scales,),
        zeros,
        weight.layout,
        weight.perm,
        weight.act_scale,
        weight.act_zero,
        weight.pre_scale,
        weight.act,
    )
