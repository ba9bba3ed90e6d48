"""The mixed-precision plan: a YAML file that picks each weight's precision and where it comes from.

::

    mixed_precision:
      base_model_path: DIR        # everything that is not mapped; fp16_path serves too
      fp8_path: DIR               # also fp16_path, int8_path, int4_path, gptq_int4_path ...
      weight_mapping:
        "model.layers.0.self_attn.q_proj.weight": "fp8"
        "model.layers.*.mlp.experts.0.w13_weight": "gptq_int4"
        "re:model\\.layers\\.\\d+\\.mlp\\.experts\\.[1-3]\\.w2_weight": "w4a16_g32"

``w13_weight`` is an expert's gate_proj and up_proj, ``w2_weight`` its down_proj.  Keys are names,
globs or ``re:`` patterns; an exact name beats any pattern, a pattern with more literal characters
beats one with fewer, and a tie between different precisions is an error.  A precision is a source
(``fp8``) or a scheme (``w4a16_g32``), which quantizes the base's weight here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxquant.arguments import path_of
from jaxquant.arrays.scheme import Scheme
from jaxquant.convert.names import published
from jaxquant.errors import ConfigError, FormatError
from jaxquant.formats.patterns import matches

PRECISIONS = ("fp16", "fp8", "int8", "int4", "gptq_int4", "awq_int4")
BASE = "base"
MAX_PLAN_BYTES = 16 << 20
MAX_PLAN_VALUES = 400_000
MAX_PATTERN = 512
MAX_PRECISION = 64

_EXPERT = re.compile(r"^(?P<prefix>.*\.experts\.)(?P<index>\d+)\.(?P<projection>[^.]+)$")
_W13, _W2 = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """A validated plan file.

    Attributes:
        file: the YAML file, for messages.
        sources: precision (or "base") -> checkpoint path.
        mapping: pattern -> precision or scheme, in file order.
    """

    file: str
    sources: Mapping[str, Path]
    mapping: Mapping[str, str]

    def scheme(self, precision: str) -> Scheme | None:
        """The scheme a precision stands for, None where it is a source."""
        return None if precision in self.sources else Scheme.parse(precision)


class _StrictLoader(yaml.CSafeLoader):
    """Safe loading that refuses duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str) or key in seen:
                problem = f"key {key!r} is repeated or no string"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file: no aliases, unique text keys, plain values only.

    Raises:
        ConfigError: unreadable, too large, or not such a file.
    """
    where = str(path)
    try:
        # A device has no size and no end.
        if path.exists() and not path.is_file():
            raise ConfigError(where, "no regular file", "a YAML file")
        if path.stat().st_size > MAX_PLAN_BYTES:
            found = f"{path.stat().st_size} bytes"
            raise ConfigError(where, found, f"a plan has at most {MAX_PLAN_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or f"not UTF-8: {error}"
        raise ConfigError(where, f"not a valid plan: {found}", "a readable YAML file") from None
    try:
        values = 0
        for event in yaml.parse(text, _StrictLoader):
            # Aliases can expand without bound; a plan has no use for them.
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(where, "YAML aliases", "none are allowed", "write names out")
            values += isinstance(event, yaml.NodeEvent)
            if values > MAX_PLAN_VALUES:
                raise ConfigError(where, f"over {MAX_PLAN_VALUES} values", "a plan is smaller")
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        found = " ".join(str(error).split())[:300]
        raise ConfigError(
            where, f"not a valid plan: {found}", action="see the example in the README"
        ) from None


def read_plan(path: str | Path) -> PrecisionPlan:
    """Read and validate a plan file.

    Relative source directories are relative to the plan file.

    Raises:
        ConfigError: unreadable, not YAML, aliases, duplicate or unknown keys, a precision without
            a source that is no scheme either, a pattern that is no safe expression, no base.
    """
    path = path_of("plan", path)
    document = load_yaml(path)
    where = str(path)
    body = document.get("mixed_precision") if isinstance(document, dict) else None
    if not isinstance(body, dict) or set(document) != {"mixed_precision"}:
        raise ConfigError(
            where, "no mixed_precision mapping at the top", "it is the only top-level key"
        )
    return _validate(where, path.parent, body)


def _validate(where: str, root: Path, body: Mapping[str, Any]) -> PrecisionPlan:
    path_keys = {f"{name}_path": name for name in PRECISIONS} | {"base_model_path": BASE}
    unknown = sorted(set(body) - set(path_keys) - {"weight_mapping"})
    if unknown:
        raise ConfigError(
            where, f"unknown keys {unknown}", f"known: {sorted([*path_keys, 'weight_mapping'])}"
        )
    sources = {}
    for key, name in path_keys.items():
        if key in body:
            if not isinstance(body[key], str):
                raise ConfigError(where, f"{key}: {body[key]!r}", "a directory name is needed")
            if "\0" in body[key]:
                raise ConfigError(where, f"{key}: {body[key]!r}", "a directory name is needed")
            sources[name] = root / body[key]
    if BASE not in sources:
        if "fp16" not in sources:
            raise ConfigError(
                where, "neither base_model_path nor fp16_path", "unmapped weights need a source"
            )
        sources[BASE] = sources["fp16"]
    mapping = body.get("weight_mapping")
    if not isinstance(mapping, dict) or not mapping:
        raise ConfigError(
            where, "weight_mapping is missing or empty", "it maps names to precisions"
        )
    for pattern, precision in mapping.items():
        if not isinstance(precision, str) or len(precision) > MAX_PRECISION:
            found = f"{pattern[:80]}: {precision!r}"[:200]
            raise ConfigError(where, found, f"a precision's name, at most {MAX_PRECISION} letters")
        if precision not in sources or precision == BASE:
            if precision in PRECISIONS:
                rule = f"{precision}_path is not set"
                action = "set it, or name a scheme such as fp8_b128 or w4a16_g32"
                raise ConfigError(where, f"{pattern}: {precision}", rule, action)
            try:
                Scheme.parse(precision)
            except ConfigError as error:
                known = f"a precision is one of {', '.join(PRECISIONS)} or a scheme"
                raise ConfigError(where, f"{pattern}: {error.found}", known, error.action) from None
        _matcher(where, pattern)
    return PrecisionPlan(where, sources, dict(mapping))


def _matcher(where: str, pattern: str) -> Callable[[str], bool] | None:
    """Whether a pattern fits a name; None for an exact name.

    Raises:
        ConfigError: too long, or no regular expression that ends in time.
    """
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(
            where, f"a pattern of {len(pattern)} characters", f"at most {MAX_PATTERN}"
        )
    if pattern.startswith("re:"):
        return _regex(where, pattern[3:])
    if any(sign in pattern for sign in "*?["):
        # Globs become atomic groups, which do not backtrack.
        glob = re.compile(fnmatch.translate(pattern))
        return lambda name: glob.fullmatch(name) is not None
    return None


def _regex(where: str, pattern: str) -> Callable[[str], bool]:
    def fits(name: str) -> bool:
        try:
            return matches(pattern, name, where) is not None
        except FormatError as error:
            raise ConfigError(error.where, error.found, error.rule, "simplify it") from None

    fits("")
    return fits


def _literals(pattern: str) -> int:
    """Literal characters of a pattern: how specific it is."""
    text = re.sub(r"\\[dwsDWSbB]|\[[^\]]*\]|[*?+.^$(){}|\\]", "", pattern.removeprefix("re:"))
    return len(text)


def _end(pattern: str) -> str:
    """What every match of a glob ends with; nothing is known of a regular expression's."""
    return "" if pattern.startswith("re:") else re.split(r"[]*?]", pattern)[-1]


def target_names(module: str) -> tuple[str, ...]:
    """The names that a mapping key may use for the weight of a module."""
    names = (f"{module}.weight",)
    found = _EXPERT.match(module)
    if found:
        fused = "w13_weight" if found["projection"] in _W13 else "w2_weight"
        if found["projection"] in (*_W13, *_W2):
            names += (f"{found['prefix']}{found['index']}.{fused}",)
    return names


def resolve(
    plan: PrecisionPlan, modules: Iterable[str], family: str = ""
) -> tuple[dict[str, str], list[str]]:
    """Give every module its precision; modules that nothing maps get "base".

    Args:
        plan: the plan.
        modules: the modules of the base, by the module tree's paths.
        family: of the model; a mapping key may also use the names of its own checkpoints
            (``block_sparse_moe.experts.0.w1`` of Mixtral).
    Returns:
        module -> precision, and a message for every key that matches no weight and every tie.
    """
    exact: dict[str, str] = {}
    # By their literal ends, each name meets few of a large plan's patterns.
    patterns: dict[int, dict[str, list[tuple[int, str, str, Callable[[str], bool]]]]] = {}
    for pattern, precision in plan.mapping.items():
        fits = _matcher(plan.file, pattern)
        if fits is None:
            exact[pattern] = precision
            continue
        end = _end(pattern)
        same = patterns.setdefault(len(end), {}).setdefault(end, [])
        same.append((_literals(pattern), pattern, precision, fits))
    modules = list(modules)
    used: set[str] = set()
    problems: list[str] = []
    chosen: dict[str, str] = {}
    for module in modules:
        own = published(module, family)
        names = target_names(module) + (target_names(own) if own != module else ())
        hits = [(1 << 30, name, exact[name]) for name in names if name in exact]
        hits += [
            (literals, pattern, precision)
            for name in names
            for length, ends in patterns.items()
            for literals, pattern, precision, fits in ends.get(name[len(name) - length :], ())
            if fits(name)
        ]
        used.update(pattern for _, pattern, _ in hits)
        if not hits:
            chosen[module] = BASE
            continue
        best = max(literals for literals, _, _ in hits)
        winners = {
            (pattern, precision) for literals, pattern, precision in hits if literals == best
        }
        if len({precision for _, precision in winners}) > 1:
            shown = ", ".join(f"{p!r} -> {v}" for p, v in sorted(winners))
            problems.append(f"{module}: equally specific keys disagree ({shown})")
        chosen[module] = next(precision for _, precision in sorted(winners))
    for pattern in plan.mapping:
        if pattern not in used:
            problems.append(_unused(pattern, [published(name, family) for name in modules]))
    return chosen, problems


def _unused(pattern: str, modules: Iterable[str]) -> str:
    """Why a key matched nothing, as far as the names tell."""
    found = re.match(r"^(?P<prefix>.*\.experts\.)(?P<index>\d+)\.", pattern)
    if found:
        indices = sorted(
            {
                int(m["index"])
                for name in modules
                if (m := _EXPERT.match(name)) and m["prefix"] == found["prefix"]
            }
        )
        if indices and int(found["index"]) not in indices:
            have = f"experts {indices[0]} to {indices[-1]}"
            return f"{pattern}: there is no expert {found['index']} (the layer has {have})"
    return f"{pattern}: matches no weight of the base checkpoint"
