"""``quantize_model``: quantize the linears of a model that is already built."""

from __future__ import annotations

import collections
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.arguments import instance
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import Scheme
from jaxquant.errors import ConfigError
from jaxquant.nn.linear import Linear, QWeight
from jaxquant.nn.moe import PROJECTIONS, Experts
from jaxquant.nn.prepare import is_prepared, prepare_model, unprepare_model
from jaxquant.nn.stack import stack_layers, unstack_layers
from jaxquant.transforms.experts import bank_experts, expert_weight, plan_experts
from jaxquant.transforms.numeric import dequantize, quantize
from jaxquant.transforms.structure import to_axes

M = TypeVar("M", bound=nnx.Module)

REFUSED = {
    nnx.LinearGeneral: "it may contract several axes",
    nnx.Einsum: "its contraction is an einsum",
}
"""Layers that look like a linear but whose weight has no single in and out axis."""

_COMPUTATION = {
    name: parameter.default
    for name, parameter in inspect.signature(nnx.Linear.__init__).parameters.items()
    if name in ("dot_general", "promote_dtype", "preferred_element_type")
}
"""Options of nnx.Linear that replace parts of its computation, with their defaults."""


def quantize_model(model: M, rules: Mapping[str, Scheme | str | None]) -> M:
    """Return a copy of an NNX model with quantized linears.

    Every ``nnx.Linear``, and every linear and expert of jaxquant's own models, whose path matches a
    rule is quantized by round-to-nearest.  A path joins attribute names and list indices with dots
    (``blocks.0.up``); an expert is ``model.layers.1.mlp.experts.3.down_proj``.  Embeddings, routers
    and norms are no linears.  A layer that stands in several places is quantized once, by the first
    rule that matches any of its paths, and stays shared.

    A model in kernel order (:func:`jaxquant.prepare_model`) comes back in kernel order.

    Args:
        model: any NNX model; it is left as it was, and arrays that no rule touches are shared.
        rules: regular expression -> scheme (or its name), None to leave a layer as it is.  An
            expression may match anywhere in the path (anchor it with ``^`` and ``$``); the first
            rule that matches decides.
    Returns:
        The copy.
    Raises:
        ConfigError: a rule that matches no layer, a scheme that does not fit a layer, a matched
            layer that is quantized already or cannot be (LinearGeneral, Einsum, a subclass, an
            nnx.Linear with its own dot_general, promote_dtype or preferred_element_type).
    """
    instance("quantize_model", model, nnx.Module, "an NNX model is needed")
    instance("rules", rules, Mapping, "a mapping is needed", 'e.g. {"up_proj$": "w4a16_g128"}')
    chooser = _Rules(rules)
    prepared = is_prepared(model)
    whole = unprepare_model(model) if prepared else model
    plain = unstack_layers(whole)
    copy = nnx.clone(plain)
    if _is_linear(copy):
        raise ConfigError("quantize_model", "a single layer", "a model that contains layers")
    # The walk is finished before anything is replaced: replacing changes what it walks over.
    places: dict[int, list[_Place]] = collections.defaultdict(list)
    for place in _places(copy):
        places[id(place.layer)].append(place)
    for same in places.values():
        layer, paths = same[0].layer, [place.path for place in same]
        if isinstance(layer, Experts):
            _quantize_experts(paths[0], layer, chooser)
        elif (scheme := chooser.choose(paths)) is not None:
            new = _quantized(paths[0], layer, scheme)
            for place in same:
                _set(place.parent, place.name, new)
    chooser.finish()
    if prepared:
        copy = prepare_model(copy)
    return copy if plain is whole else stack_layers(copy)


class _Rules:
    """Compiled rules that remember which of them matched."""

    def __init__(self, rules: Mapping[str, Scheme | str | None]) -> None:
        self.rules: list[tuple[re.Pattern[str], Scheme | None]] = []
        for text, scheme in rules.items():
            instance("rule", text, str, "a regular expression is needed")
            parsed = None if scheme is None else Scheme.parse(scheme)
            try:
                self.rules.append((re.compile(text), parsed))
            except re.error as error:
                raise ConfigError(f"rule {text!r}", f"no regular expression ({error})") from error
        self.matched: set[str] = set()
        self.seen: list[str] = []

    def choose(self, paths: list[str]) -> Scheme | None:
        """Scheme of the first rule that matches one of a layer's paths."""
        self.seen += paths
        winners = [(p.pattern, s) for p, s in self.rules if any(map(p.search, paths))]
        self.matched.update(pattern for pattern, _ in winners)
        return winners[0][1] if winners else None

    def finish(self) -> None:
        """Refuse rules that matched nothing."""
        for pattern, _ in self.rules:
            if pattern.pattern not in self.matched:
                some = ", ".join(self.seen[:8]) + (" ..." if len(self.seen) > 8 else "")
                raise ConfigError(
                    f"rule {pattern.pattern!r}",
                    "it matches no linear layer",
                    "every rule matches at least one",
                    f"the layers are: {some or 'none'}",
                )


def _is_linear(module: Any) -> bool:
    return isinstance(module, (nnx.Linear, Linear, *REFUSED))


class _Place(NamedTuple):
    """One place of a layer: its path, and the attribute, index or key of its parent."""

    path: str
    parent: Any
    name: Any
    layer: Any


def _places(root: nnx.Module) -> Iterator[_Place]:
    """Every layer that a rule may match, wherever it stands."""
    visited: set[int] = set()

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[_Place]:
        if id(node) in visited:
            return
        visited.add(id(node))
        for name, child in _items(node):
            where = (*path, str(name))
            if _is_linear(child) or isinstance(child, Experts):
                yield _Place(".".join(where), node, name, child)
            elif isinstance(child, (nnx.Module, list, tuple, dict)):
                yield from walk(child, where)

    yield from walk(root, ())


def _items(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, (list, tuple, nnx.List)):
        return list(enumerate(node))
    return [(name, child) for name, child in vars(node).items() if not name.startswith("_")]


def _set(parent: Any, name: Any, value: Any) -> None:
    if isinstance(parent, tuple):
        raise ConfigError(f"layer {name}", "it stands in a tuple", "a list can be changed")
    if isinstance(parent, (list, dict, nnx.List)):
        parent[name] = value
    else:
        setattr(parent, name, value)


def _quantized(path: str, layer: Any, scheme: Scheme) -> Linear:
    """The replacement of one layer."""
    for kind, reason in REFUSED.items():
        if isinstance(layer, kind):
            rule = f"{reason}, so its weight has no single 'in' and 'out' axis"
            raise ConfigError(
                path, f"nnx.{kind.__name__}", rule, "use nnx.Linear, or narrow the rule"
            )
    if isinstance(layer, Linear):
        new = _requantized(path, layer.weight.get_value(), scheme)
        bias = None if layer.bias is None else layer.bias.get_value()
        return Linear(new, bias, layer.dtype)
    if type(layer) is not nnx.Linear:
        rule = "its own computation would be lost"
        raise ConfigError(path, f"{type(layer).__name__}, a subclass of nnx.Linear", rule)
    for name, default in _COMPUTATION.items():
        if getattr(layer, name) is not default:
            found = f"nnx.Linear with a {name} of its own"
            action = "leave it out of the rules, or build the layer without it"
            raise ConfigError(path, found, "its own computation would be lost", action)
    return _from_nnx(path, layer, scheme)


def _from_nnx(path: str, layer: nnx.Linear, scheme: Scheme) -> Linear:
    kernel = layer.kernel.get_value()
    weight = to_axes(_attempt(path, kernel, scheme, ("in", "out")), ("out", "in"))
    bias = None if layer.bias is None else layer.bias.get_value()
    # nnx.Linear promotes inputs with its kernel; only a float32 kernel decides the result alone.
    dtype = layer.dtype
    if dtype is None and kernel.dtype == jnp.float32:
        dtype = kernel.dtype
    return Linear(weight, bias, dtype)


def _requantized(path: str, q: QTensor, scheme: Scheme) -> QTensor:
    if not q.layout.dense:
        rule = "quantizing a quantized weight again loses what it is"
        action = "load the unquantized checkpoint, or narrow the rule"
        raise ConfigError(path, f"{q.layout}", rule, action)
    return _attempt(path, dequantize(q, axes=q.axes), scheme, q.axes)


# Compiled as one program: op by op it would keep several float32 copies of the weight alive.
_compiled_quantize = jax.jit(quantize, static_argnums=(1, 2))


def _attempt(path: str, weight: jax.Array, scheme: Scheme, axes: tuple[str, ...]) -> QTensor:
    try:
        return _compiled_quantize(weight, scheme, axes)
    except ConfigError as error:
        raise ConfigError(path, error.found, error.rule, error.action) from error


def _quantize_experts(path: str, experts: Experts, chooser: _Rules) -> None:
    """Quantize the matched experts of one layer and bank them anew, in place in the copy."""
    plan = experts.plan
    columns: list[list[QTensor]] = []
    changed = False
    for name in PROJECTIONS:
        bank = getattr(experts, name).get_value()
        column = []
        for expert in range(plan.experts):
            where = f"{path}.{expert}.{name}"
            weight, scheme = expert_weight(bank, plan, expert), chooser.choose([where])
            column.append(weight if scheme is None else _requantized(where, weight, scheme))
            changed |= scheme is not None
        columns.append(column)
    if changed:
        experts.plan = plan_experts(columns, plan.devices, path)
        for p, name in enumerate(PROJECTIONS):
            setattr(experts, name, QWeight(bank_experts(experts.plan, p, columns[p].__getitem__)))
