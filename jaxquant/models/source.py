"""Source: hands named weights to a model under construction and keeps the books.

Building is total in both directions: every name is taken exactly once, and every problem is noted
and reported together instead of stopping at the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays.bank import ExpertBank, ExpertPlan
from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.errors import PlanError
from jaxquant.nn.linear import Linear
from jaxquant.transforms.experts import bank_experts, plan_experts, signature

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")

Load = Callable[[str], Any]
Place = Callable[[str, Any], Any]


def abstract(value: Any) -> Any:
    """The shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(tuple(a.shape), a.dtype), value)


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 7]`` as ``0-2, 7``."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


class Source:
    """Weights by module path and arrays by tensor name.

    ``asked_weights`` and ``asked_arrays`` list what the model wanted, with shapes, found or not.

    Args:
        weights: abstract ``[out, in]`` QTensor of every linear, by module path.
        arrays: every other array, abstract, by tensor name (``model.norm.weight``).
        load: gives the real value of a name; None leaves the model abstract.
        place: what becomes of each finished leaf (device placement), given its path.
        devices: ways of expert parallelism.
    """

    def __init__(
        self,
        weights: Mapping[str, QTensor],
        arrays: Mapping[str, Any],
        load: Load | None = None,
        place: Place | None = None,
        devices: int = 1,
    ) -> None:
        self.weights = weights
        self.arrays = arrays
        self.load = load
        self.place = place
        self.devices = devices
        self.problems: list[str] = []
        self.taken: set[str] = set()
        self.absent: set[str] = set()
        self.asked_weights: dict[str, tuple[int, int]] = {}
        self.asked_arrays: dict[str, tuple[int, ...]] = {}
        # Names by what they are looked up for: a large model has tens of thousands of them.
        self._layers = {".".join(name.split(".", 3)[:3]) for name in (*weights, *arrays)}
        self._experts: dict[str, list[tuple[int, str]]] = {}
        for found in filter(None, map(_EXPERT.fullmatch, weights)):
            self._experts.setdefault(found[1], []).append((int(found[2]), found[3]))

    def has(self, name: str) -> bool:
        """Whether there is a weight or an array of this name."""
        return name in self.weights or name in self.arrays

    def layer(self, prefix: str) -> None:
        """Note once, instead of name by name, that a whole layer is missing."""
        if prefix not in self._layers:
            self.problems.append(f"{prefix}: missing; the config's num_hidden_layers asks for it")
            self.absent.add(prefix)

    def _missing(self, name: str, expected: str) -> None:
        if not any(name.startswith(prefix + ".") for prefix in self.absent):
            self.problems.append(f"{name}: missing; expected {expected}")

    def _value(self, name: str, expected: Any) -> Any:
        """The value of a taken name, checked against its description."""
        if self.load is None:
            return expected
        value = self.load(name)
        if signature(value) != signature(expected):
            rule = f"it was described as {expected!r}"
            raise PlanError(name, [f"{name}: loaded {abstract(value)!r}; {rule}"])
        return value

    def _placed(self, name: str, value: Any) -> Any:
        if self.load is None:
            return value
        return jax.tree.map(jnp.asarray, value) if self.place is None else self.place(name, value)

    def array(self, name: str, shape: tuple[int, ...] | None, why: str = "") -> Any:
        """Take an array; ``shape`` None takes any, ``why`` says where the shape comes from."""
        expected = f"{list(shape) if shape is not None else 'an array'}{why and f' = {why}'}"
        self.asked_arrays[name] = shape or ()
        if name not in self.arrays:
            self._missing(name, expected)
            return jax.ShapeDtypeStruct(shape or (), jnp.float32)
        self.taken.add(name)
        described = self.arrays[name]
        kind = jnp.dtype(described.dtype)
        if not jnp.issubdtype(kind, jnp.floating) or kind.itemsize < 2:
            self.problems.append(f"{name}: found {kind} values; expected floats of 16 or 32 bits")
        if shape is not None and tuple(described.shape) != shape:
            self.problems.append(f"{name}: found {list(described.shape)}; expected {expected}")
        return self._placed(name, self._value(name, described))

    def weight(self, path: str, out: int, inn: int, why: str = "") -> QTensor:
        """Take the weight ``[out, in]`` of one linear."""
        described = self._described(path, out, inn, why)
        if described is None:
            return dense(jax.ShapeDtypeStruct((out, inn), jnp.bfloat16))
        return self._placed(path, self._value(path, described))

    def _described(self, path: str, out: int, inn: int, why: str) -> QTensor | None:
        expected = f"{[out, inn]} (out, in){why and f' = {why}'}"
        self.asked_weights[path] = (out, inn)
        if path not in self.weights:
            self._missing(path, expected)
            return None
        self.taken.add(path)
        q = self.weights[path]
        if q.axes != ("out", "in") or q.shape != (out, inn):
            found = f"{list(q.shape)} ({', '.join(q.axes)})"
            self.problems.append(f"{path}: found {found}; expected {expected}")
        return q

    def linear(self, path: str, out: int, inn: int, bias: bool = False, why: str = "") -> Linear:
        """Take a linear: its weight, and its bias where the config or the checkpoint has one."""
        name = f"{path}.bias"
        weight = self.weight(path, out, inn, why)
        value = self.array(name, (out,)) if bias or name in self.arrays else None
        # A weight of another shape is a noted problem already; Linear would stop at it.
        fits = value is None or tuple(value.shape) == (weight.extent("out"),)
        return Linear(weight, value if fits else None)

    def experts(
        self, prefix: str, names: Sequence[str], count: int, shapes: Sequence[tuple[int, int]]
    ) -> tuple[list[ExpertBank], ExpertPlan]:
        """Take all experts of a layer: ``{prefix}.{expert}.{name}`` for each of ``names``.

        Args:
            prefix: path of the experts, without index.
            names: the projections in bank order.
            count: experts the config asks for.
            shapes: ``(out, in)`` of each projection.
        Returns:
            One bank per projection and their common plan.
        """
        self._check_indices(prefix, names, count)
        columns: list[list[QTensor]] = []
        for name, (out, inn) in zip(names, shapes, strict=True):
            placeholder = dense(jax.ShapeDtypeStruct((out, inn), jnp.bfloat16))
            column = []
            for expert in range(count):
                path = f"{prefix}.{expert}.{name}"
                self.asked_weights[path] = (out, inn)
                found = self._described(path, out, inn, "") if path in self.weights else None
                column.append(
                    found if found is not None and found.shape == (out, inn) else placeholder
                )
            columns.append(column)
        plan = plan_experts(columns, self.devices, prefix)
        banks = []
        for p, name in enumerate(names):

            def load(expert: int, p: int = p, name: str = name) -> QTensor:
                return self._value(f"{prefix}.{expert}.{name}", columns[p][expert])

            bank = bank_experts(plan, p, load, prefix)
            banks.append(self._placed(f"{prefix}.{name}", bank))
        return banks, plan

    def _check_indices(self, prefix: str, names: Sequence[str], count: int) -> None:
        """Note experts that are missing, in part or whole, and those past the config's count."""
        present: dict[str, set[int]] = {name: set() for name in names}
        extra: set[int] = set()
        for expert, name in self._experts.get(prefix, ()):
            if expert >= count:
                extra.add(expert)
                self.taken.add(f"{prefix}.{expert}.{name}")
            elif name in present:
                present[name].add(expert)
        if any(prefix.startswith(layer + ".") for layer in self.absent):
            return
        for name, experts in present.items():
            if gaps := sorted(set(range(count)) - experts):
                self.problems.append(
                    f"{prefix}: no {name} for experts {ranges(gaps)}; the config has {count}"
                )
        if extra:
            self.problems.append(
                f"{prefix}: experts {ranges(sorted(extra))} are too many; the config has {count}"
            )

    def finish(self, layers: int) -> None:
        """Raise all problems together, among them every name that was not taken.

        Args:
            layers: layers of the config; those past it are reported once each.
        Raises:
            PlanError: there are problems.
        """
        beyond: dict[int, int] = {}
        for name in (*self.weights, *self.arrays):
            if name in self.taken:
                continue
            found = re.match(r"model\.layers\.(\d+)\.", name)
            if found and int(found[1]) >= layers:
                beyond[int(found[1])] = beyond.get(int(found[1]), 0) + 1
            else:
                self.problems.append(f"{name}: left over; no part of the model takes it")
        for layer, count in sorted(beyond.items()):
            self.problems.append(
                f"model.layers.{layer}: {count} tensors left over; the config has {layers} layers"
            )
        if self.problems:
            action = "check that config.json belongs to these files"
            raise PlanError("model", self.problems, action)
