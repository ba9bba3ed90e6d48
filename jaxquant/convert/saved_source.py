"""A directory that ``save_pretrained`` wrote, as a source of weights by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jaxquant.convert.item import Item, ModelSource
from jaxquant.convert.save import LAYOUTS_FILE, Held, held_by, load_saved
from jaxquant.errors import FormatError
from jaxquant.models import ModelConfig
from jaxquant.transforms.numeric import as_numpy


def saved_source(path: str | Path) -> ModelSource:
    """Open a converted model; unlike other sources it is read whole, at its size on disk.

    Raises:
        FormatError: it is damaged, or was saved from a model that no checkpoint was read for.
    """
    path = Path(path)
    model = load_saved(path)
    if model.published is None:
        found = "no config.json is kept in it"
        rule = "it was converted by an older version, or from a model that was not loaded"
        raise FormatError(str(path / LAYOUTS_FILE), found, rule, "convert the checkpoint again")

    def item(held: Held) -> Item:
        def load() -> Any:
            return as_numpy(held.take())

        abstract = held.abstract
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        return Item(abstract, load, nbytes, "saved", str(path))

    weights, arrays = held_by(model)
    published = json.loads(model.published)
    if ModelConfig.from_hf(published).eos != model.config.eos:
        # Those of a generation_config.json, which is not kept.
        published["eos_token_id"] = list(model.config.eos)
    return ModelSource(
        path,
        model.config,
        published,
        {name: item(held) for name, held in weights.items()},
        {name: item(held) for name, held in arrays.items()},
        {},
    )
