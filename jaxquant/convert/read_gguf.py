"""Open a GGUF file, or all files of a split one, and read any of its tensors.

This works for every architecture: names and row order are those of the file.  What a known
architecture makes of them is :mod:`jaxquant.convert.gguf_model`.

>>> file = open_gguf("model.Q4_K_M.gguf")                                     # doctest: +SKIP
>>> file.qtensor("blk.0.attn_q.weight")                                       # doctest: +SKIP
QTensor([4096, 4096] uint4[out,in] scale 1x32 * 1x256 offset 1x32 * 1x256)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.gguf_header import Header, TensorInfo, parse_header
from jaxquant.convert.name_map import NameMap, read_names, rename
from jaxquant.convert.read_safetensors import map_file
from jaxquant.errors import FormatError
from jaxquant.formats import gguf
from jaxquant.formats.gguf_types import GgmlType

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_QUANTIZATION_VERSION = 2


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, not read yet.

    Attributes:
        name: full name in the file.
        kind: its element type.
        shape: slowest axis first, ``[*lead, out, in]`` for weights.
        file: file it lies in, for error messages.
        read: returns all its bytes, uint8 ``[nbytes]``, a read-only view of the file.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    file: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def dtype(self) -> str:
        """Name of the element type, e.g. ``"Q4_K"``."""
        return self.kind.name

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        elements = int(np.prod(self.shape, dtype=np.int64))
        return elements // self.kind.elements * self.kind.bytes

    @property
    def where(self) -> str:
        """File and name, for error messages."""
        return f"{self.file}: {self.name}"

    def error(self, found: str, rule: str = "", action: str = "") -> FormatError:
        """An error about this tensor."""
        return FormatError(self.where, found, rule, action)

    def reshaped(self, shape: tuple[int, ...]) -> GgufTensor:
        """The same bytes with further axes of extent 1."""
        return dataclasses.replace(self, shape=shape)

    @property
    def is_weight(self) -> bool:
        """Whether it can be a QTensor: two axes or more, of a type that holds weights."""
        integers = self.dtype.startswith("I") and self.dtype in gguf.PLAIN_DTYPES
        return len(self.shape) > 1 and not integers


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An open GGUF file (all parts of a split one).

    Attributes:
        path: the (first) file.
        version: of the format.
        metadata: the key-value section, decoded on access.
        tensors: every tensor by name, unread.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def tensor(self, name: str) -> GgufTensor:
        """The tensor called ``name``; FormatError when there is none."""
        if name not in self.tensors:
            raise FormatError(str(self.path), f"no tensor {name!r}", "a tensor of the file")
        return self.tensors[name]

    def array(self, name: str) -> np.ndarray:
        """Decode a tensor to float32 (plain integers keep their dtype), bit for bit.

        Raises:
            FormatError: no such tensor, or its content is damaged.
        """
        tensor = self.tensor(name)
        return gguf.dequantize(tensor.read(), tensor.kind, tensor.shape, tensor.where)

    def qtensor(self, name: str) -> QTensor:
        """Read a weight ``[*lead, out, in]`` as it is packed, with its tensor scale if it has one.

        Raises:
            FormatError: no such tensor, it is no weight, or its content is damaged.
        """
        tensor = self.tensor(name)
        if not tensor.is_weight:
            found = f"{tensor.dtype} of {len(tensor.shape)} axes"
            raise FormatError(tensor.where, found, "a weight has two axes or more of numbers")
        scale = self.tensor_scale(tensor)
        return gguf.decode(tensor.read(), tensor.kind, tensor.shape, tensor.where, scale)

    def scales(self, name: str) -> np.ndarray | None:
        """The scales of a quantized tensor, float32 ``[blocks, scales]``; None for plain numbers.

        Raises:
            FormatError: no such tensor, or its scales are damaged.
        """
        tensor = self.tensor(name)
        return gguf.scales_of(tensor.read(), tensor.kind, tensor.shape, tensor.where)

    def tensor_scale(self, tensor: GgufTensor) -> np.ndarray | None:
        """The float32 factor of an NVFP4 tensor: one number, or one for each stacked weight."""
        if tensor.dtype != "NVFP4":
            return None
        name = tensor.name.removesuffix(".weight") + ".scale"
        return self.array(name) if name in self.tensors else None


def _as_tensor(info: TensorInfo, buffer: Any, file: str) -> GgufTensor:
    def read() -> np.ndarray:
        return np.frombuffer(buffer, np.uint8, info.nbytes, info.offset)

    return GgufTensor(info.name, info.kind, info.shape, file, read)


def _shards(path: Path, header: Header) -> list[Path]:
    """All files that the first one's metadata asks for, in order."""
    count = header.metadata.get("split.count", 1)
    named = _SHARD.fullmatch(path.name)
    if not isinstance(count, int) or count < 1:
        raise FormatError(f"{path}: split.count", f"{count!r}"[:80], "a positive number")
    if count == 1:
        return [path]
    if named is None or int(named[3]) != count:
        rule = f"the parts of a split file are called NAME-00001-of-{count:05d}.gguf and so on"
        raise FormatError(str(path), f"one of {count} parts", rule, "restore the names")
    return [path.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf") for i in range(1, count + 1)]


def _open_shard(path: Path) -> tuple[Header, dict[str, GgufTensor]]:
    buffer = map_file(path)
    header = parse_header(buffer, str(path))
    return header, {info.name: _as_tensor(info, buffer, str(path)) for info in header.tensors}


def _is(value: Any, number: int) -> bool:
    """Whether a metadata value of any type is this number."""
    return isinstance(value, int) and value == number


def _check_quantization(header: Header, tensors: Mapping[str, GgufTensor], path: Path) -> None:
    """Refuse blocks of the time before version 2, whose nibbles lay in another order."""
    version = header.metadata.get("general.quantization_version", _QUANTIZATION_VERSION)
    blocks = any(tensor.kind.elements > 1 for tensor in tensors.values())
    if blocks and not _is(version, _QUANTIZATION_VERSION):
        raise FormatError(
            f"{path}: general.quantization_version",
            f"{version!r}"[:80],
            f"blocks of version {_QUANTIZATION_VERSION} are read",
            "quantize the model again",
        )


def open_gguf(path: str | Path) -> Gguf:
    """Open a GGUF file without reading any tensor.

    Args:
        path: the file, or any part ``NAME-0000i-of-0000N.gguf`` of a split one.
    Raises:
        FormatError: a header breaks a rule of the format, a part is missing, or parts contradict
            each other.
    """
    path = Path(path)
    if named := _SHARD.fullmatch(path.name):
        path = path.with_name(f"{named[1]}-00001-of-{named[3]}.gguf")
    first, tensors = _open_shard(path)
    files = _shards(path, first)
    for number, file in enumerate(files[1:], 1):
        header, more = _open_shard(file)
        part, count = header.metadata.get("split.no"), header.metadata.get("split.count")
        if not (_is(part, number) and _is(count, len(files))):
            rule = f"split.no {number} of split.count {len(files)}"
            raise FormatError(str(file), f"part {part} of {count}"[:80], rule)
        if both := tensors.keys() & more.keys():
            raise more[min(both)].error("also in another part", "a tensor is stored once")
        tensors |= more
    total = first.metadata.get("split.tensors.count", len(tensors))
    if len(files) > 1 and not _is(total, len(tensors)):
        raise FormatError(str(path), f"{len(tensors)} tensors in all parts", f"{total!r}"[:80])
    _check_quantization(first, tensors, path)
    return Gguf(path, first.version, first.metadata, tensors)


def read_gguf_quantized(
    path: str | Path, names: NameMap | str | Path | None = None
) -> dict[str, QTensor]:
    """Read every weight of a GGUF file, of any architecture, without dequantizing.

    Args:
        path: the file, or any part of a split one.
        names: a name map, or a YAML file with one; see :mod:`jaxquant.convert.name_map`.
    Returns:
        QTensors ``[*lead, out, in]`` by the file's own module names, ``blk.0.attn_q``: rows of
        ``q`` and ``k`` in the file's order, experts stacked.  IQ1 to IQ3 are decoded to float32.
    Raises:
        FormatError: the file is damaged, or a codebook is missing.
        ConfigError: an entry of ``names`` is not valid.
        PlanError: entries of ``names`` that fit nothing, disagree or make two names one.
    """
    file = open_gguf(path)
    new = rename(read_names(names), file.tensors, str(path))
    return {
        new.get(name, name).removesuffix(".weight"): file.qtensor(name)
        for name, tensor in file.tensors.items()
        if tensor.is_weight
    }
