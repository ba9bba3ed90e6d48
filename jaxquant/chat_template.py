"""Chat templates: Jinja from untrusted files, in a sandbox that also ends.

Jinja's sandbox keeps templates from Python's internals; it bounds neither time nor memory.  Here
every loop step and call counts, and no step may make a large value.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 20
MAX_STEPS = 100_000
MACRO_STEPS = 20
MAX_VALUE = 4 << 20
MAX_NUMBER = 1 << 14
_WIDTH = re.compile(r"\d{5}")


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox with a budget of steps; one object serves one rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True)
        self.steps = 0
        self.filters |= {name: self._watched(name, f) for name, f in self.filters.items()}
        self.filters["_steps"], self.filters["_size"] = self.counted, self.sized
        self.globals |= {"raise_exception": _refuse, "range": self.range}

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateError(f"over {MAX_STEPS} steps")

    def range(self, *bounds: int) -> range:
        made = range(*bounds)
        self.step(len(made))
        return made

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self.step(len(value) // 256)
            if len(value) > MAX_VALUE:
                raise jinja2.TemplateError(f"a value of {len(value)} parts")
        return value

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            self._check_arguments((*arguments, *more.values()))
            if name == "format" and _WIDTH.search(str(arguments[0])):
                raise jinja2.TemplateError("a wide format")
            return self.sized(function(*arguments, **more))

        return call

    def _check_arguments(self, arguments: Sequence[Any]) -> None:
        self.step()
        for value in arguments:
            self.sized(value)
            if isinstance(value, int) and abs(value) > MAX_NUMBER:
                raise jinja2.TemplateError(f"a number over {MAX_NUMBER}")

    def call(self, context: Any, obj: Any, *arguments: Any, **more: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._check_arguments((*arguments, *more.values()))
        if isinstance(obj, Macro):
            self.step(MACRO_STEPS)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self.sized(owner)
            longest = max((len(a) for a in arguments if isinstance(a, str | list)), default=0)
            if (len(owner) + 1) * (longest + 1) > 16 * MAX_VALUE:
                raise jinja2.TemplateError("a large value")
        return self.sized(super().call(context, obj, *arguments, **more))

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(owner := getattr(value, "__self__", None), str) and _WIDTH.search(owner):
            raise jinja2.TemplateError("a wide format")
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.step()
        self.sized(left)
        sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        numbers = [abs(x) for x in (left, right) if isinstance(x, int)]
        if operator == "**" and numbers and max(numbers) > 64:
            raise jinja2.TemplateError("a large power")
        if operator == "*" and sizes and max(sizes) * max([1, *numbers]) > MAX_VALUE:
            raise jinja2.TemplateError("a large value")
        if operator == "*" and numbers and max(numbers) > 1 << 64:
            raise jinja2.TemplateError("a large number")
        if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
            raise jinja2.TemplateError("a wide format")
        return self.sized(super().call_binop(context, operator, left, right))


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:1000])


def _instrument(tree: nodes.Template) -> nodes.Template:
    """Count the steps of every loop, and look at the size of every text that is made."""

    def filtered(node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None)

    # All are found before one is changed: the new nodes contain the old ones.
    loops, concats = list(tree.find_all(nodes.For)), list(tree.find_all(nodes.Concat))
    outputs = list(tree.find_all(nodes.Output))
    for loop in loops:
        loop.iter = filtered(loop.iter, "_steps")
    for node in (*concats, *outputs):
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else filtered(part, "_size")
            for part in node.nodes
        ]
    return tree


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        template: Jinja source.
        variables: what it may use.
    Raises:
        jinja2.TemplateError: the template is not valid, refuses, or does too much.
    """
    if len(template) > MAX_TEMPLATE:
        raise jinja2.TemplateError(f"a template of {len(template)} letters")
    environment = _Bounded()
    pieces, size = [], 0
    try:
        compiled = environment.from_string(_instrument(environment.parse(template)))
        for piece in compiled.generate(**variables):
            size += len(piece)
            environment.step()
            if size > MAX_VALUE:
                raise jinja2.TemplateError(f"a text of over {MAX_VALUE} letters")
            pieces.append(piece)
    except jinja2.TemplateError:
        raise
    except (ArithmeticError, LookupError, MemoryError, RecursionError) as error:
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}"[:300]) from error
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}"[:300]) from error
    return "".join(pieces)
