"""The config of compressed-tensors: groups, targets, presets, quantization arguments.

A config has groups; each names targets (module names, ``re:`` patterns, class names) and how their
weights and input activations are quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.formats.names import by_name_or_regex, roots, stack_names


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How one kind of tensor is quantized.

    Attributes:
        bits: bits of an element.
        kind: "int" or "float".
        symmetric: no zero point.
        strategy: "tensor", "channel", "group", "block", "token" or "tensor_group".
        group: inputs to a scale, for the group strategies.
        block: (out, in) of a block, for "block".
        dynamic: scales are computed at run time; "local" for those of groups only.
        act_order: the group of every input is stored.
        scale_dtype: torch dtype name of stored scales, "" where unsaid.
    """

    bits: int = 8
    kind: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    act_order: bool = False
    scale_dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments | None
    activations: Arguments | None
    format: str


def _where(*keys: str) -> str:
    return "quantization_config: " + ".".join(keys)


def parse_arguments(value: Mapping[str, Any] | None, where: str) -> Arguments | None:
    """Read a QuantizationArgs object.

    Raises:
        FormatError: a field has the wrong type or an unknown value.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise FormatError(where, repr(value)[:80], "an object or null")
    bits, kind, group = value.get("num_bits", 8), value.get("type", "int"), value.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 16 or kind not in ("int", "float"):
        raise FormatError(where, f"num_bits {bits!r}, type {kind!r}", "1 to 16 bits, int or float")
    if group is not None and (type(group) is not int or (group < 1 and group != -1)):
        raise FormatError(f"{where}.group_size", repr(group)[:80], "null, -1 or positive")
    dynamic = value.get("dynamic") or False
    if not isinstance(dynamic, bool) and dynamic != "local":
        raise FormatError(f"{where}.dynamic", repr(dynamic)[:80], "true, false or local")
    strategy = value.get("strategy")
    if strategy is None:
        strategy = "token" if dynamic is True and group is None else "tensor"
        if group is not None:
            strategy = "channel" if group == -1 else "group"
    known = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
    if strategy not in known:
        raise FormatError(f"{where}.strategy", repr(strategy)[:80], f"one of {', '.join(known)}")
    structure = value.get("block_structure")
    if isinstance(structure, str):
        structure = [int(n) if n.isdecimal() else 0 for n in structure.split("x")]
    if strategy == "block" and (
        not isinstance(structure, list)
        or len(structure) != 2
        or any(type(n) is not int or n < 1 for n in structure)
    ):
        raise FormatError(f"{where}.block_structure", repr(structure)[:80], "two positive sizes")
    if strategy in ("group", "tensor_group") and (group is None or group < 1):
        raise FormatError(f"{where}.group_size", repr(group), f"strategy {strategy} needs one")
    return Arguments(
        bits,
        kind,
        value.get("symmetric", True) is not False,
        strategy,
        group,
        (structure[0], structure[1]) if strategy == "block" and structure else None,
        dynamic,
        value.get("actorder") in (True, "group", "dynamic"),
        str(value.get("scale_dtype") or "").removeprefix("torch."),
    )


def _presets() -> dict[str, tuple[Arguments | None, Arguments | None]]:
    def grouped(bits: int, symmetric: bool = True) -> Arguments:
        return Arguments(bits, symmetric=symmetric, strategy="group", group=128)

    def mx(bits: int) -> Arguments:
        return Arguments(bits, "float", strategy="group", group=32, scale_dtype="uint8")

    token8 = Arguments(strategy="token", dynamic=True)
    token4 = Arguments(4, strategy="token", dynamic=True)
    tokenf = Arguments(8, "float", strategy="token", dynamic=True)
    nv = Arguments(4, "float", strategy="tensor_group", group=16, scale_dtype="float8_e4m3fn")
    tensor = Arguments(8, "float", strategy="tensor")
    table: dict[str, tuple[Arguments | None, Arguments | None]] = {"UNQUANTIZED": (None, None)}
    table |= {f"W{b}A16": (grouped(b), None) for b in range(2, 9)}
    table |= {f"W{b}A8": (grouped(b), token8) for b in range(2, 8)}
    table |= {f"W{b}A4": (grouped(b), token4) for b in range(2, 5)}
    int8 = (Arguments(strategy="channel"), token8)
    return table | {
        "W4A16_ASYM": (grouped(4, False), None),
        "W8A8": int8,
        "INT8": int8,
        "W4AFP8": (grouped(4), tokenf),
        "FP8": (tensor, tensor),
        "FP8_DYNAMIC": (Arguments(8, "float", strategy="channel"), tokenf),
        "FP8_BLOCK": (
            Arguments(8, "float", strategy="block", block=(128, 128)),
            Arguments(8, "float", strategy="group", group=128, dynamic=True),
        ),
        "NVFP4A16": (nv, None),
        "NVFP4": (nv, dataclasses.replace(nv, dynamic="local")),
        "MXFP4A16": (mx(4), None),
        "MXFP4": (mx(4), dataclasses.replace(mx(4), dynamic=True)),
        "MXFP4XFP8": (mx(4), Arguments(8, "float", strategy="group", group=128, dynamic=True)),
        "MXFP8A16": (mx(8), None),
        "MXFP8": (mx(8), dataclasses.replace(mx(8), dynamic=True)),
    }


PRESETS = _presets()


def parse_groups(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """Read ``config_groups``: explicit groups, or presets as keys with their targets.

    Raises:
        FormatError: malformed, an unknown preset, or a feature that is not read (sparsity,
            online rotations).
    """
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise FormatError(
            _where("sparsity_config"), repr(sparsity.get("format")), "sparse weights are not read"
        )
    if config.get("transform_config"):
        raise FormatError(
            _where("transform_config"), "online rotations", "rotated weights are not read"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError(_where("config_groups"), repr(groups)[:80], "an object with groups")
    parsed = []
    for name, group in groups.items():
        where = _where("config_groups", name)
        targets = group.get("targets") if isinstance(group, Mapping) else group
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise FormatError(f"{where}.targets", repr(targets)[:80], "a list of names")
        if isinstance(group, Mapping):
            weights = parse_arguments(group.get("weights"), f"{where}.weights")
            acts = parse_arguments(group.get("input_activations"), f"{where}.input_activations")
        elif name in PRESETS:
            weights, acts = PRESETS[name]
        else:
            raise FormatError(where, "a preset name", f"one of {', '.join(PRESETS)}")
        style = (group.get("format") if isinstance(group, Mapping) else None) or config.get(
            "format"
        )
        parsed.append(Group(name, tuple(targets), weights, acts, str(style or "")))
    return tuple(parsed)


def group_of(groups: tuple[Group, ...], path: str) -> Group | None:
    """The group that a linear belongs to: by exact name, then by pattern, then by class."""
    names = roots(path)
    names += tuple(stack for name in names for stack in stack_names(name))
    for test in (
        lambda target: target in names,
        lambda target: target.startswith("re:") and any(by_name_or_regex(target, n) for n in names),
        lambda target: target.lower() in ("linear", "parallellmhead"),
    ):
        for group in groups:
            if any(test(target) for target in group.targets):
                return group
    return None


def activation_spec(args: Arguments | None) -> ActSpec | None:
    """Activation quantization of a group.

    Symmetric integers divide by half the range of codes, 127.5 for int8, as the library's own
    simulation does.

    Raises:
        FormatError: a combination without a meaning here.
    """
    if args is None:
        return None
    names = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "e4m3", ("float", 4): "e2m1"}
    name = names.get((args.kind, args.bits))
    if name is None:
        raise FormatError(
            _where("input_activations"), f"{args.kind}{args.bits}", "int4, int8, float4 or float8"
        )
    code = CODES[name]
    levels = ((1 << args.bits) - 1) / 2 if args.kind == "int" else None
    if args.strategy in ("group", "tensor_group"):
        scale_code = "f32"
        if args.strategy == "tensor_group":
            scale_code = "e4m3"
        elif args.scale_dtype == "uint8" or (args.kind == "float" and args.group == 32):
            scale_code = "mx_rounded"
        return ActSpec(
            code, "group", True, args.symmetric, args.group, levels, scale_code=scale_code
        )
    if args.strategy not in ("token", "tensor"):
        raise FormatError(_where("input_activations", "strategy"), args.strategy, "token or tensor")
    return ActSpec(code, args.strategy, bool(args.dynamic), args.symmetric, None, levels)


def written_by(config: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of the package that wrote a checkpoint, (0, 0) where unknown."""
    parts = str(config.get("version") or "").split(".")[:2]
    major, minor = (*(int(part) for part in parts if part.isdecimal()), 0, 0)[:2]
    return major, minor
