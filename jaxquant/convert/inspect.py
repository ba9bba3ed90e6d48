"""What is in a checkpoint, as a table: every tensor once, with its format, shape and scales."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.arguments import path_of
from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.item import Item
from jaxquant.convert.name_map import NameMap, read_names, rename, renamed
from jaxquant.convert.plan_file import read_plan
from jaxquant.convert.read import QuantizedModule, survey
from jaxquant.convert.read_checkpoint import open_checkpoint
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.convert.report import LoadReport, make_report
from jaxquant.convert.save import is_saved
from jaxquant.convert.saved_source import saved_source
from jaxquant.convert.source import open_source
from jaxquant.errors import ConfigError
from jaxquant.models import build_model

Names = NameMap | str | Path | None
COLUMNS = ["tensor", "format", "shape", "bits/weight", "bytes"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
        name: module path of a linear, tensor name of anything else.
        format: checkpoint format and layout; the dtype for what is no linear.
        shape: logical shape.
        bits: bits per weight on disk.
        nbytes: bytes on disk.
        scales: smallest and largest scale, its levels multiplied; None where there is none.
        origin: checkpoint it comes from.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bits: float
    nbytes: int
    scales: tuple[float, float] | None
    origin: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows and closing lines; ``as_json`` gives the same as plain data.

    Attributes:
        entries: the rows.
        summary: what follows them.
        plan: for a dry run, what loading would report; its rows show where a tensor comes from, in
            place of scales that nobody has read.
    """

    entries: tuple[Entry, ...]
    summary: str
    plan: LoadReport | None = None

    @property
    def columns(self) -> list[str]:
        """Column titles."""
        return [*COLUMNS, "scales" if self.plan is None else "from"]

    def _last(self, entry: Entry) -> str:
        if self.plan is not None:
            return entry.origin
        return "-" if entry.scales is None else "{:.3g} .. {:.3g}".format(*entry.scales)

    @property
    def rows(self) -> list[list[str]]:
        """Cells as text."""
        return [
            [
                e.name,
                e.format,
                "x".join(map(str, e.shape)),
                f"{e.bits:.2f}",
                str(e.nbytes),
                self._last(e),
            ]
            for e in self.entries
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {"tensors": [dataclasses.asdict(e) for e in self.entries], "summary": self.summary}
        return data if self.plan is None else data | {"plan": self.plan.as_json()}


def _bits(nbytes: int, shape: tuple[int, ...]) -> float:
    return 8 * nbytes / max(1, int(np.prod(shape, dtype=np.int64)))


def _scale_range(scales: np.ndarray | None) -> tuple[float, float] | None:
    if scales is None or not scales.size:
        return None
    values = scales.astype(np.float32)
    return float(values.min()), float(values.max())


# Scales of activations; and marks of scales that need more than a look at one tensor: bitsandbytes
# stores largest magnitudes, which may be codes themselves, and HQQ may quantize its scales.
_OF_ACTIVATIONS = ("input", "act", "pre_quant")
_DERIVED = ("SCB", "weight.absmax", "quant_scale")


def _product(scales: Iterable[np.ndarray]) -> np.ndarray | None:
    levels = [scale.astype(np.float32) for scale in scales]
    return functools.reduce(np.multiply, levels) if levels else None


def module_scales(module: QuantizedModule) -> np.ndarray | None:
    """What multiplies the codes of a module, all levels multiplied; None where nothing does.

    The weight itself is read only where its scales have several levels, or another form on disk.
    """
    leaves = module.abstract().scales
    stored = [
        tensor
        for name, tensor in module.raw.items()
        if ("scale" in name or name == "s") and not any(word in name for word in _OF_ACTIVATIONS)
    ]
    if not leaves:
        return None
    plain = len(leaves) == len(stored) == 1 and not any(name in module.raw for name in _DERIVED)
    if not plain or math.prod(stored[0].shape) != leaves[0].size:
        return _product(module.load().scales)
    scales = stored[0].read()
    e8m0 = leaves[0].dtype == ml_dtypes.float8_e8m0fnu and scales.dtype == np.uint8
    return scales.view(ml_dtypes.float8_e8m0fnu) if e8m0 else scales


def _saved_entries(path: Path) -> list[Entry]:
    source = saved_source(path)
    entries = [
        _entry(name, item) for name, item in (*source.weights.items(), *source.arrays.items())
    ]
    scales = {name: _product(item.load().scales) for name, item in source.weights.items()}
    ranges = {name: _scale_range(value) for name, value in scales.items()}
    return [dataclasses.replace(entry, scales=ranges.get(entry.name)) for entry in entries]


def _directory_entries(path: Path, names: Names) -> list[Entry]:
    contents = survey(open_checkpoint(path))
    new = renamed(names, contents.modules, contents.tensors, str(path))
    entries = []
    for name, module in contents.modules.items():
        scales = module_scales(module)
        label = f"{module.format.name} {module.layout}"
        bits = _bits(module.nbytes, module.shape)
        shown = new.modules.get(name, name)
        row = Entry(
            shown, label, module.shape, bits, module.nbytes, _scale_range(scales), str(path)
        )
        entries.append(row)
    for name, tensor in contents.tensors.items():
        bits = _bits(tensor.nbytes, tensor.shape)
        shown = new.tensors.get(name, name)
        entries.append(
            Entry(shown, tensor.dtype, tensor.shape, bits, tensor.nbytes, None, str(path))
        )
    return entries


def _gguf_entries(path: Path, names: Names) -> list[Entry]:
    file = open_gguf(path)
    new = rename(read_names(names), file.tensors, str(path))

    return [
        Entry(
            new.get(name, name),
            tensor.dtype,
            tensor.shape,
            _bits(tensor.nbytes, tensor.shape),
            tensor.nbytes,
            _scale_range(file.scales(name)),
            str(path),
        )
        for name, tensor in file.tensors.items()
    ]


def inspect_checkpoint(path: str | Path, names: Names = None) -> Report:
    """List every tensor of a checkpoint.

    Args:
        path: a directory, a ``.gguf`` file, or a directory that ``save_pretrained`` wrote.
        names: name map whose new names are shown; see :mod:`jaxquant.convert.name_map`.
    Raises:
        FormatError: the checkpoint breaks its format.
        ConfigError, PlanError: a name map that is not valid or does not fit.
    """
    path = path_of("path", path)
    if is_saved(path):
        if names is not None:
            rule = f"{path} is converted already"
            raise ConfigError("names", str(names)[:200], rule, "use the original checkpoint")
        entries = _saved_entries(path)
    elif path.suffix == ".gguf":
        entries = _gguf_entries(path, names)
    else:
        entries = _directory_entries(path, names)
    total = sum(e.nbytes for e in entries)
    weights = sum(int(np.prod(e.shape, dtype=np.int64)) for e in entries)
    summary = (
        f"{len(entries)} tensors, {total / 2**20:.2f} MiB, {_bits(total, (weights,)):.2f} bits"
    )
    return Report(tuple(entries), f"{summary} per weight")


def _entry(name: str, item: Item) -> Entry:
    """A row of an item as it is in memory, without scales."""
    value = item.abstract
    quantized = isinstance(value, QTensor)
    size = value.nbytes if quantized else value.size * value.dtype.itemsize
    label = f"{item.format} {value.layout}" if quantized else str(value.dtype)
    bits = _bits(size, tuple(value.shape))
    return Entry(name, label, tuple(value.shape), bits, size, None, item.origin)


def inspect_plan(path: str | Path, plan: str | Path, names: Names = None) -> Report:
    """What would be loaded from where under a mixed-precision plan.

    Of weights only a few are read, those that show whether checkpoints fit together.

    Raises:
        ConfigError, PlanError, FormatError: as loading with the plan would.
    """
    source = open_source(path, read_plan(plan), names)
    weights = {name: item.abstract for name, item in source.weights.items()}
    arrays = {name: item.abstract for name, item in source.arrays.items()}
    build_model(source.config, weights, arrays)
    items = [*source.weights.items(), *source.arrays.items()]
    report = make_report(source)
    return Report(tuple(_entry(name, item) for name, item in items), str(report), report)
