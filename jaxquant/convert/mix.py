"""A model source mixed from several checkpoints, as a precision plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxquant.convert.item import Item, ModelSource, scheme_item
from jaxquant.convert.plan_file import BASE, PrecisionPlan, resolve
from jaxquant.errors import PlanError

# Outputs of these norms are inputs of these modules; smoothing folds scales into both.
_SMOOTHED = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}


def _fits(precision: str, item: Item) -> bool:
    """Whether a weight is what a precision's name promises."""
    layout = item.abstract.layout
    code = layout.code
    return {
        "fp16": layout.dense,
        "fp8": code.name in ("e4m3", "e5m2"),
        "int8": code.bits == 8 and code.kind != "float",
        "int4": code.bits == 4,
        "gptq_int4": item.format == "gptq" and code.bits == 4,
        "awq_int4": item.format == "awq" and code.bits == 4,
    }[precision]


def _same_array(a: Item, b: Item) -> bool:
    return np.array_equal(
        np.asarray(a.load()).astype(np.float32), np.asarray(b.load()).astype(np.float32)
    )


def _smoothing_problems(
    precision: str, base: ModelSource, other: ModelSource, modules: list[str]
) -> list[str]:
    """Weights that were smoothed for another norm than the base's cannot be mixed with it."""
    norms: dict[str, str] = {}
    for module in modules:
        layer = ".".join(module.split(".")[:3])
        for norm, projections in _SMOOTHED.items():
            if module.split(".")[-1] in projections and "shared" not in module:
                norms.setdefault(f"{layer}.{norm}.weight", module)
    return [
        f"{module}: {precision}'s {norm} differs from the base's, so its weights were scaled to "
        "fit another norm (AWQ and SmoothQuant do that)"
        for norm, module in norms.items()
        if norm in base.arrays
        and norm in other.arrays
        and not _same_array(base.arrays[norm], other.arrays[norm])
    ]


def mixed(
    opened: ModelSource, plan: PrecisionPlan, sources: Mapping[Path, ModelSource]
) -> ModelSource:
    """Take every weight from where a plan says.

    Args:
        opened: the checkpoint that was asked for; config and tokenizer are its own.
        plan: which weights come from which source, or are quantized here.
        sources: every checkpoint that the plan names, by resolved path.
    Raises:
        PlanError: weights that are missing, differ in shape, are not what the plan calls them, or
            were smoothed for other norms than the base's; all problems.
    """
    base = sources[plan.sources[BASE].resolve()]
    chosen, problems = resolve(plan, base.weights, base.config.family)
    weights: dict[str, Item] = {}
    arrays = dict(base.arrays)
    taken: dict[str, list[str]] = {}
    for module, precision in chosen.items():
        if precision == BASE:
            weights[module] = base.weights[module]
            continue
        scheme = plan.scheme(precision)
        if scheme is not None:
            weights[module] = scheme_item(base.weights[module], scheme)
            continue
        other = sources[plan.sources[precision].resolve()]
        item = other.weights.get(module)
        if item is None:
            problems.append(f"{module}: missing in {other.path} ({precision})")
        elif not _fits(precision, item):
            found = f"{item.format}, {item.abstract.layout}"
            problems.append(f"{module}: {other.path} has it as {found}, not as {precision}")
        elif item.abstract.shape != base.weights[module].abstract.shape:
            shape = base.weights[module].abstract.shape
            found = f"{item.abstract.shape} in {other.path}, {shape} in the base"
            problems.append(f"{module}: {found} ({precision})")
        else:
            weights[module] = item
            taken.setdefault(precision, []).append(module)
            bias = f"{module}.bias"
            if bias in other.arrays:
                arrays[bias] = other.arrays[bias]
    for precision, modules in taken.items():
        other = sources[plan.sources[precision].resolve()]
        if other is not base:
            problems += _smoothing_problems(precision, base, other, modules)
    if problems:
        raise PlanError(plan.file, problems, "correct the plan or the checkpoints it names")
    return dataclasses.replace(opened, weights=weights, arrays=arrays, ignored=base.ignored)
