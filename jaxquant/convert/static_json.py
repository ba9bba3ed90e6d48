"""Static descriptions (configs, layouts, schemes) as JSON and back, exactly.

Frozen dataclasses become objects with their class name under ``"@"``; nothing but the classes
listed here is ever built from a file.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxquant.arrays.codes import CODES, Code
from jaxquant.arrays.layout import Layout
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.models.config import LatentConfig, ModelConfig, MoEConfig
from jaxquant.nn.mla import LatentHeads
from jaxquant.nn.moe import Routing
from jaxquant.nn.rope import Rope

_FLOATS = ("float8_e4m3fnuz", "float8_e5m2fnuz")
_CLASSES = {
    cls.__name__: cls
    for cls in (ActSpec, LatentConfig, LatentHeads, Layout, ModelConfig, MoEConfig, Rope, Routing)
}


def to_json(value: Any) -> Any:
    """Plain JSON data of a static value: numbers, strings, tuples, codes, known dataclasses.

    Raises:
        TypeError: the value has a part that is none of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Code):
        if CODES.get(value.name) == value:
            return {"@": "Code", "name": value.name}
        # A checkpoint's own: a codebook (bitsandbytes), or a float type that is stored only.
        return {"@": "Code", **dataclasses.asdict(value), "table": list(value.table)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if type(value).__name__ in _CLASSES:
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"@": type(value).__name__, **fields}
    raise TypeError(f"{type(value).__name__} is no static description")


def _code(fields: dict[str, Any]) -> Code | None:
    """A code by its name, or by all its fields; None where they do not describe one."""
    if set(fields) == {"name"}:
        return CODES.get(fields["name"]) if isinstance(fields["name"], str) else None
    if set(fields) != {f.name for f in dataclasses.fields(Code)}:
        return None
    name, bits, kind, dtype, table = (fields[f.name] for f in dataclasses.fields(Code))
    codebook = kind == "table" and bits in range(1, 8) and dtype == "uint8"
    if not isinstance(name, str) or not isinstance(table, list):
        return None
    if codebook and len(table) == 1 << bits:
        known = all(type(value) is float and math.isfinite(value) for value in table)
        return Code(name, bits, "table", dtype, tuple(table)) if known else None
    floats = kind == "float" and bits == 8 and dtype in _FLOATS and not table
    return Code(name, bits, "float", dtype) if floats else None


def from_json(data: Any, where: str) -> Any:
    """Inverse of :func:`to_json`; lists become tuples.

    Raises:
        FormatError: an unknown class, code or field.
    """
    if isinstance(data, list):
        return tuple(from_json(item, where) for item in data)
    if not isinstance(data, dict):
        return data
    fields = dict(data)
    name = fields.pop("@", None)
    if name == "Code" and (code := _code(fields)) is not None:
        return code
    cls = _CLASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(_CLASSES)
        raise FormatError(
            where,
            f"a description of {name!r} {fields.get('name', '')}",
            f"known: {known}",
            "convert the checkpoint again with this version",
        )
    expected = {f.name for f in dataclasses.fields(cls)}
    if set(fields) != expected:
        difference = sorted(set(fields) ^ expected)
        raise FormatError(
            where,
            f"{name} with other fields than this version's: {difference}",
            action="convert the checkpoint again with this version",
        )
    return cls(**{key: from_json(item, where) for key, item in fields.items()})
