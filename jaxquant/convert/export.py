"""Writing a checkpoint in a format that other tools read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from jaxquant.convert.gguf_export import export_gguf
from jaxquant.convert.gguf_tokenizer import metadata_of
from jaxquant.convert.source import ModelSource, open_source
from jaxquant.errors import FormatError
from jaxquant.formats.base import FormatWarning


def export_checkpoint(path: str | Path, out: str | Path, kind: str | None = None) -> None:
    """Write a checkpoint as a GGUF file, one tensor at a time.

    Args:
        path: a checkpoint directory or ``.gguf`` file.
        out: the file to create.
        kind: Q8_0, Q4_0, F32, F16 or BF16 for all weights; None keeps every weight exactly, in its
            own blocks where GGUF has them and as floats where it has not.
    Raises:
        FormatError: ``out`` exists, or a file breaks its format.
        ConfigError: an unknown ``kind``, or a model that GGUF has no names for.
    """
    out = Path(out)
    if out.exists():
        raise FormatError(str(out), "it exists", "nothing is overwritten", "choose another file")
    source = open_source(path)
    items = {**source.arrays, **source.weights}
    export_gguf(
        out,
        source.config,
        {name: item.abstract for name, item in source.weights.items()},
        {name: item.abstract for name, item in source.arrays.items()},
        lambda name: items[name].load(),
        kind=kind,
        metadata=_tokenizer_metadata(source),
    )


def _tokenizer_metadata(source: ModelSource) -> dict[str, Any]:
    """The tokenizer beside a checkpoint as GGUF metadata; {} and a warning where it has no form."""
    import tokenizers

    file = source.path / "tokenizer.json"
    if not file.is_file():
        return {}
    special = {"eos": source.config.eos[0]} if source.config.eos else {}
    try:
        return metadata_of(tokenizers.Tokenizer.from_file(str(file)), special)
    except FormatError as error:
        warnings.warn(f"exported without a tokenizer: {error}", FormatWarning, stacklevel=3)
        return {}
