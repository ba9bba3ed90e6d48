"""gpt-oss MXFP4 experts: ``*_blocks`` U8 [out, in/32, 16] and ``*_scales`` U8 [out, in/32].

The reader has already cut the stacks into experts and the interleaved rows into gate and up.
Activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.arrays.codes import CODES
from jaxquant.formats.arranged import (
    arranged_decode,
    arranged_encode,
    arranged_shape,
    arranged_slots,
)
from jaxquant.formats.base import Coverage, Format, Leaf, RawModule, method_of
from jaxquant.formats.fp4 import Fp4Spec
from jaxquant.formats.names import by_component, by_glob, string_list
from jaxquant.formats.scaled import Side


def _coverage(config: Mapping[str, Any]) -> Coverage:
    def matches(entry: str, path: str) -> bool:
        parent = path.rpartition(".")[0]
        return by_glob(entry, path) or by_glob(entry, parent) or by_component(entry, path)

    def targeted(path: str) -> bool:
        return ".experts." in path

    return Coverage(string_list(config, "modules_to_not_convert"), matches, targeted)


def _spec(config: Mapping[str, Any], module: RawModule) -> Fp4Spec:
    blocks, scales = module.need("blocks"), module.need("scales")
    if blocks.dtype != "U8" or len(blocks.shape) != 3 or blocks.shape[-1] != 16:
        raise blocks.error(f"{blocks.dtype} {list(blocks.shape)}", "U8 [out, in/32, 16]")
    if scales.dtype != "U8" or scales.shape != blocks.shape[:-1]:
        raise scales.error(f"{scales.dtype} {list(scales.shape)}", f"U8 {list(blocks.shape[:-1])}")
    return Fp4Spec(
        kind="mxfp4",
        code=CODES["e2m1"],
        scales=(Leaf((1, 32), "float8_e8m0fnu"),),
        data=Side("blocks", "U8", blocks.shape),
        block=Side("scales", "U8", scales.shape),
    )


GPT_OSS = Format(
    "gpt-oss",
    lambda config: method_of(config) in ("mxfp4", "gpt-oss-mxfp4"),
    ("blocks", "scales"),
    ("blocks", "scales"),
    _coverage,
    _spec,
    arranged_shape,
    arranged_slots,
    arranged_decode,
    arranged_encode,
)
