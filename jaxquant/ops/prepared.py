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
from jax import lax

import pallas_kernels as pk
from jaxquant.arrays.layout import WHOLE, Layout, packed_grids
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed", "perm", "act_scale", "act_zero", "pre_scale"),
    meta_fields=("layout", "act", "members"),
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A weight that a kernel reads without further work.

    Attributes:
        packed: codes, scales and zero points in kernel order.
        perm, act_scale, act_zero, pre_scale, act, layout: those of the QTensor it was made from.
        members: number of experts and layout of each run of a bank, where several are one here.
    """

    packed: pk.Prepacked
    layout: Layout
    perm: Any = None
    act_scale: Any = None
    act_zero: Any = None
    pre_scale: Any = None
    act: ActSpec | None = None
    members: tuple[tuple[int, Layout], ...] = ()

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


# What the kernels call a code: signed codes of less than 8 bits are stored in excess form.
KERNEL_CODES = {
    "int4": "uint4",
    "uint4": "uint4",
    "int5": "uint5",
    "uint5": "uint5",
    "int6": "uint6",
    "int8": "int8",
    "e4m3": "float8_e4m3fn",
    "e2m1": "float4_e2m1fn",
}
SUPER_BLOCK = (1, 256)
"""Grid of the super-scales of GGUF's K-quants."""


def _refused_codes(layout: Layout) -> str | None:
    code = layout.code
    if code.name not in KERNEL_CODES:
        return f"{code.name} codes are not packed for kernels"
    if layout.data != packed_grids(code, layout.axes, "in", 8):
        return "codes are not packed along 'in'"
    if code.kind == "uint" and layout.affine == "symmetric":
        return "unsigned codes without zero points are not packed for kernels"
    return None


def _refused_scales(q: QTensor) -> str | None:
    """Why the kernels have no such scales or zero points; their dtypes are left to `prepack`."""
    layout = q.layout
    if not layout.scales or layout.scales[0][0] == WHOLE:
        return f"scales of {layout.scales} are not packed for kernels"
    first, *more = layout.scales
    if more and more != [SUPER_BLOCK] and not (len(more) == 1 and more[0][1] == WHOLE):
        return f"a second scale of {more} is not packed for kernels"
    per_channel = layout.scales == ((1, WHOLE),) and q.act is not None
    if layout.affine == "offset" and (
        layout.zeros != layout.scales or not (more == [SUPER_BLOCK] or per_channel)
    ):
        return (
            "offsets are packed for kernels only with integer scales and super-scales, like them, "
            "or per channel beside 8-bit activations"
        )
    if layout.affine == "zero_point":
        if layout.zeros != (first,) or str(q.zeros[0].dtype) != "uint8":
            return "zero points must lie on the scale's grid"
        if layout.code.name != "uint4":
            return f"zero points of {layout.code.name} codes are not packed for kernels"
    return None


def _refused_activations(q: QTensor) -> str | None:
    act = q.act
    if act is None:
        return None
    if act.code.bits < 8:
        return f"activations {act} are emulated: this GPU multiplies no {act.code.name} operands"
    progressive = len(q.scales) == 2 and str(q.scales[0].dtype) == "int8"
    if KERNEL_CODES[q.layout.code.name] != "uint4" or len(q.scales) > 1 + progressive:
        return f"{q.layout.code.name} codes are not packed for 8-bit activations"
    if (progressive or q.layout.affine == "offset") and act.code.name != "int8":
        return f"4-bit codes of this layout become int8 operands, which meet no {act.code.name}"
    if q.lead:
        return "experts of 4-bit weights and 8-bit activations have no kernel"
    if act.granularity != "token" or not act.symmetric:
        return f"activations {act} have no kernel beside 4-bit weights"
    return None


def refusal(q: QTensor) -> str | None:
    """Why no kernel reads ``q`` in an order of its own, or None when one does."""
    if q.layout.axes != ("out", "in"):
        return "axes are not ('out', 'in')"
    if reason := _refused_codes(q.layout) or _refused_scales(q) or _refused_activations(q):
        return reason
    try:
        jax.eval_shape(_pack, q)
    except pk.KernelError as error:
        return str(error).splitlines()[0]
    return None


def _levels(leaves: tuple[Any, ...]) -> Any:
    """Leaves as the kernels' packing takes them: one array, or a tuple of several."""
    return leaves[0] if len(leaves) == 1 else leaves or None


def _leaves(levels: Any) -> tuple[Any, ...]:
    """Inverse of :func:`_levels`."""
    return () if levels is None else levels if isinstance(levels, tuple) else (levels,)


def _pack(q: QTensor) -> pk.Prepacked:
    (block, group), *more = q.layout.scales
    factor_block = more[0][0] if more and more[0][1] == WHOLE else 1
    return pk.prepack(
        _levels(q.data),
        _levels(q.scales),
        _levels(q.zeros),
        code=KERNEL_CODES[q.layout.code.name],
        group=None if group == WHOLE else group,
        block=block,
        factor_block=q.extent("out") if factor_block == WHOLE else factor_block,
        operand=_operand_bits(q),
    )


def _pack_each(q: QTensor) -> pk.Prepacked:
    """Pack a stack one weight at a time: packing takes several times the memory of a weight."""
    pack = _pack
    for _ in q.lead:
        pack = functools.partial(lax.map, pack)
    return pack(q)


def prepare(q: QTensor) -> QTensor | Prepared:
    """Bring a weight, or a stack of them, into kernel order.

    A weight that no kernel reorders comes back as it is.
    """
    if refusal(q) is not None:
        return q
    fields = (q.perm, q.act_scale, q.act_zero, q.pre_scale)
    bare = dataclasses.replace(q, perm=None, act_scale=None, act_zero=None, pre_scale=None)
    return Prepared(jax.jit(_pack_each)(bare), q.layout, *fields, act=q.act)


def unprepare(weight: Prepared) -> QTensor:
    """Exact inverse of :func:`prepare`."""
    plain = pk.unpack(weight.packed)
    return QTensor(
        _leaves(plain.codes),
        _leaves(plain.scales),
        _leaves(plain.zeros),
        weight.layout,
        weight.perm,
        weight.act_scale,
        weight.act_zero,
        weight.pre_scale,
        weight.act,
    )
