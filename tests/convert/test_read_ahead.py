"""Files' memory is given back as soon as nothing loaded needs it."""

import mmap
from pathlib import Path

import numpy as np

from jaxquant.convert.item import Item
from jaxquant.convert.load import AHEAD, ReadAhead


def test_the_file_is_released_when_loaded_or_else_when_the_next_is_asked_for(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    released: list[str] = []
    values = {
        "own": lambda: np.ones(4, np.uint8),
        "view": lambda: np.frombuffer(mapped, np.uint8),
        # Scales that are views keep the whole weight's memory.
        "mixed": lambda: (np.ones(4, np.uint8), np.frombuffer(mapped, np.uint8)),
        "last": lambda: np.ones(4, np.uint8),
    }
    items = {
        name: Item(None, load, 1, "", "", lambda name=name: released.append(name))
        for name, load in values.items()
    }
    assert AHEAD == 2
    with ReadAhead(items, items, lambda _: None) as load:
        load("own")
        assert "own" in released and "view" not in released
        load("view")
        assert "view" not in released and "mixed" not in released
        load("mixed")
        assert "view" in released and "mixed" not in released
        load("last")
        assert "mixed" in released and "last" in released
