"""A model source mixed from several checkpoints, as a precision plan says."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxquant.arrays.codes import Code
from jaxquant.arrays.layout import Layout
from jaxquant.arrays.qtensor import QTensor
from jaxquant.convert.item import Item, ModelSource, scheme_item
from jaxquant.convert.plan_file import BASE, PrecisionPlan, resolve
from jaxquant.errors import LayoutError, PlanError
from jaxquant.formats.base import FormatWarning
from jaxquant.transforms.numeric import dequantize
from jaxquant.transforms.structure import slice_axis

# Outputs of these norms are inputs of these modules; smoothing folds scales into both.
_SMOOTHED = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
# Outputs of these modules are, but for a product with another's, inputs of those.
_FOLDED = {"v_proj": "o_proj", "up_proj": "down_proj"}
_ROWS = 256
# Between checkpoints of one model in 2 to 8 bits, with and without error feedback, the spread was
# at most 3.6 times the noise, but 5 and more where AWQ had smoothed one of them.
_SPREAD, _TIMES = 0.05, 4.0


def _integer(code: Code, bits: int) -> bool:
    # NVFP4, MXFP4 and the codebooks of NF4 and IQ4 have 4 bits too, and are no integers.
    return code.bits == bits and code.kind in ("int", "uint")


# Precision of a plan -> what it means, and whether a weight of a format and a layout is that.
_PRECISIONS: dict[str, tuple[str, Callable[[str, Layout], bool]]] = {
    "fp16": ("floats of 16 or 32 bits", lambda _, layout: layout.dense),
    "fp8": ("e4m3 or e5m2 codes", lambda _, layout: layout.code.name in ("e4m3", "e5m2")),
    "int8": ("8-bit integer codes", lambda _, layout: _integer(layout.code, 8)),
    "int4": ("4-bit integer codes", lambda _, layout: _integer(layout.code, 4)),
    "gptq_int4": ("4-bit codes of GPTQ", lambda f, layout: f == "gptq" and layout.code.bits == 4),
    "awq_int4": ("4-bit codes of AWQ", lambda f, layout: f == "awq" and layout.code.bits == 4),
}


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


def _first_rows(source: ModelSource, module: str) -> np.ndarray:
    """Some rows of a weight as it multiplies what its norm got."""
    q: QTensor = source.weights[module].load()
    with contextlib.suppress(LayoutError):  # Blocks of another height.
        q = slice_axis(q, "out", 0, min(_ROWS, q.shape[0]))
    rows = np.asarray(dequantize(q))[:_ROWS]
    if q.pre_scale is not None:
        rows = rows * np.asarray(q.pre_scale, np.float32)
    source.weights[module].release()
    layer, own = ".".join(module.split(".")[:3]), module.split(".")[-1]
    for norm, projections in _SMOOTHED.items():
        item = source.arrays.get(f"{layer}.{norm}.weight")
        if own in projections and "shared" not in module and item is not None:
            rows = rows * np.asarray(item.load()).astype(np.float32)
    return rows


def _rescaled(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether rows of the same weight differ by more than quantization: by a factor for each.

    The factors' spread is compared with what the rest of the difference, as noise, would give them.
    By medians: a few rows that were pruned do not count.
    """
    energy, other = (a * a).sum(1), (b * b).sum(1)
    alive = (energy > 1e-6 * energy.max(initial=0)) & (other > 1e-6 * other.max(initial=0))
    if not alive.any():
        return False
    a, b = a[alive], b[alive]
    factors = (a * b).sum(1) / energy[alive]
    logs = np.log(np.maximum(np.abs(factors), 1e-6))
    spread = float(np.median(np.abs(logs - np.median(logs))))
    rest = ((b - factors[:, None] * a) ** 2).sum(1) / other[alive]
    return spread > _SPREAD and spread > _TIMES * float(np.median(np.sqrt(rest / a.shape[1])))


def _folding_doubts(origins: Mapping[str, ModelSource]) -> list[str]:
    """Two modules in a row between which one checkpoint seems to have scales folded, not the other.

    The first and the last such pair of any two checkpoints are looked at.  No more than a doubt:
    weights say that they differ, not why.
    """
    pairs: dict[tuple[str, int, int], list[tuple[str, str]]] = {}
    for module, source in origins.items():
        stem, _, last = module.rpartition(".")
        following = f"{stem}.{_FOLDED.get(last)}"
        other = origins.get(following)
        if other is not None and other is not source:
            pairs.setdefault((last, id(source), id(other)), []).append((module, following))
    doubts = []
    for found in pairs.values():
        for module, following in dict.fromkeys((found[0], found[-1])):
            source, other = origins[module], origins[following]
            if module not in other.weights:
                continue
            own, its = _first_rows(source, module), _first_rows(other, module)
            # Coarse codes shrink rows unevenly, but only seen from the finer weight.
            if _rescaled(own, its) and _rescaled(its, own):
                doubts.append(
                    f"{following}: {other.path} seems to have it scaled to fit its own "
                    f"{module.rpartition('.')[2]}, not that of {source.path} (AWQ and SmoothQuant "
                    "do that): take both from one checkpoint"
                )
    return doubts


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
    Warns:
        FormatWarning: weights that look as if they were smoothed for another weight than the plan
            puts before them.
    """
    base = sources[plan.sources[BASE].resolve()]
    chosen, problems = resolve(plan, base.weights, base.config.family)
    weights: dict[str, Item] = {}
    arrays = dict(base.arrays)
    taken: dict[str, list[str]] = {}
    origins = dict.fromkeys(chosen, base)
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
        means, fits = _PRECISIONS[precision]
        if item is None:
            problems.append(f"{module}: missing in {other.path} ({precision})")
        elif not fits(item.format, item.abstract.layout):
            found = f"{item.format}, {item.abstract.layout}"
            problems.append(
                f"{module}: {other.path} has it as {found}, not as {precision}, which means {means}"
            )
        elif item.abstract.shape != base.weights[module].abstract.shape:
            shape = base.weights[module].abstract.shape
            found = f"{item.abstract.shape} in {other.path}, {shape} in the base"
            problems.append(f"{module}: {found} ({precision})")
        else:
            weights[module] = item
            taken.setdefault(precision, []).append(module)
            origins[module] = other
            bias = f"{module}.bias"
            if bias in other.arrays:
                arrays[bias] = other.arrays[bias]
    for precision, modules in taken.items():
        other = sources[plan.sources[precision].resolve()]
        if other is not base:
            problems += _smoothing_problems(precision, base, other, modules)
    if problems:
        raise PlanError(plan.file, problems, "correct the plan or the checkpoints it names")
    for doubt in _folding_doubts(origins):
        warnings.warn(f"{plan.file}: {doubt}", FormatWarning, stacklevel=2)
    return dataclasses.replace(opened, weights=weights, arrays=arrays, ignored=base.ignored)
