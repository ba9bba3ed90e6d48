"""Saving and restoring converted models: an Orbax checkpoint beside ``layouts.json``.

Orbax stores arrays and knows no layouts, so ``layouts.json`` keeps the model's config and every
weight's static description; restoring builds the abstract model from it and lets Orbax fill it,
onto any sharding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxquant.arguments import instance, path_of
from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.fresh import fresh_directory, refuse_existing
from jaxquant.convert.placement import sharding_of
from jaxquant.convert.static_json import from_json, to_json
from jaxquant.errors import FormatError
from jaxquant.models import CausalLM, build_model
from jaxquant.nn.moe import Experts
from jaxquant.nn.prepare import unprepare_model
from jaxquant.nn.stack import unstack_layers

LAYOUTS_FILE = "layouts.json"
ARRAYS_FOLDER = "arrays"
VERSION = 1
_LEAVES = ("data", "scales", "zeros", "perm", "act_scale", "act_zero", "pre_scale")


def is_saved(path: str | Path) -> bool:
    """Whether ``path`` is a directory that :func:`save_pretrained` wrote."""
    return (Path(path) / LAYOUTS_FILE).is_file()


def _cut(value: Any, index: int | None) -> Any:
    return value if index is None else jax.tree.map(lambda leaf: leaf[index], value)


class Held(NamedTuple):
    """A value in a model: a QTensor or array, or one entry of a stack of them."""

    value: Any
    entry: int | None = None

    def take(self) -> Any:
        """The value itself."""
        return _cut(self.value, self.entry)

    @property
    def abstract(self) -> Any:
        """Its shapes and dtypes."""
        return jax.eval_shape(lambda value: _cut(value, self.entry), self.value)


def held_by(model: CausalLM) -> tuple[dict[str, Held], dict[str, Held]]:
    """The names a model is built from: weights by module path, other arrays by name."""
    weights: dict[str, Held] = {}
    arrays: dict[str, Held] = {}
    plans = {path: node.plan for path, node in nnx.iter_graph(model) if isinstance(node, Experts)}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_value()
        if isinstance(value, ExpertBank):
            plan = plans[path[:-1]]
            prefix, projection = name.rsplit(".", 1)
            for expert in range(plan.experts):
                local = int(plan.positions[expert]) % plan.local
                weights[f"{prefix}.{expert}.{projection}"] = next(
                    Held(part, local - run.start)
                    for run, part in zip(value.runs, value.parts, strict=True)
                    if run.start <= local < run.stop
                )
        elif isinstance(value, QTensor):
            weights[name.removesuffix(".weight")] = Held(value)
        else:
            arrays[name] = Held(value)
    return weights, arrays


def describe(model: CausalLM) -> tuple[dict[str, QTensor], dict[str, Any]]:
    """The names a model is built from, with shapes and dtypes only."""
    weights, arrays = held_by(model)
    return (
        {name: held.abstract for name, held in weights.items()},
        {name: held.abstract for name, held in arrays.items()},
    )


def _leaf_json(q: QTensor) -> dict[str, Any]:
    def show(leaf: Any) -> Any:
        if isinstance(leaf, tuple):
            return [show(item) for item in leaf]
        return None if leaf is None else [str(leaf.dtype), list(leaf.shape)]

    return {name: show(getattr(q, name)) for name in _LEAVES}


def _leaf_struct(data: Any, tuple_field: bool) -> Any:
    if data is None:
        return None
    if tuple_field:
        return tuple(_leaf_struct(item, False) for item in data)
    return jax.ShapeDtypeStruct(tuple(data[1]), jnp.dtype(data[0]))


def _named_leaves(name: str, value: Any) -> dict[str, Any]:
    """Arrays of one variable's value by a readable name."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(value)
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/"): leaf
        for path, leaf in pairs
    }


def _variables(model: CausalLM) -> dict[str, Any]:
    """Every variable of a model by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable for path, variable in flat}


def save_pretrained(model: CausalLM, path: str | Path) -> None:
    """Write a model so that :func:`jaxquant.from_pretrained` restores it exactly.

    Layers are written one by one, stacked or not, so that either form can be restored.
    Everything is written to a temporary directory beside ``path``, which is renamed at the end.

    Args:
        model: a model with real weights.
        path: a directory that does not exist yet.
    Raises:
        FormatError: ``path`` exists.
        ConfigError: ``model`` is not one of this package.
    """
    import orbax.checkpoint as ocp

    instance("save_pretrained", model, CausalLM, "a CausalLM is needed")
    path = path_of("path", path).resolve()
    refuse_existing(path)
    model = unstack_layers(unprepare_model(model))
    weights, arrays = describe(model)
    table: list[Any] = []
    index: dict[str, int] = {}
    entries: dict[str, int] = {}
    for name, q in weights.items():
        entry = {"layout": to_json(q.layout), "act": to_json(q.act), "leaves": _leaf_json(q)}
        key = json.dumps(entry, sort_keys=True)
        if key not in index:
            index[key] = len(table)
            table.append(entry)
        entries[name] = index[key]
    document = {
        "version": VERSION,
        "config": to_json(model.config),
        "published": None if model.published is None else json.loads(model.published),
        "dtype": str(model.dtype),
        "layouts": table,
        "weights": entries,
        "arrays": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()},
    }
    with fresh_directory(path) as temporary:
        with ocp.StandardCheckpointer() as checkpointer:
            leaves: dict[str, Any] = {}
            for name, variable in _variables(model).items():
                leaves |= _named_leaves(name, variable.get_value())
            checkpointer.save(temporary / ARRAYS_FOLDER, leaves)
        (temporary / LAYOUTS_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)


def _read_layouts(path: Path) -> dict[str, Any]:
    file = path / LAYOUTS_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(
            str(file), f"not valid JSON ({error})", action="convert it again"
        ) from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise FormatError(
            str(file), f"version {version!r}", f"this is version {VERSION}", "convert it again"
        )
    return document


def load_saved(path: str | Path, mesh: Mesh | None = None, dtype: Any = None) -> CausalLM:
    """Restore what :func:`save_pretrained` wrote.

    Args:
        path: its directory.
        mesh: where leaves go, as for :func:`jaxquant.from_pretrained`; by default the default
            device.  It need not be the mesh of saving.
        dtype: compute dtype; by default the saved one.
    Raises:
        FormatError: the description is damaged or of another version, or arrays are missing.
    """
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    where = str(path / LAYOUTS_FILE)
    document = _read_layouts(path)
    try:
        table = [
            QTensor(
                layout=from_json(entry["layout"], where),
                act=from_json(entry["act"], where),
                **{
                    name: _leaf_struct(entry["leaves"][name], name in ("data", "scales", "zeros"))
                    for name in _LEAVES
                },
            )
            for entry in document["layouts"]
        ]
        weights = {name: table[i] for name, i in document["weights"].items()}
        arrays = {name: _leaf_struct(a, False) for name, a in document["arrays"].items()}
        config = from_json(document["config"], where)
        saved_dtype = document["dtype"]
        # Version 1 did not always write it.
        published = dict(document.get("published") or {})
    except FormatError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        found = f"a damaged description ({type(error).__name__}: {error})"
        raise FormatError(where, found, action="convert the checkpoint again") from None
    model = build_model(config, weights, arrays, dtype=dtype or saved_dtype)
    variables = _variables(model)
    targets: dict[str, Any] = {}
    for name, variable in variables.items():
        value = variable.get_value()
        module = name.removesuffix(".weight")
        where_to = None if mesh is None else sharding_of(module, value, mesh)
        targets |= _named_leaves(name, _with_sharding(value, where_to))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path / ARRAYS_FOLDER, targets)
    except (ValueError, KeyError, OSError) as error:
        found = f"arrays cannot be restored ({str(error).splitlines()[0]})"
        raise FormatError(str(path / ARRAYS_FOLDER), found, action="convert it again") from None
    for name, variable in variables.items():
        value = variable.get_value()
        leaves = [restored[leaf] for leaf in _named_leaves(name, value)]
        variable.set_value(jax.tree.unflatten(jax.tree.structure(value), leaves))
    nnx.update(model, nnx.from_flat_state([(tuple(_key(n)), v) for n, v in variables.items()]))
    model.published = json.dumps(published) if published else None
    return model


def _key(name: str) -> list[str | int]:
    """A dotted path as the keys of a flat state."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _with_sharding(value: Any, where_to: Any) -> Any:
    """Abstract leaves that carry the sharding they are restored to."""
    default = SingleDeviceSharding(jax.local_devices()[0])
    if where_to is None:
        where_to = jax.tree.map(lambda _: default, value)
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        value,
        where_to,
    )
