"""How compressed-tensors holds a weight without rounding, or why it cannot.

The settings of an arrangement are the JSON of a config group without its targets.  Its ``format``
is the one that the library infers from the other arguments, because its tools go by that.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax

from jaxquant.arrays.layout import WHOLE, cells
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.formats.arrange import (
    Arrangement,
    each_output,
    same,
    scaled,
    ungrouped,
    unscaled,
    unusual,
)
from jaxquant.formats.base import CHANNEL, TENSOR, Leaf, disk_dtype
from jaxquant.formats.ct_config import activation_spec, parse_arguments
from jaxquant.formats.ct_packed import PackedSpec
from jaxquant.formats.fp4 import Fp4Spec
from jaxquant.formats.scaled import Side

EXPONENTS = "torch.uint8"


def _activations(act: ActSpec | None) -> dict[str, Any] | None:
    """The library's arguments for dynamic or static activations."""
    if act is None:
        return None
    kind = "int" if act.code.kind == "int" else "float"
    arguments: dict[str, Any] = {"num_bits": act.code.bits, "type": kind}
    arguments |= {"symmetric": act.symmetric, "strategy": act.granularity, "dynamic": act.dynamic}
    if act.granularity == "group":
        arguments["group_size"] = act.group_size
        if act.scale_code.startswith("mx"):
            arguments["scale_dtype"] = EXPONENTS
        if act.scale_code == "e4m3":
            arguments |= {"strategy": "tensor_group", "dynamic": "local"}
            arguments["scale_dtype"] = "torch.float8_e4m3fn"
    return arguments


def _alike(a: ActSpec | None, b: ActSpec | None) -> bool:
    """Whether two specs differ in no more than how a runtime rounds the scales that it computes."""
    if a is None or b is None:
        return a is b

    def kept(act: ActSpec) -> ActSpec:
        code = "mx" if act.scale_code == "mx_rounded" else act.scale_code
        return dataclasses.replace(act, levels=1.0, scale_code=code)

    return kept(a) == kept(b)


def _settings(q: QTensor, weights: dict[str, Any], form: str) -> tuple[str] | str:
    arguments = _activations(q.act)
    try:
        read = activation_spec(parse_arguments(arguments, "activations"))
    except ValueError:
        return f"activations {q.act}"
    if not _alike(read, q.act):
        return f"activations {q.act} with {q.act and q.act.scale_code} scales"
    weights = {"dynamic": False, "symmetric": not q.zeros, **weights}
    group = {"weights": weights, "input_activations": arguments, "format": form}
    return (json.dumps(group | {"output_activations": None}, sort_keys=True),)


def _strategy(grid: tuple[int, ...]) -> dict[str, Any]:
    if grid == TENSOR:
        return {"strategy": "tensor"}
    if grid == CHANNEL:
        return {"strategy": "channel"}
    if grid[0] == 1:
        return {"strategy": "group", "group_size": grid[1]}
    return {"strategy": "block", "block_structure": list(grid)}


def _side_shape(q: QTensor) -> tuple[int, ...]:
    grid = q.layout.scales[0]
    return (1,) if grid == TENSOR else tuple(map(cells, q.shape, grid))


def arrange_compressed_tensors(q: QTensor) -> Arrangement | str:
    """One of the library's six arrangements.

    Args:
        q: ``[out, in]``, abstract or real.
    Returns:
        The arrangement, or why there is none.
    """
    if reason := unusual(q):
        return reason
    if q.perm is not None:
        return "inputs sorted by group (act-order), which version 0.20 removed"
    if q.layout.code.name == "e2m1":
        return _fp4(q)
    if q.layout.code.name == "e4m3":
        return _float8(q)
    return _integers(q)


def _integers(q: QTensor) -> Arrangement | str:
    if reason := ungrouped(q, tuple(range(2, 9))):
        return reason
    grid = q.layout.scales[0]
    blocks = grid[0] not in (1, WHOLE) or (grid[0] == WHOLE and grid[1] != WHOLE)
    # The library unpacks zero points of channels and groups only.
    adapt = each_output if blocks or (q.zeros and grid == TENSOR) else same
    q = jax.eval_shape(adapt, q)
    grid, code, shape = q.layout.scales[0], q.layout.code, _side_shape(q)
    form = "pack-quantized" if q.act is None else "int-quantized"
    settings = _settings(q, {"num_bits": code.bits, "type": "int", **_strategy(grid)}, form)
    if isinstance(settings, str):
        return settings
    if q.act is not None:
        return Arrangement(adapt, scaled(q, "weight_scale", shape, form), settings)
    out, inputs = q.shape
    packed = (cells(out * code.bits, 32), shape[-1])
    spec = PackedSpec(
        kind=form,
        code=code,
        scales=(Leaf(grid, q.scales[0].dtype.name),),
        zeros=(Leaf(grid, "uint8"),) if q.zeros else (),
        affine=q.layout.affine,
        logical=(out, inputs),
        group=grid[1] or None,
        padded=False,
        words=cells(inputs * code.bits, 32),
        scale=Side("weight_scale", disk_dtype(q.scales[0].dtype), shape),
        zero=Side("weight_zero_point", "I32", packed) if q.zeros else None,
        shape_disk=Side("weight_shape", "I64", (2,)),
        g_idx=None,
        act_disk=None,
        act_zero_disk=None,
    )
    return Arrangement(adapt, spec, settings)


def _float8(q: QTensor) -> Arrangement | str:
    if len(q.scales) != 1 or q.zeros:
        return f"{len(q.scales)} scales and {len(q.zeros)} zero points"
    grid, exponents = q.layout.scales[0], q.scales[0].dtype.name == "float8_e8m0fnu"
    if exponents and grid != (1, 32):
        return f"power-of-two scales of {grid}"
    if not exponents and (reason := unscaled(q)):
        return reason
    if grid not in (TENSOR, CHANNEL) and WHOLE in grid:
        return f"scales of {grid}"
    weights = {"num_bits": 8, "type": "float", **_strategy(grid)}
    form = "naive-quantized" if q.act is None else "float-quantized"
    if exponents:
        weights["scale_dtype"], form = EXPONENTS, "mxfp8-quantized"
    settings = _settings(q, weights, form)
    if isinstance(settings, str):
        return settings
    return Arrangement(same, scaled(q, "weight_scale", _side_shape(q), form), settings)


def _fp4(q: QTensor) -> Arrangement | str:
    names = [scale.dtype.name for scale in q.scales]
    grids, (out, inputs) = q.layout.scales, q.shape
    if names == ["float8_e4m3fn", "float32"] and grids == ((1, 16), TENSOR):
        kind, group, disk, dtype = "nvfp4", 16, "F8_E4M3", "torch.float8_e4m3fn"
    elif names == ["float8_e8m0fnu"] and grids == ((1, 32),):
        kind, group, disk, dtype = "mxfp4", 32, "U8", EXPONENTS
    else:
        return f"e2m1 codes with {' x '.join(names)} scales"
    if inputs % group:
        return f"{inputs} inputs, no multiple of {group}"
    weights = {"num_bits": 4, "type": "float", "group_size": group, "scale_dtype": dtype}
    weights["strategy"] = "tensor_group" if kind == "nvfp4" else "group"
    settings = _settings(q, weights, f"{kind}-pack-quantized")
    if isinstance(settings, str):
        return settings
    calibrated = q.act_scale is not None
    if q.act is not None and kind == "nvfp4" and not calibrated:
        return "activations in NVFP4 without a calibrated scale (nvfp4a16 needs none)"
    spec = Fp4Spec(
        kind=kind,
        code=q.layout.code,
        scales=tuple(map(Leaf, grids, names)),
        act=q.act,
        act_scale=calibrated,
        data=Side("weight_packed", "U8", (out, inputs // 2)),
        block=Side("weight_scale", disk, (out, inputs // group)),
        tensor=Side("weight_global_scale", "F32", (1,)) if kind == "nvfp4" else None,
        act_disk=Side("input_global_scale", "F32", (1,)) if calibrated else None,
        reciprocal=True,
    )
    return Arrangement(same, spec, settings)
