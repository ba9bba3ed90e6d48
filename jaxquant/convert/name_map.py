"""A user's own name map: what tensors and modules of a checkpoint are called in the module tree.

::

    "transformer.h.{}.attn.query": "model.layers.{}.self_attn.q_proj"
    "re:transformer\\.h\\.(\\d+)\\.norm_(1|one)": "model.layers.\\1.input_layernorm"
    "transformer.final_norm.scale": "model.norm.weight"

A key is a whole name, in which ``{}`` stands for a number, or ``re:`` and a regular expression that
matches a whole name, whose groups the target may use.  It names a tensor, or the module above a
tensor, whose last part (``.weight``, ``.bias``) is kept; a linear answers to ``PATH`` and to
``PATH.weight``, whatever its format calls its tensors.  An exact key goes before any pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxquant.arguments import path_of
from jaxquant.convert.plan_file import load_yaml
from jaxquant.errors import ConfigError, FormatError, PlanError
from jaxquant.formats.patterns import matches

NameMap = Mapping[str, str]
MAX_LENGTH = 512
_NUMBER = re.compile(r"\{\}")
_GROUP = re.compile(r"\\(\d{1,2})")


def read_names(names: NameMap | str | Path | None) -> dict[str, str]:
    """The entries of a name map, or of a YAML file that holds nothing but one.

    Raises:
        ConfigError: unreadable, no map from names to names, or a pattern that is no safe
            expression.
    """
    if names is None:
        return {}
    where = "names" if isinstance(names, Mapping) else str(names)
    entries = names if isinstance(names, Mapping) else load_yaml(path_of("names", names))
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(where, "no entries", "a map from the checkpoint's names to the model's")
    for key, target in entries.items():
        for text in (key, target):
            if not isinstance(text, str) or not 0 < len(text) <= MAX_LENGTH or text == "re:":
                rule = f"names of at most {MAX_LENGTH} characters"
                raise ConfigError(where, f"{key!r}: {target!r}"[:200], rule)
        _check_target(where, key, target)
    return dict(entries)


def _check_target(where: str, key: str, target: str) -> None:
    """Refuse a target that asks for what its key does not have."""
    entry = f"{key!r}: {target!r}"[:200]
    if not key.startswith("re:"):
        if target.count("{}") > key.count("{}"):
            raise ConfigError(where, entry, "each {} on the right has one on the left")
        return
    try:
        matches(key[3:], "", where)
    except FormatError as error:
        raise ConfigError(error.where, error.found, error.rule, "simplify it") from None
    groups = re.compile(key[3:]).groups
    if any(not 0 < int(number) <= groups for number in _GROUP.findall(target)):
        raise ConfigError(where, entry, f"\\1 to \\{groups}: the groups of the pattern")


def _translate(key: str, target: str, name: str) -> str | None:
    """The target for one name, None where a pattern does not match it."""
    if key.startswith("re:"):
        try:
            found = matches(key[3:], name, "names")
        except FormatError as error:
            raise ConfigError(error.where, error.found, error.rule, "simplify it") from None
        sign = _GROUP
    else:
        found = re.fullmatch(r"(\d+)".join(map(re.escape, key.split("{}"))), name)
        sign = _NUMBER
    if found is None:
        return None
    groups = iter(found.groups())
    if sign is _NUMBER:
        return sign.sub(lambda _: next(groups), target)
    return sign.sub(lambda number: found[int(number[1])] or "", target)


def rename(entries: NameMap, names: Iterable[str], where: str) -> dict[str, str]:
    """New names of those that an entry fits.

    >>> rename({"h.{}.q": "layers.{}.q_proj"}, ["h.0.q", "h.1.q.weight", "norm"], "model")
    {'h.0.q': 'layers.0.q_proj', 'h.1.q.weight': 'layers.1.q_proj.weight'}

    Args:
        entries: a valid map, see :func:`read_names`.
        names: all tensors and modules of the checkpoint.
        where: the checkpoint, for messages.
    Raises:
        PlanError: an entry fits no name, several disagree about one, or two names become one; all
            of them.
        ConfigError: a pattern could match for ever.
    """
    exact = {key: target for key, target in entries.items() if _is_exact(key)}
    patterns = {key: target for key, target in entries.items() if not _is_exact(key)}
    used: set[str] = set()
    renamed: dict[str, str] = {}
    owners: dict[str, str] = {}
    problems: list[str] = []
    names = list(names) if entries else []
    for name in names:
        hits: dict[str, str] = {}
        stem, dot, last = name.rpartition(".")
        for part, rest in ((name, ""), (stem, dot + last)):
            if part in exact:
                hits = {part: exact[part] + rest}
                break
        else:
            for key, target in patterns.items():
                for part, rest in ((name, ""), (stem, dot + last)):
                    found = _translate(key, target, part) if part else None
                    if found is not None:
                        hits[key] = found + rest
                        break
        used.update(hits)
        if len(set(hits.values())) > 1:
            shown = ", ".join(f"{key!r} -> {target}" for key, target in hits.items())
            problems.append(f"{name}: entries disagree ({shown})")
        elif hits:
            renamed[name] = next(iter(hits.values()))
        new = renamed.get(name, name)
        if owners.setdefault(new, name) != name:
            problems.append(
                f"{name}: becomes {new}, as {owners[new]} does; one tensor for each weight"
            )
    problems += [f"{key!r}: matches nothing" for key in entries if key not in used]
    if problems:
        raise PlanError(where, problems, "correct the name map; inspect lists a checkpoint's names")
    return renamed


def _is_exact(key: str) -> bool:
    return not key.startswith("re:") and "{}" not in key


class Renamed(NamedTuple):
    """What a name map makes of a checkpoint's names.

    Attributes:
        modules: path of a linear -> new path.
        tensors: name of any other tensor -> new name.
    """

    modules: dict[str, str]
    tensors: dict[str, str]


def renamed(
    names: NameMap | str | Path | None, modules: Iterable[str], tensors: Iterable[str], where: str
) -> Renamed:
    """Apply a name map to the linears and other tensors of a checkpoint.

    Raises:
        ConfigError: an entry is not valid.
        PlanError: entries that fit nothing, disagree or make two names one; all of them.
    """
    weights = {f"{module}.weight": module for module in modules}
    found = rename(read_names(names), [*weights, *tensors], where)
    odd = [
        f"{name}: becomes {new}; the name of a linear's weight ends in .weight"
        for name, new in found.items()
        if name in weights and not new.endswith(".weight")
    ]
    if odd:
        raise PlanError(where, odd, "correct the name map")
    return Renamed(
        {weights[n]: new.removesuffix(".weight") for n, new in found.items() if n in weights},
        {n: new for n, new in found.items() if n not in weights},
    )
