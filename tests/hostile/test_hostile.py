"""Every hostile file gives one typed error that names the file, soon, and in little memory."""

import importlib
import sys

import jax
import pytest

from tests.hostile.harness import refused, write

READERS = (
    "safetensors",
    "index",
    "config",
    "quantization",
    "gguf",
    "gguf_model",
    "plan",
    "tokenizer",
)
TABLES = {name: importlib.import_module(f"tests.hostile.{name}_cases") for name in READERS}
ALL = {f"{reader}: {name}": (reader, name) for reader in READERS for name in TABLES[reader].CASES}
# The start of a backend leaves a thread behind for a while, which no reader is to blame for.
jax.devices()


@pytest.mark.parametrize("label", ALL)
def test_refused(label, tmp_path):
    reader, name = ALL[label]
    table = TABLES[reader]
    case = table.CASES[name]
    error = refused(table.read, write(case, tmp_path / "model"))
    assert case.file in error.where
    assert case.subject in error.where
    assert case.found in str(error)
    assert error.found
    # One line of a terminal's screen, not the file's content.
    assert len(error.found) < 2000 and "\x1b" not in str(error)


@pytest.mark.parametrize("reader", READERS)
def test_what_they_lie_about_is_read(reader, tmp_path):
    table = TABLES[reader]
    table.read(write(table.GOOD, tmp_path / "model"))


def test_there_are_enough():
    counts = {reader: len(table.CASES) for reader, table in TABLES.items()}
    assert sum(counts.values()) == len(ALL) >= 900, counts
    assert min(counts.values()) >= 20, counts


def test_the_corpus_can_be_written(tmp_path, monkeypatch, capsys):
    from tests.hostile import __main__ as generator

    monkeypatch.setattr(sys, "argv", ["tests.hostile", str(tmp_path / "out")])
    generator.main()
    assert len(list((tmp_path / "out").glob("*/*"))) == len(ALL)
    assert str(len(ALL)) in capsys.readouterr().out
