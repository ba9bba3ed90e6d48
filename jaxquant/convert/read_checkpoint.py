"""Open a checkpoint directory: which files, which tensors, which config.  Nothing is read yet.

>>> checkpoint = open_checkpoint("Qwen3-8B-FP8")                              # doctest: +SKIP
>>> checkpoint.tensors["model.norm.weight"].shape                             # doctest: +SKIP
(4096,)
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.convert.read_json import load_object, parse, scan_object
from jaxquant.convert.read_safetensors import map_file, read_safetensors
from jaxquant.errors import FormatError
from jaxquant.formats.base import FormatWarning, RawTensor, method_of
from jaxquant.models.config import FAMILIES

MAX_INDEX_BYTES = 64 << 20
MAX_FILE_NAME = 200
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
SIDE_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors with its configs; tensors are read one by one on demand.

    Attributes:
        path: the directory.
        config: ``config.json``, ``{}`` where there is none; where it describes several models, the
            language model's part of it.
        quant_config: the description of the quantization, None for an unquantized checkpoint.
        tensors: every tensor by name, unread.
        metadata: ``__metadata__`` strings of all files.
        quant_file: name of the file that describes the quantization.
        several: whether ``config.json`` describes other models beside the language model.
    """

    path: Path
    config: Mapping[str, Any]
    quant_config: Mapping[str, Any] | None
    tensors: Mapping[str, RawTensor]
    metadata: Mapping[str, str]
    quant_file: str = "config.json"
    several: bool = False

    @property
    def method(self) -> str:
        """The normalised ``quant_method``, "" for an unquantized checkpoint."""
        return method_of(self.quant_config or {})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _root(directory: Path) -> Path:
    """Where links of a checkpoint may lead: the directory, or a hub cache's whole entry."""
    resolved = directory.resolve()
    return resolved.parent.parent if resolved.parent.name == "snapshots" else resolved


def member_file(directory: Path, name: str, where: str) -> Path:
    """The file ``name`` of ``directory``.

    Raises:
        FormatError: the name has a separator, is no plain name, is missing or links out.
    """
    rule = "a plain file name in the checkpoint's folder"
    odd = not name.isprintable() or len(name) > MAX_FILE_NAME or name in ("", ".", "..")
    if odd or "/" in name or "\\" in name:
        raise FormatError(where, f"file {name[:80]!r}", rule)
    path = directory / name
    if not path.is_file():
        raise FormatError(where, f"file {name!r} does not exist", rule, "download it")
    if not path.resolve().is_relative_to(_root(directory)):
        raise FormatError(where, f"file {name!r} links to {path.resolve()}", rule)
    return path


def _single_file(directory: Path) -> list[str]:
    """Names of the weight files of a directory without an index."""
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    shards = [n for n in names if re.search(r"-\d{5}-of-\d{5}\.safetensors$", n)]
    if shards:
        count = int(shards[0][-17:-12])
        if len(shards) != count:
            raise FormatError(
                str(directory), f"{len(shards)} of {count} shards", "every shard is present"
            )
        return shards
    own = [n for n in names if not n.startswith("consolidated")] or names
    if len(own) == 1:
        return own
    if own:
        raise FormatError(
            str(directory),
            f"several weight files and no index: {', '.join(own[:8])}",
            "one file, or model.safetensors.index.json",
        )
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        raise FormatError(
            str(directory),
            f"only pickled weights ({', '.join(pickles[:4])})",
            "a pickle can run any code when it is read",
            "convert it to safetensors with the tool that made it (save_pretrained writes them)",
        )
    raise FormatError(str(directory), "no .safetensors file", "a checkpoint directory has weights")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name of ``model.safetensors.index.json``."""
    where = str(path)
    buffer = map_file(path)
    if len(buffer) > MAX_INDEX_BYTES:
        raise FormatError(where, f"{len(buffer)} bytes", f"at most {MAX_INDEX_BYTES}")
    names: dict[str, str] = {}
    files: dict[str, str] = {}
    members: set[str] = set()
    for member, low, high in scan_object(buffer, where, 0, len(buffer)):
        if member in members:
            raise FormatError(where, f"key {member!r} twice", "keys are unique")
        members.add(member)
        if member != "weight_map":
            continue
        for name, start, stop in scan_object(buffer, f"{where}: weight_map", low, high):
            if name in names:
                raise FormatError(f"{where}: {name}", "twice in weight_map", "names are unique")
            file = parse(buffer[start:stop], f"{where}: {name}")
            if not isinstance(file, str):
                raise FormatError(f"{where}: {name}", f"{str(file)[:80]}", "a file name")
            names[name] = files.setdefault(file, file)
    if "weight_map" not in members:
        raise FormatError(where, "no weight_map", "it says which file holds which tensor")
    return names


def _same_bytes(a: RawTensor, b: RawTensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = (np.ravel(t.read()).view(np.uint8) for t in (a, b))
    step = 1 << 20
    return all(
        np.array_equal(left[i : i + step], right[i : i + step]) for i in range(0, left.size, step)
    )


def _read_shards(directory: Path, index: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Exactly the tensors that the index lists, each from the file that it names."""
    wanted = _read_index(index)
    stored: dict[str, dict[str, RawTensor]] = {}
    metadata: dict[str, str] = {}
    homes: dict[str, str] = {}
    unlisted: list[str] = []
    for file in dict.fromkeys(wanted.values()):
        content = read_safetensors(member_file(directory, file, str(index)))
        stored[file] = content.tensors
        metadata |= content.metadata
        for name, tensor in content.tensors.items():
            first = homes.setdefault(name, file)
            if first != file and not _same_bytes(stored[first][name], tensor):
                raise tensor.error(
                    f"also in {first}, with other content", "a tensor is stored once"
                )
            if name not in wanted:
                unlisted.append(name)
    if unlisted:
        warnings.warn(
            f"{index}: {len(unlisted)} tensors are not listed and ignored, e.g. {unlisted[0]}",
            FormatWarning,
            stacklevel=4,
        )
    missing = [name for name, file in wanted.items() if name not in stored[file]]
    if missing:
        raise FormatError(
            f"{directory / wanted[missing[0]]}: {missing[0]}",
            f"missing ({len(missing)} such tensors)",
            f"{index.name} says that it is here",
            "download the shard again",
        )
    return {name: stored[file][name] for name, file in wanted.items()}, metadata


def _section(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any] | None:
    value = config.get(key)
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {key}", f"a JSON {type(value).__name__}", "an object or null")
    return value


def _language_config(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The language model's part of a multimodal model's config, None where it is the whole.

    Its words of the end and whether its output is the embedding may stand outside.
    """
    if "num_hidden_layers" in config:
        return None
    for key in TEXT_CONFIGS:
        section = _section(config, key, where)
        if section is not None and "num_hidden_layers" in section:
            outer = ("model_type", "eos_token_id", "bos_token_id", "tie_word_embeddings")
            part = {name: config[name] for name in outer if name in config} | section
            # The architecture is the whole's; that of the part follows from its type.
            family = FAMILIES.get(str(part.get("model_type")))
            return part if family is None else {"architectures": [family]} | part
    return None


def _find_quant_config(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """The quantization's description, from config.json or a side file, and the file's name."""
    where = str(directory / "config.json")
    nested = (_section(config, key, where) for key in TEXT_CONFIGS)
    for section in (config, *filter(None, nested)):
        if (found := _section(section, "quantization_config", where)) is not None:
            return _named(found) or found, "config.json"
        if (found := _section(section, "compression_config", where)) is not None:
            inner = _section(found, "quantization_config", where) or found
            return {"quant_method": "compressed-tensors"} | inner, "config.json"
    found = {n: load_object(directory / n) for n in SIDE_FILES if (directory / n).is_file()}
    if len(found) > 1:
        raise FormatError(
            str(directory),
            f"quantization described by {' and '.join(found)}",
            "one description",
            "keep the file of the method that made this checkpoint",
        )
    for name, side in found.items():
        return _side_config(name, side, str(directory / name)), name
    return _mistral_config(directory / "params.json"), "params.json"


def _mistral_config(path: Path) -> dict[str, Any] | None:
    """Mistral's own description: ``params.json`` with a "quantization" object."""
    if not path.is_file():
        return None
    section = _section(load_object(path), "quantization", str(path))
    if section is None:
        return None
    if section.get("qformat_weight") != "fp8_e4m3":
        raise FormatError(f"{path}: quantization", repr(section)[:80], "qformat_weight fp8_e4m3")
    return {"quant_method": "fp8", "fmt": "e4m3"}


def _side_config(name: str, side: dict[str, Any], where: str) -> dict[str, Any]:
    """Bring a side file's content into the form of a ``quantization_config``."""
    if name == "hf_quant_config.json":
        inner = _section(side, "quantization", where) or side
        ignore = inner.get("exclude_modules") or inner.get("ignore") or []
        return {"quant_method": "modelopt"} | inner | {"ignore": ignore}
    named = _named(side)
    if named is None:
        raise FormatError(where, f"keys {sorted(side)[:8]}", "a known quantizer's config")
    return named


def _named(config: dict[str, Any]) -> dict[str, Any] | None:
    """The config with its ``quant_method``; old ones lack it and are known by their keys."""
    if config.get("quant_method"):
        return config
    if {"w_bit", "q_group_size", "version", "zero_point"} & set(config):
        return config | {"quant_method": "awq"}
    if {"bits", "desc_act"} <= set(config):
        return config | {"quant_method": "gptq"}
    if "wbits" in config:
        return config | {"quant_method": "qoq"}
    return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory without reading any tensor.

    Args:
        path: a directory with one safetensors file, or shards and their index.
    Raises:
        FormatError: the directory, a header, the index or a config breaks its rules; pickled
            weights are refused.
    """
    directory = Path(path)
    if directory.is_file() and directory.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise FormatError(
            str(path),
            "a pickle",
            "a pickle can run any code when it is read",
            "convert it to safetensors with the tool that made it",
        )
    if not directory.is_dir():
        raise FormatError(str(path), "no such directory", "a checkpoint directory")
    config_path = directory / "config.json"
    config = load_object(config_path) if config_path.is_file() else {}
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        indexes = [p for p in indexes if p.name == "model.safetensors.index.json"] or indexes
        if len(indexes) > 1:
            raise FormatError(str(path), f"indexes {[p.name for p in indexes]}", "one index")
    if indexes:
        index = member_file(directory, indexes[0].name, str(directory))
        tensors, metadata = _read_shards(directory, index)
    else:
        tensors, metadata = {}, {}
        for name in _single_file(directory):
            content = read_safetensors(member_file(directory, name, str(directory)))
            for key, tensor in content.tensors.items():
                if key in tensors and not _same_bytes(tensors[key], tensor):
                    raise tensor.error(f"also in {tensors[key].file}", "a tensor is stored once")
                tensors[key] = tensor
            metadata |= content.metadata
    quant_config, quant_file = _find_quant_config(directory, config)
    language = _language_config(config, str(config_path))
    several = language is not None
    config = config if language is None else language
    return Checkpoint(directory, config, quant_config, tensors, metadata, quant_file, several)
