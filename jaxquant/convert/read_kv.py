"""Scales of a quantized KV cache, under the many names that checkpoints give them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxquant.convert.read_checkpoint import Checkpoint
from jaxquant.convert.read_json import load_object
from jaxquant.errors import FormatError
from jaxquant.formats.base import FormatWarning, RawTensor

MAX_SCALE = 1e4

_NAMES = (
    (re.compile(r"(?P<layer>.*\.(?:self_attn|attn|attention))\.(?P<part>[kvq])_scale"), ""),
    (re.compile(r"(?P<layer>.*\.(?:self_attn|attn|attention))\.kv_scale"), "kv"),
    (re.compile(r"(?P<layer>.*)\.[kv]_proj\.(?P<part>[kv])_scale"), ""),
    (re.compile(r"(?P<layer>.*)\.(?:qkv_proj|qkqkv_proj)\.(?P<part>[kv])_scale"), ""),
    (re.compile(r"(?P<layer>.*\.self_attn)\.(?P<part>[kvq])(?:_cache)?\.scale"), ""),
    (re.compile(r"(?P<layer>.*)\.(?P<part>[kvq])_proj\.output_scale"), ""),
    (re.compile(r"(?P<layer>.*\.self_attn)\.prob_output_scale"), "prob"),
    (re.compile(r"(?P<layer>.*\.self_attn)\.kv_scale_quant_orig"), "pair"),
)
SIDE_FILE = "kv_cache_scales.json"
_ATTENTION = re.compile(r"(?P<layer>.*\.layers\.(?P<index>\d+)\.(?:self_attn|attn|attention))\..*")
_OFFSET = re.compile(
    r".*\.(?:self_attn|attn|attention)\.[kvq]_zero_point|.*\.(?P<part>[kv])_proj\.(?P=part)_bias"
)


class KVScales(NamedTuple):
    """Scales of one attention layer; stored = value / scale.

    Attributes:
        k: ``[heads, 1, 1]`` or ``[]`` f32.
        v: likewise.
        q: likewise, None where the file has none.
        prob: ``[]`` f32 of the attention weights, None where the file has none.
    """

    k: np.ndarray
    v: np.ndarray
    q: np.ndarray | None = None
    prob: np.ndarray | None = None


def is_kv_scale(name: str) -> bool:
    """Whether a tensor's name is that of a KV cache scale."""
    return any(pattern.fullmatch(name) for pattern, _ in _NAMES)


def is_kv_zero(tensor: RawTensor) -> bool:
    """Whether a tensor is an offset of a KV cache that is zero, as those of symmetric ones are."""
    return _OFFSET.fullmatch(tensor.name) is not None and not tensor.read().any()


def _read(tensor: RawTensor) -> np.ndarray:
    value = tensor.read().astype(np.float32)
    value = value.reshape(()) if value.size == 1 else value
    if not (np.isfinite(value).all() and (value > 0).all() and (value < MAX_SCALE).all()):
        raise tensor.error(
            f"scale {np.ravel(value)[:4].tolist()}",
            f"KV scales lie between 0 and {MAX_SCALE:g}",
            "calibrate the cache again",
        )
    return value


def kv_scales(checkpoint: Checkpoint) -> dict[str, KVScales]:
    """KV cache scales of every attention layer that has them.

    Where only one of k and v is stored, it serves both, with a warning.  Besides tensors these are
    the scales of ``kv_cache_scales.json``, one a layer for k and v.

    Returns:
        module path of the attention -> scales.
    Raises:
        FormatError: a scale is not finite, not positive or implausibly large, or given twice; a
            side file that does not fit the checkpoint.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in checkpoint.tensors.items():
        for pattern, kind in _NAMES:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            value, layer = _read(tensor), found.setdefault(match["layer"], {})
            if kind == "pair":
                if value.shape != (2,):
                    raise tensor.error(f"shape {list(value.shape)}", "[2]: k, v")
                parts = {"k": value[0].reshape(()), "v": value[1].reshape(())}
            else:
                parts = dict.fromkeys(
                    tuple(kind) if kind == "kv" else (kind or match["part"],), value
                )
            for part, scale in parts.items():
                if part in layer and not np.array_equal(layer[part], scale):
                    raise tensor.error(f"a second scale for {part}", "one scale a layer")
                layer[part] = scale
            break
    scales = {layer: _complete(layer, parts) for layer, parts in found.items()}
    for layer, scale in _side_scales(checkpoint).items():
        stored = scales.setdefault(layer, KVScales(scale, scale))
        if not (np.array_equal(stored.k, scale) and np.array_equal(stored.v, scale)):
            raise FormatError(
                f"{checkpoint.path / SIDE_FILE}: {layer}",
                f"{np.ravel(scale)[:4].tolist()}, where the tensors have k "
                f"{np.ravel(stored.k)[:4].tolist()} and v {np.ravel(stored.v)[:4].tolist()}",
                "one scale a layer",
                f"remove {SIDE_FILE}, or the tensors",
            )
    return scales


def _side_scales(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The scales of ``kv_cache_scales.json``, which vLLM took as ``--quantization-param-path``.

    ::

        {"model_type": "llama",
         "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.02, "1": 0.03}}}}

    The factors are by rank of tensor parallelism, then by layer.  Ranks hold heads in order, so
    ranks that differ give one scale a head.

    Returns:
        module path of the attention -> ``[]`` or ``[heads, 1, 1]`` f32.
    """
    path = checkpoint.path / SIDE_FILE
    if not path.is_file():
        return {}
    where, content = str(path), load_object(path)
    cache = content.get("kv_cache")
    cache = cache if isinstance(cache, Mapping) else {}
    if cache.get("dtype") != "float8_e4m3fn":
        raise FormatError(
            f"{where}: kv_cache: dtype", repr(cache.get("dtype"))[:80], "float8_e4m3fn is read"
        )
    kind, own = content.get("model_type"), checkpoint.config.get("model_type")
    if kind is not None and own is not None and kind != own:
        rule = f"config.json says {own!r}"
        raise FormatError(f"{where}: model_type", repr(kind)[:80], rule, "use the model's own file")
    places = {
        int(match["index"]): match["layer"]
        for match in map(_ATTENTION.fullmatch, checkpoint.tensors)
        if match is not None and len(match["index"]) < 6
    }
    ranks = _in_order(cache.get("scaling_factor"), f"{where}: kv_cache: scaling_factor")
    count = checkpoint.config.get("num_hidden_layers")
    # A layer of multi-token prediction comes after the last one; it may have no factor.
    needed = sorted(i for i in places if type(count) is not int or i < count)
    columns: list[list[float]] = []
    for rank, layers in enumerate(ranks):
        at = f"{where}: kv_cache: scaling_factor: {rank}"
        factors = _in_order(layers, at)
        if len(factors) < len(needed) or len(factors) > len(places):
            rule = f"the checkpoint has {len(needed)} layers"
            raise FormatError(at, f"{len(factors)} layers", rule, "use the model's own file")
        for layer, factor in enumerate(factors):
            if type(factor) not in (int, float) or not 0 < factor < MAX_SCALE:
                rule = f"KV scales lie between 0 and {MAX_SCALE:g}"
                raise FormatError(f"{at}: {layer}", repr(factor)[:80], rule)
        columns.append(factors)
    scales = np.asarray(columns, np.float32)
    heads = checkpoint.config.get("num_key_value_heads")
    if (scales == scales[:1]).all():
        values = scales[0]
    elif type(heads) is int and heads > 0 and heads % len(columns) == 0:
        values = np.repeat(scales, heads // len(columns), 0).T[..., None, None]
    else:
        rule = f"num_key_value_heads = {heads} heads divided among the ranks"
        raise FormatError(where, f"{len(columns)} ranks with factors of their own", rule)
    return {places[i]: np.asarray(values[i]) for i in range(len(values)) if i in places}


def _in_order(table: Any, where: str) -> list[Any]:
    """The values of an object with the keys "0", "1" ..., in the order of the numbers."""
    rule = 'an object with keys "0", "1" ...'
    if not isinstance(table, Mapping) or not table:
        raise FormatError(where, repr(table)[:80], rule)
    if table.keys() != {str(i) for i in range(len(table))}:
        raise FormatError(where, f"keys {sorted(table)[:8]}", rule)
    return [table[str(i)] for i in range(len(table))]


def _complete(layer: str, parts: Mapping[str, np.ndarray]) -> KVScales:
    k, v = parts.get("k"), parts.get("v")
    if k is None and v is None:
        raise FormatError(layer, f"only {sorted(parts)} scales", "a KV cache has k and v scales")
    if k is None or v is None:
        warnings.warn(
            f"{layer}: only one of the k and v scales is stored; it is used for both",
            FormatWarning,
            stacklevel=3,
        )
    one = k if k is not None else v
    other = v if v is not None else k
    assert one is not None and other is not None
    return KVScales(one, other, parts.get("q"), parts.get("prob"))


def kv_cache_scheme(checkpoint: Checkpoint) -> str | None:
    """How the checkpoint wants its KV cache quantized: "fp8", "int8", "nvfp4", or None.

    Raises:
        FormatError: a scheme that has no meaning here.
    """
    config = checkpoint.quant_config or {}
    scheme = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo")
    if not scheme:
        return None
    if isinstance(scheme, Mapping):
        name = f"{scheme.get('type', 'int')}{scheme.get('num_bits', 8)}"
    else:
        name = str(scheme).lower()
    names = {"float8": "fp8", "fp8": "fp8", "int8": "int8", "nvfp4": "nvfp4", "float4": "nvfp4"}
    if name not in names:
        raise FormatError("quantization_config: kv_cache_scheme", name, f"one of {sorted(names)}")
    return names[name]
