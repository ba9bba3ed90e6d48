"""Loading: a pure pipeline from a source to an NNX model, one tensor at a time.

``names -> abstract model -> (read, decode, place) per tensor``.  The abstract model is built and
checked first, so that a checkpoint that does not fit fails before a weight is read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxquant.arguments import float_dtype, instance, path_of
from jaxquant.convert.gguf_tokenizer import read_tokenizer
from jaxquant.convert.item import Item
from jaxquant.convert.name_map import NameMap
from jaxquant.convert.placement import automatic, placer
from jaxquant.convert.plan_file import read_plan
from jaxquant.convert.progress import byte_progress
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.convert.report import make_report
from jaxquant.convert.save import is_saved, load_saved
from jaxquant.convert.source import open_source
from jaxquant.errors import ConfigError, FormatError
from jaxquant.models import CausalLM, build_model
from jaxquant.nn.prepare import prepare_model
from jaxquant.nn.stack import stack_layers
from jaxquant.ops.select import has_kernels
from jaxquant.tokenize import Tokenizer
from jaxquant.transforms.repack import is_host_memory

# Decoding runs this many tensors ahead of placing them; with the one being placed that makes three.
AHEAD = 2


def _load(item: Item) -> Any:
    """Load an item; what was decoded into memory of its own needs the file's no longer."""
    value = item.load()
    if all(is_host_memory(leaf) for leaf in jax.tree.leaves(value)):
        item.release()
    return value


class ReadAhead:
    """Loads items in a known order, a little ahead of their use, in threads."""

    def __init__(
        self, items: Mapping[str, Item], order: Iterable[str], advance: Callable[[int], None]
    ) -> None:
        self._items = items
        self._order: Iterator[str] = iter(order)
        self._advance = advance
        self._pool = concurrent.futures.ThreadPoolExecutor(AHEAD)
        self._pending: collections.deque[tuple[str, concurrent.futures.Future[Any]]]
        self._pending = collections.deque()
        self._last: Item | None = None

    def __enter__(self) -> ReadAhead:
        for _ in range(AHEAD):
            self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        name = next(self._order, None)
        if name is not None:
            self._pending.append((name, self._pool.submit(_load, self._items[name])))

    def __call__(self, name: str) -> Any:
        # The builder has copied what it asked for last.
        if self._last is not None:
            self._last.release()
        self._last = self._items[name]
        expected, future = self._pending.popleft()
        assert expected == name, f"loaded out of order: {name} instead of {expected}"
        value = future.result()
        self._submit()
        self._advance(self._items[name].nbytes)
        return value


def _order_of(config: Any, weights: Mapping[str, Any], arrays: Mapping[str, Any], dtype: Any):
    """Names in the order in which the builder asks for them; checks everything on the way."""
    order: list[str] = []
    values = {**arrays, **weights}

    def record(name: str) -> Any:
        order.append(name)
        return values[name]

    build_model(config, weights, arrays, dtype=dtype, load=record, place=lambda _, value: value)
    return order


def from_pretrained(
    path: str | Path,
    *,
    plan: str | Path | None = None,
    names: NameMap | str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    scan_layers: bool = False,
) -> CausalLM:
    """Load a checkpoint as an NNX model, its weights as they are on disk.

    Args:
        path: a directory of safetensors (quantized by any known format, or not), a ``.gguf`` file,
            or a directory that :func:`save_pretrained` wrote.
        plan: YAML file that mixes weights of several checkpoints.
        names: what tensors of this checkpoint are called in the model, where it does not use the
            usual names: a map, or a YAML file with one (see :mod:`jaxquant.convert.name_map`).
        config: content of a ``config.json``, or its path, that says what a ``.gguf`` file holds,
            where its architecture is unknown; ``names`` says what it calls its tensors.
        mesh: places weights over devices; axes named ``tp`` (or ``model``) split heads and inner
            widths, ``ep`` (or ``expert``) splits experts, any others replicate.  Where there are
            kernels every device runs them on its parts (see :func:`jaxquant.prepare_model`), except
            with ``scan_layers``.
        dtype: compute dtype, float32, bfloat16 or float16.  Weights keep their own.  None is
            bfloat16, or what a converted model was saved with.
        scan_layers: stack each run of equal layers and compile it as one loop, in a time that does
            not grow with depth (see :func:`jaxquant.stack_layers`).  Not the default, since the
            loop takes each layer's weights out of the stack, which costs decoding more than the
            one compilation it saves.
    Returns:
        The model; ``model.tokenizer`` is set where the checkpoint has one, ``model.report`` says
        what was loaded.
    Raises:
        FormatError: a file breaks its format.
        ConfigError: unknown architecture, invalid plan or dtype.
        PlanError: tensors are missing, left over or of the wrong shape; all of them.
    """
    path = path_of("path", path)
    if mesh is not None:
        mesh = automatic(instance("mesh", mesh, Mesh, "a jax.sharding.Mesh is needed"))
    if dtype is not None:
        dtype = float_dtype("dtype", dtype)
    place = placer(mesh)
    # A loop over layers takes each layer's weights out of a stack, which parts on a mesh are not.
    prepares = has_kernels() and not (mesh is not None and scan_layers)
    tokenizer = tokenizer_of(path)
    if is_saved(path):
        for option, value in (("plan", plan), ("names", names), ("config", config)):
            if value is not None:
                rule = f"{path} is converted already"
                raise ConfigError(option, str(value)[:200], rule, "use the original checkpoint")
        model = load_saved(path, mesh, dtype)
        if prepares:
            model = prepare_model(model)
        if scan_layers:
            model = stack_layers(model)
    else:
        source = open_source(path, None if plan is None else read_plan(plan), names, config)
        items = {**source.arrays, **source.weights}
        weights = {name: item.abstract for name, item in source.weights.items()}
        arrays = {name: item.abstract for name, item in source.arrays.items()}
        dtype = jnp.bfloat16 if dtype is None else dtype
        order = _order_of(source.config, weights, arrays, dtype)
        total = sum(items[name].nbytes for name in order)
        with (
            byte_progress(f"loading {path.name}", total) as advance,
            ReadAhead(items, order, advance) as load,
        ):
            model = build_model(
                source.config,
                weights,
                arrays,
                dtype=dtype,
                load=load,
                place=place,
                scan_layers=scan_layers,
                finish=prepare_model if prepares else None,
            )
        model.report = make_report(source)
        model.published = json.dumps(source.published)
    if prepares:
        model = prepare_model(model)
    model.tokenizer = tokenizer
    return model


def tokenizer_of(path: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, None where it has none.

    A ``tokenizer.json`` beside a GGUF file stands in for one that cannot be rebuilt from it.

    Raises:
        FormatError: a tokenizer that cannot be read.
    """
    if path.suffix == ".gguf":
        file = open_gguf(path)
        if file.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        try:
            found = read_tokenizer(file)
        except FormatError:
            if not (path.parent / "tokenizer.json").is_file():
                raise
            return Tokenizer.from_directory(path.parent)
        return Tokenizer(found.backend, found.chat_template, found.special)
    return Tokenizer.from_directory(path) if (path / "tokenizer.json").is_file() else None
