"""bitsandbytes checkpoints: LLM.int8 rows, and 4-bit codebooks (NF4, FP4).

int8    ``weight`` I8 [out, in], ``SCB`` F32 [out] (the row's largest magnitude),
        ``weight_format`` U8 [] = 0; value = code x SCB / 127
4 bit   ``weight`` U8 [n, 1], high nibble first, row-major; ``weight.quant_map`` F32 [16];
        ``weight.absmax`` F32 [blocks], or U8 with ``weight.nested_absmax`` and
        ``weight.nested_quant_map`` (double quantization); the shape is in the JSON of
        ``weight.quant_state.bitsandbytes__nf4``
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES, Code
from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.formats.base import (
    CHANNEL,
    TENSOR,
    Coverage,
    Format,
    Leaf,
    RawModule,
    RawTensor,
    Slot,
    Spec,
    method_of,
    numpy_dtype,
)
from jaxquant.formats.names import by_component, string_list
from jaxquant.formats.scaled import weight_shape

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
FOUR_BIT = ("weight.absmax", "weight.quant_map", *STATES)
MAX_STATE_BYTES = 1 << 16
INVERSE_127 = np.float32(1 / 127)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourBitSpec(Spec):
    """Spec of a 4-bit weight.

    Attributes:
        state: suffix of the quantization state.
        text: the state's JSON.
        logical: (out, in).
        storage: dtype and shape of the codes on disk.
        nested_block: absmax entries to a second-level scale, 0 for none.
        nested_offset: what is added to decoded absmax entries.
    """

    state: str
    text: bytes
    logical: tuple[int, int]
    storage: tuple[str, tuple[int, ...]]
    nested_block: int = 0
    nested_offset: float = 0.0


def _coverage(config: Mapping[str, Any]) -> Coverage:
    return Coverage(string_list(config, "llm_int8_skip_modules"), by_component)


def _spec(config: Mapping[str, Any], module: RawModule) -> Spec:
    if module.get("SCB") is not None:
        return _rows(module)
    return _four_bit(module)


def _rows(module: RawModule) -> Spec:
    weight, absmax = module.need("weight"), module.need("SCB")
    order = module.get("weight_format")
    if weight.dtype != "I8":
        raise weight.error(f"dtype {weight.dtype} beside SCB", "LLM.int8 weights are I8")
    if order is not None and (order.shape not in ((), (1,)) or order.read().any()):
        raise order.error("a tiled order", "row-major weights (0) are read")
    rows = weight_shape(module)[0]
    if absmax.shape != (rows,):
        raise absmax.error(f"shape {list(absmax.shape)}", f"[{rows}]")
    return Spec(
        kind="int8" if order is None else "int8-format",
        code=CODES["int8"],
        scales=(Leaf(CHANNEL, "float32"), Leaf(TENSOR, "float32")),
    )


def _state(tensor: RawTensor) -> tuple[bytes, Mapping[str, Any]]:
    if tensor.dtype != "U8" or tensor.nbytes > MAX_STATE_BYTES:
        raise tensor.error(f"{tensor.dtype}, {tensor.nbytes} bytes", "a short JSON text in U8")
    text = tensor.read().tobytes()
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise tensor.error(f"not valid JSON ({error})", "the quantization state") from None
    if not isinstance(state, dict):
        raise tensor.error("no JSON object", "the quantization state")
    return text, state


def _four_bit(module: RawModule) -> FourBitSpec:
    weight = module.need("weight")
    present = [name for name in STATES if module.get(name) is not None]
    if len(present) != 1:
        raise module.error(
            f"{len(present)} quantization states",
            f"one of {' and '.join(STATES)}",
            "the weight's shape is only known from it: export the checkpoint again",
        )
    tensor = module.need(present[0])
    text, state = _state(tensor)
    shape, block = state.get("shape"), state.get("blocksize")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or any(type(n) is not int or n < 1 for n in shape)
        or type(block) is not int
        or block < 1
    ):
        raise tensor.error(f"shape {shape!r}, blocksize {block!r}", "[out, in] and a block size")
    out, inputs = shape
    if out * inputs != 2 * weight.nbytes:
        raise weight.error(f"{weight.nbytes} bytes", f"{out} x {inputs} codes, two to a byte")
    if inputs % block == 0:
        grid = (1, block)
    elif block % inputs == 0 and out % (block // inputs) == 0:
        grid = (block // inputs, WHOLE)
    else:
        raise tensor.error(
            f"blocks of {block} over rows of {inputs}", "blocks do not straddle rows"
        )
    absmax, nested = module.need("weight.absmax"), absmax_is_nested(module)
    if absmax.shape != (out * inputs // block,):
        raise absmax.error(f"shape {list(absmax.shape)}", f"[{out * inputs // block}]")
    table = module.need("weight.quant_map")
    if table.dtype != "F32" or table.shape != (16,):
        raise table.error(f"{table.dtype} {list(table.shape)}", "F32 [16]")
    offset = state.get("nested_offset", 0.0)
    inner = state.get("nested_blocksize", 256)
    if nested and (type(inner) is not int or inner < 1 or not isinstance(offset, int | float)):
        raise tensor.error(f"nested_blocksize {inner!r}", "a positive size and a number")
    name = str(state.get("quant_type") or present[0][-3:])
    return FourBitSpec(
        kind=name,
        code=Code(name, 4, "table", "uint8", tuple(map(float, table.read()))),
        scales=(Leaf(grid, "float32"),),
        state=present[0],
        text=text,
        logical=(out, inputs),
        storage=(weight.dtype, weight.shape),
        nested_block=inner if nested else 0,
        nested_offset=float(offset),
    )


def absmax_is_nested(module: RawModule) -> bool:
    """Whether block scales are themselves quantized; all of its tensors must then be there."""
    if module.need("weight.absmax").dtype != "U8":
        return False
    for name in NESTED:
        module.need(name)
    return True


def _shape(spec: Spec, module: RawModule) -> tuple[int, int]:
    return spec.logical if isinstance(spec, FourBitSpec) else weight_shape(module)


def _slots(spec: Spec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    if not isinstance(spec, FourBitSpec):
        named = spec.kind == "int8-format"
        return (
            Slot("weight", ("I8",), (shape,)),
            Slot("SCB", ("F32",), ((shape[0],),)),
            Slot("weight_format", ("U8",), ((), (1,)), named),
        )
    slots = [
        Slot("weight", (spec.storage[0],), (spec.storage[1],)),
        Slot("weight.quant_map", ("F32",), ((16,),)),
        Slot(spec.state, ("U8",)),
    ]
    if not spec.nested_block:
        return (*slots, Slot("weight.absmax", ("F32",)))
    grid = spec.scales[0].grid
    blocks = shape[0] * shape[1] // (grid[0] * (grid[1] or shape[1]))
    return (
        *slots,
        Slot("weight.absmax", ("U8",)),
        Slot("weight.nested_absmax", ("F32",), ((-(-blocks // spec.nested_block),),)),
        Slot("weight.nested_quant_map", ("F32",), ((256,),)),
    )


def _decode(arrays: Mapping[str, np.ndarray], spec: Spec, shape: tuple[int, int]) -> QTensor:
    layout = spec.layout(shape)
    if not isinstance(spec, FourBitSpec):
        scales = (arrays["SCB"].reshape(-1, 1), INVERSE_127.reshape(1, 1))
        return QTensor((arrays["weight"],), scales, (), layout)
    octets = np.ascontiguousarray(arrays["weight"]).reshape(-1).view(np.uint8)
    data = ((octets >> np.uint8(4)) | (octets << np.uint8(4))).reshape(shape[0], shape[1] // 2)
    absmax = arrays["weight.absmax"]
    if absmax.dtype == np.uint8:
        outer = np.repeat(arrays["weight.nested_absmax"], spec.nested_block)[: absmax.size]
        absmax = arrays["weight.nested_quant_map"][absmax] * outer + np.float32(spec.nested_offset)
    grid = spec.scales[0].grid
    cells = (shape[0] // grid[0], 1 if grid[1] == WHOLE else shape[1] // grid[1])
    return QTensor((data,), (absmax.astype(np.float32).reshape(cells),), (), layout)


def _encode(q: QTensor, spec: Spec) -> dict[str, np.ndarray]:
    """The tensors on disk; block scales that were quantized are written as F32."""
    data = np.asarray(q.data[0])
    if not isinstance(spec, FourBitSpec):
        arrays = {"weight": data, "SCB": np.asarray(q.scales[0]).reshape(-1)}
        return arrays | (
            {"weight_format": np.zeros((), np.uint8)} if spec.kind == "int8-format" else {}
        )
    swapped = (data >> np.uint8(4)) | (data << np.uint8(4))
    dtype, shape = spec.storage
    return {
        "weight": swapped.reshape(-1).view(numpy_dtype(dtype)).reshape(shape),
        "weight.quant_map": np.array(spec.code.table, np.float32),
        "weight.absmax": np.asarray(q.scales[0]).reshape(-1),
        spec.state: np.frombuffer(spec.text, np.uint8),
    }


BITSANDBYTES = Format(
    "bitsandbytes",
    lambda config: (
        method_of(config) == "bitsandbytes"
        or (not method_of(config) and bool({"load_in_8bit", "load_in_4bit"} & set(config)))
    ),
    ("SCB", *FOUR_BIT),
    ("weight", "SCB", "weight_format", *FOUR_BIT, *NESTED),
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
)
