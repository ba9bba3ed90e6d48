"""Scheme: how weights and activations are quantized, as one value with a short name.

``Scheme.parse("w4a16_g128")`` and ``str(scheme)`` are inverse to each other.

=====================  ==========================================  ==============================
name                   weights                                     activations
=====================  ==========================================  ==============================
``bf16 f16 f32``       dense                                       none
``fp8``                e4m3, one scale per output channel          e4m3, dynamic per token
``fp8_tensor``         e4m3, one scale                             e4m3, dynamic per token
``fp8_b128``           e4m3, one scale per 128 x 128 block         e4m3, dynamic per 1 x 128
``fp8a16``             e4m3, one scale per output channel          none
``w8a8``               int8, one scale per output channel          int8, dynamic per token
``w8a8_b128``          int8, one scale per 128 x 128 block         int8, dynamic per 1 x 128
``wNa16[_gG][_asym]``  N bits (2 to 8), groups of G inputs (or     none
                       one scale per channel); ``asym`` has
                       zero points
``w4a8[_gG][_asym]``   as above                                    int8, dynamic per token
``w4afp8[_gG]``        as above                                    e4m3, dynamic per token
``nvfp4 nvfp4a16``     e2m1, e4m3 scales per 16, one f32 scale     emulated e2m1 / none
``mxfp4 mxfp4a16``     e2m1, power-of-two scales per 32            emulated e2m1 / none
``mxfp8 mxfp8a16``     e4m3, power-of-two scales per 32            e4m3 per 32 / none
=====================  ==========================================  ==============================
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from jaxquant.arrays.codes import CODES, DENSE_CODES, Code
from jaxquant.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ActSpec:
    """How a matmul quantizes its activations.

    Attributes:
        code: alphabet of the quantized activation.
        granularity: one scale per ``"token"`` (row), per ``"group"`` of ``group_size`` inputs, or
            per ``"tensor"``.
        dynamic: scales are computed from the activation; otherwise they are leaves of the QTensor.
        symmetric: no zero point.
        group_size: inputs to a scale for ``"group"``.
        levels: what the largest magnitude is divided by to get the scale (symmetric).  127 for
            int8 and 448 for e4m3 in most producers, 127.5 for compressed-tensors int8.
        scale_code: how the scale itself is rounded: ``"f32"``, ``"e8m0"`` (up to a power of two)
            ``"mx"`` (the OCP microscaling exponent), ``"mx_rounded"`` (the same with the largest
            magnitude rounded up from 1.75 times a power of two, as compressed-tensors does) or
            ``"e4m3"`` (two-level, NVFP4: the upper scale is a leaf of the QTensor, or computed from
            the token where there is none).
        upper_bound: largest magnitude that a dynamic scale may represent (FBGEMM), in activation
            units.
    """

    code: Code
    granularity: Literal["token", "group", "tensor"] = "token"
    dynamic: bool = True
    symmetric: bool = True
    group_size: int | None = None
    levels: float | None = None
    scale_code: Literal["f32", "e8m0", "mx", "mx_rounded", "e4m3"] = "f32"
    upper_bound: float | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ConfigError(
                "activations", f"{self.granularity}, group_size={self.group_size}", "set together"
            )
        if self.levels is None:
            object.__setattr__(self, "levels", float(self.code.max))

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        where = {"token": "per token", "tensor": "per tensor"}.get(
            self.granularity, f"per 1x{self.group_size}"
        )
        return f"{self.code.name} {kind} {where}" + ("" if self.symmetric else " asymmetric")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Weights x activations.

    Attributes:
        weight: alphabet of the weight.
        block: ``(out, in)`` elements that share a scale, 0 for the whole axis; None when dense.
        symmetric: no zero points.
        act: activation quantization or None.
        scale_code: ``"f32"``, ``"e8m0"`` (power of two) or ``"e4m3"`` (with one f32 on top).
    """

    weight: Code
    block: tuple[int, int] | None = None
    symmetric: bool = True
    act: ActSpec | None = None
    scale_code: Literal["f32", "e8m0", "e4m3"] = "f32"

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Read a scheme's name.

        Raises:
            ConfigError: ``text`` names no scheme; the message lists the forms.
        """
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise ConfigError(
                "scheme", repr(text)[:80], "a Scheme or its name", "e.g. 'w4a16_g128'"
            )
        if text in _NAMED:
            return _NAMED[text]
        found = re.fullmatch(r"w([2-8])a(16|8|fp8)(?:_g(\d+))?(_asym)?", text)
        if not found:
            forms = ", ".join(
                [*_NAMED, "wNa16[_gG][_asym]", "wNa8[_gG][_asym]", "wNafp8[_gG][_asym]"]
            )
            raise ConfigError("scheme", repr(text), "no such scheme", f"use one of {forms}")
        bits, act, group, asym = found.groups()
        group_size = int(group) if group else 0
        if group and (group_size < 8 or group_size % 8):
            raise ConfigError("scheme", repr(text), "a group size is a positive multiple of 8")
        acts = {"16": None, "8": ActSpec(CODES["int8"]), "fp8": ActSpec(CODES["e4m3"])}
        code = CODES[("uint" if asym else "int") + bits]
        return cls(code, (1, group_size), not asym, acts[act])

    def __str__(self) -> str:
        for name, scheme in _NAMED.items():
            if scheme == self:
                return name
        acts = {None: "16", "int8": "8", "e4m3": "fp8"}
        act = acts.get(self.act.code.name if self.act else None, "?")
        group = f"_g{self.block[1]}" if self.block and self.block[1] else ""
        return f"w{self.weight.bits}a{act}{group}{'' if self.symmetric else '_asym'}"


def _named() -> dict[str, Scheme]:
    e4m3, int8, e2m1 = CODES["e4m3"], CODES["int8"], CODES["e2m1"]
    token8, tokenf = ActSpec(int8), ActSpec(e4m3)
    group8 = ActSpec(int8, "group", group_size=128)
    groupf = ActSpec(e4m3, "group", group_size=128)
    named = {name: Scheme(CODES[name]) for name in DENSE_CODES}
    named |= {
        "fp8": Scheme(e4m3, (1, 0), act=tokenf),
        "fp8_tensor": Scheme(e4m3, (0, 0), act=tokenf),
        "fp8_b128": Scheme(e4m3, (128, 128), act=groupf),
        "fp8a16": Scheme(e4m3, (1, 0)),
        "w8a8": Scheme(int8, (1, 0), act=token8),
        "w8a8_b128": Scheme(int8, (128, 128), act=group8),
    }
    two_level = ActSpec(e2m1, "group", group_size=16, scale_code="e4m3")
    named["nvfp4"] = Scheme(e2m1, (1, 16), act=two_level, scale_code="e4m3")
    named["nvfp4a16"] = Scheme(e2m1, (1, 16), scale_code="e4m3")
    for name, code in (("mxfp4", e2m1), ("mxfp8", e4m3)):
        act = ActSpec(code, "group", group_size=32, scale_code="mx")
        named[name] = Scheme(code, (1, 32), act=act, scale_code="e8m0")
        named[name + "a16"] = Scheme(code, (1, 32), scale_code="e8m0")
    return named


_NAMED = _named()
