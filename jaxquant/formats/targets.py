"""The formats that checkpoints are exported to: a table, and the config that each of them writes.

The lists of unquantized modules follow each family's own rule of matching (``formats.names``), so a
name is never written where that rule would make it cover a quantized module too.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from jaxquant.arrays.qtensor import QTensor
from jaxquant.configs import (
    AWQConfig,
    CompressedTensorsConfig,
    FbgemmFp8Config,
    Fp8Config,
    GPTQConfig,
)
from jaxquant.errors import FormatError
from jaxquant.formats.arrange import Arrangement, arrange_awq, arrange_fp8, arrange_gptq
from jaxquant.formats.arrange_ct import arrange_compressed_tensors
from jaxquant.formats.awq import AWQ
from jaxquant.formats.base import Format
from jaxquant.formats.compressed_tensors import COMPRESSED_TENSORS
from jaxquant.formats.fp8 import FP8
from jaxquant.formats.gptq import GPTQ
from jaxquant.formats.names import by_substring

COMPRESSED_TENSORS_VERSION = "0.20.0"
"""The library whose arrangement of words and whose arguments are written."""

Plan = Mapping[str, Arrangement]


class Target(NamedTuple):
    """A format to export to.

    Attributes:
        format: reads and encodes it.
        arrange: ``arrange(q) -> Arrangement``, or the reason why it cannot hold ``q`` exactly.
        describe: ``describe(plan, dense, cache) -> (quantization_config, plan)``, given the
            arrangement and path of every quantized module, the paths of other linears and
            embeddings, and the shape of the key-value cache's scales (None where there are none).
            The plan that it returns is the one to encode by.
        holds: what it holds, for messages.
        scheme: a scheme that it holds, for messages.
        cache: whether scales of a key-value cache have a place in it.
        scale_dtype: NumPy dtype of the scales of weights that are quantized on the way, None to
            leave them as they are.
    """

    format: Format
    arrange: Callable[[QTensor], Arrangement | str]
    describe: Callable[[Plan, Collection[str], tuple[int, ...] | None], tuple[dict[str, Any], Plan]]
    holds: str
    scheme: str
    cache: bool = False
    scale_dtype: str | None = None


def patterns(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions that match every one of ``paths`` as a whole and none of ``others``.

    The numbers of layers and experts are left open where that meets no other path.
    """
    shapes: tuple[Callable[[str], str], ...] = (
        lambda path: re.sub(r"\.\d+(?=\.)", ".#", path),
        lambda path: re.sub(r"(\.experts)\.\d+(?=\.)", r"\1.#", path),
    )
    taken = [{shape(path) for path in others} for shape in shapes]
    found: dict[str, None] = {}
    for path in paths:
        forms = (shape(path) for shape in shapes)
        free = (form for form, used in zip(forms, taken, strict=True) if form not in used)
        text = re.escape(next(free, path)).replace(r"\#", "\\d+")
        found[f"{text}$"] = None
    return list(found)


def _by_settings(plan: Plan) -> dict[tuple[object, ...], list[str]]:
    """Paths of the modules that share settings, the most frequent settings first."""
    groups: dict[tuple[object, ...], list[str]] = collections.defaultdict(list)
    for path, arrangement in plan.items():
        groups[arrangement.settings].append(path)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _uniform(plan: Plan, what: str) -> tuple[Any, ...]:
    """The settings of all modules.

    Raises:
        FormatError: they differ.
    """
    groups = _by_settings(plan)
    (first, paths), *rest = groups.items()
    if rest:
        raise FormatError(
            rest[0][1][0],
            f"{what} {_shown(rest[0][0])}, where {paths[0]} has {_shown(first)}",
            "the format has one for all modules",
            "export to compressed-tensors, which has groups, or quantize again with --scheme",
        )
    return first


def _shown(settings: tuple[object, ...]) -> str:
    return ", ".join(map(str, settings))


def _describe_gptq(
    plan: Plan, dense: Collection[str], cache: tuple[int, ...] | None
) -> tuple[dict[str, Any], Plan]:
    (first, _), *rest = _by_settings(plan).items()
    fields = ("bits", "group_size", "sym", "desc_act")
    dynamic: dict[str, dict[str, Any]] = {}
    for settings, paths in rest:
        changes = {n: v for n, v, w in zip(fields, settings, first, strict=True) if v != w}
        others = [path for path in (*plan, *dense) if path not in set(paths)]
        dynamic |= {f"+:{pattern}": changes for pattern in patterns(paths, others)}
    # Nothing outside of the layers is quantized unless the config says so.
    skipped = [path for path in dense if path.startswith("model.layers.")]
    dynamic |= {f"-:{pattern}": {} for pattern in patterns(skipped, plan)}
    bits, group, symmetric, act_order = first
    # Version 1 stores zero points less one, in words of the checkpoint's own width; tools disagree
    # about a zero point of 0 and about modules of another width.  Version 2 has them plain.
    plain = all(a.settings[2] and a.settings[0] == bits for a in plan.values())
    version, name = (1, "gptq") if plain else (2, "gptq_v2")
    config = GPTQConfig(
        weight_bits=int(str(bits)),
        group_size=int(str(group)),
        desc_act=bool(act_order),
        lm_head_quantized="lm_head" in plan,
        dynamic=dynamic,
        sym=bool(symmetric),
        checkpoint_format=name,
    ).to_hf()
    return config | {"pack_dtype": "int32"}, _with_spec(plan, version=version)


def _with_spec(plan: Plan, **changes: Any) -> Plan:
    return {
        path: arrangement._replace(spec=dataclasses.replace(arrangement.spec, **changes))
        for path, arrangement in plan.items()
    }


def _describe_awq(
    plan: Plan, dense: Collection[str], cache: tuple[int, ...] | None
) -> tuple[dict[str, Any], Plan]:
    (group,) = _uniform(plan, "a group size of")
    for entry in dense:
        if covered := next((path for path in plan if by_substring(entry, path)), None):
            raise FormatError(
                covered,
                f"its name contains that of {entry}, which is not quantized",
                "AWQ leaves out every module whose name contains an entry of its list",
                "export to compressed-tensors or gptq",
            )
    config = AWQConfig(
        weight_bits=4, group_size=group, zero_point=True, modules_to_not_convert=list(dense)
    ).to_hf()
    return config | {"version": "gemm", "lm_head": "lm_head" in plan}, plan


def _describe_fp8(
    plan: Plan, dense: Collection[str], cache: tuple[int, ...] | None
) -> tuple[dict[str, Any], Plan]:
    method, block, dynamic, rounding, bound = _uniform(plan, "scales and activations")
    names = list(dense)
    if method == "fbgemm_fp8":
        written = FbgemmFp8Config(activation_scale_ub=bound, modules_to_not_convert=names)
        return written.to_hf(), plan
    if method == "w8a8_fp8":
        return {"quant_method": method, "is_dynamic": True, "ignore": names}, plan
    config = Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic" if dynamic else "static",
        ignored_layers=names,
        weight_block_size=None if block is None else list(block),
    ).to_hf()
    # vLLM and SGLang look for ignored_layers, transformers for modules_to_not_convert.
    config |= {"quant_method": method, "modules_to_not_convert": names, "fmt": "e4m3"}
    return config | ({"scale_fmt": rounding} if block else {}), plan


def _describe_compressed_tensors(
    plan: Plan, dense: Collection[str], cache: tuple[int, ...] | None
) -> tuple[dict[str, Any], Plan]:
    groups = _by_settings(plan)
    written: dict[str, Any] = {}
    for number, ((text,), paths) in enumerate(groups.items()):
        # vLLM's output layer is no "Linear": it goes by its name.
        targets = ["Linear", *(path for path in paths if path == "lm_head")]
        if len(groups) > 1:
            others = [path for path in (*plan, *dense) if path not in set(paths)]
            targets = [f"re:{pattern}" for pattern in patterns(paths, others)]
        written[f"group_{number}"] = {"targets": targets, **json.loads(str(text))}
    forms = sorted({group["format"] for group in written.values()})
    scheme = None
    if cache is not None:
        scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        scheme["strategy"] = "attn_head" if len(cache) == 3 else "tensor"
    config = CompressedTensorsConfig(
        config_groups=written,
        format=forms[0] if len(forms) == 1 else "mixed-precision",
        ignore=list(dense),
        kv_cache_scheme=scheme,
        version=COMPRESSED_TENSORS_VERSION,
    )
    return config.to_hf(), plan


TARGETS: dict[str, Target] = {
    "compressed-tensors": Target(
        COMPRESSED_TENSORS,
        arrange_compressed_tensors,
        _describe_compressed_tensors,
        "integers of 2 to 8 bits and e4m3 with one scale a tensor, output, group or block, NVFP4, "
        "MXFP4, MXFP8",
        "w4a16_g128",
        cache=True,
    ),
    "gptq": Target(
        GPTQ,
        arrange_gptq,
        _describe_gptq,
        "integers of 2, 3, 4 or 8 bits with one scale a group of inputs, activations of 16 bits",
        "w4a16_g128",
        scale_dtype="float16",
    ),
    "awq": Target(
        AWQ,
        arrange_awq,
        _describe_awq,
        "4-bit integers with one scale a group of inputs, activations of 16 bits",
        "w4a16_g128_asym",
        scale_dtype="float16",
    ),
    "fp8": Target(
        FP8,
        arrange_fp8,
        _describe_fp8,
        "e4m3 with one scale a tensor, output or block, or MXFP8, and e4m3 activations",
        "fp8_b128",
        cache=True,
    ),
}
