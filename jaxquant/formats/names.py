"""How each family's ignore list names modules.  The rules differ on purpose; none is unified."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxquant.errors import FormatError
from jaxquant.formats.base import Coverage
from jaxquant.formats.patterns import match_end

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def roots(path: str) -> tuple[str, ...]:
    """A module path under the roots that configs and tensors use for the same model."""
    other = path.removeprefix("model.") if path.startswith("model.") else f"model.{path}"
    swaps = (
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
    )
    names = [path, other]
    for left, right in (*swaps, *((b, a) for a, b in swaps)):
        if path.startswith(left):
            names.append(right + path.removeprefix(left))
    return tuple(dict.fromkeys(names))


def fused_aliases(path: str) -> tuple[str, ...]:
    """Names of the fused modules that a module is a part of."""
    stem, _, last = path.rpartition(".")
    return tuple(f"{stem}.{fused}" for fused, parts in FUSED.items() if last in parts)


def stack_names(path: str) -> tuple[str, ...]:
    """What an expert's projection is a part of in a checkpoint whose experts are stacked."""
    found = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)", path)
    if found is None:
        return ()
    parts = (found[2], *(fused for fused, parts in FUSED.items() if found[2] in parts))
    return tuple(f"{found[1]}.{part}" for part in parts)


def by_component(entry: str, path: str) -> bool:
    """The entry is a run of whole dotted components of the path (fp8, blockwise int8, bnb)."""
    return f".{entry}." in f".{path}."


def by_ending(entry: str, path: str) -> bool:
    """The entry is a run of whole components or, as transformers has it, a plain suffix."""
    return path.endswith(entry) or by_component(entry, path)


def by_regex_or_suffix(entry: str, path: str) -> bool:
    """transformers: a regex anchored at the start and ending at a component, or a plain suffix."""
    if by_ending(entry, path):
        return True
    if entry.replace(".", "").replace("_", "").replace("-", "").isalnum():
        return False
    found = search_prefix(entry, path)
    return found is not None and (
        found == len(path) or path[found] == "." or path[found - 1 : found] == "."
    )


def by_substring(entry: str, path: str) -> bool:
    """AWQ: the entry occurs anywhere, also inside a component."""
    return entry in path


def by_name_or_regex(entry: str, path: str) -> bool:
    """compressed-tensors, Quark: ``re:`` patterns anchored at the start, else the full name."""
    if entry.startswith("re:"):
        return search_prefix(entry[3:], path) is not None
    return entry == path


def by_glob(entry: str, path: str) -> bool:
    """ModelOpt: shell globs; a bare name also covers everything below it."""
    return fnmatch.fnmatchcase(path, entry) or f"{path}.".startswith(f"{entry}.")


def _runs(path: str) -> set[str]:
    """Every run of whole components of a path."""
    parts = path.split(".")
    return {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}


@functools.lru_cache(16)
def _divided(entries: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str], tuple[str, ...]]:
    """Entries that are patterns; the plain ones as a set and as a tuple."""
    patterns = tuple(e for e in entries if re.search(r"[*+?\[\](){}|^$\\:]", e))
    plain = tuple(e for e in entries if e not in patterns)
    return patterns, frozenset(plain), plain


def _candidates(coverage: Coverage, names: tuple[str, ...]) -> Iterable[str]:
    """The entries that can match at all: lists of hundreds meet tens of thousands of modules.

    A plain entry is a run of components or, in the families that allow it, an ending.
    """
    if coverage.matches is by_substring:
        return coverage.ignored
    patterns, plain, ordered = _divided(coverage.ignored)
    found = plain & set().union(*map(_runs, names))
    if any(name.endswith(ordered) for name in names):
        found |= {e for e in ordered if any(name.endswith(e) for name in names)}
    return (*patterns, *sorted(found))


def ignored_by(coverage: Coverage, path: str) -> str | None:
    """The first ignore entry that covers ``path`` under any of its roots, or None.

    A fused name in the list (``qkv_proj``) covers all of its parts, a stack's all of its experts.
    """
    if not coverage.ignored:
        return None
    names = roots(path)
    if coverage.matches is not by_substring:
        names += tuple(stack for name in names for stack in stack_names(name))
    aliases = tuple(alias for name in names for alias in fused_aliases(name))
    for entry in _candidates(coverage, (*names, *aliases)):
        if any(coverage.matches(entry, name) for name in names):
            return entry
        if entry.endswith(tuple(FUSED)) and any(by_component(entry, alias) for alias in aliases):
            return entry
    return None


def whole_entries(coverage: Coverage, dense: Iterable[str]) -> frozenset[str]:
    """Entries of a list of substrings that name an unquantized module by whole components.

    AWQ's own tool looks for substrings, transformers for components, both write the same list: with
    ``gate`` the one leaves out the router and ``gate_proj``, the other the router only.
    """
    if coverage.matches is not by_substring:
        return frozenset()
    paths = tuple(dense)
    return frozenset(e for e in coverage.ignored if any(by_ending(e, path) for path in paths))


def string_list(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The union of the lists under ``keys``; null and absent are empty.

    Raises:
        FormatError: a value is no list of strings.
    """
    entries: dict[str, None] = {}
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise FormatError(f"quantization_config: {key}", repr(value)[:80], "a list of names")
        entries |= dict.fromkeys(value)
    return tuple(entries)


def search_prefix(pattern: str, path: str) -> int | None:
    """End of the match of ``pattern`` at the start of ``path``, or None.

    Raises:
        FormatError: no regular expression, or one that could backtrack for ever.
    """
    return match_end(pattern, path, "quantization_config")
