"""Rotary position embedding with every scaling the supported families use.

The formulas are those of the YaRN paper (arXiv 2309.00071), Llama 3.1's wavelength interpolation,
LongRoPE (arXiv 2402.13753) and the NTK-aware base change; field names follow ``rope_parameters`` of
Hugging Face configs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import ConfigError
from jaxquant.fields import Fields

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding; hashable.

    Attributes:
        dim: rotated features of a head; features past it pass through.
        theta: base of the frequencies.
        kind: scaling.
        factor: how much longer than ``original_length`` positions may get.
        original_length: positions the model was first trained on.
        max_length: positions the config allows.
        low_freq_factor, high_freq_factor: llama3's wavelength band.
        beta_fast, beta_slow: yarn's band in rotations over ``original_length``.
        truncate: round yarn's band to whole features.
        magnitude: what cos and sin are multiplied by.
        short_factor, long_factor: longrope's divisors, one per frequency.
        interleaved: features come in pairs (x0, x1), (x2, x3) ... instead of two halves.
    """

    dim: int
    theta: float
    kind: Kind = "default"
    factor: float = 1.0
    original_length: int = 0
    max_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    interleaved: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int, interleaved: bool = False) -> Rope:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

        Args:
            config: a model's config.json.
            head_dim: features of a head that can be rotated.
            interleaved: pair order of the family.
        Raises:
            ConfigError: unknown scaling, or a number that the scaling needs is missing.
        """
        top = Fields(config, "config.json")
        scaling = top.object("rope_parameters", "rope_scaling")
        found: Any = scaling.get("rope_type", scaling.get("type")) or "default"
        if not isinstance(found, str) or found not in (*get_args(Kind), "su"):
            rule = f"one of {get_args(Kind)}"
            raise ConfigError("config.json: rope_type", repr(found)[:80], rule)
        kind: Any = "longrope" if found == "su" else found
        read = Fields(scaling, "config.json: rope", needs=f"rope_type {kind!r}")
        theta = read.positive("rope_theta", default=top.positive("rope_theta", default=10000.0))
        partial = read.positive(
            "partial_rotary_factor", default=top.positive("partial_rotary_factor", default=1.0)
        )
        dim = int(head_dim * partial)
        if dim % 2 or not 0 < dim <= head_dim:
            rule = f"an even number of features, at most {head_dim}"
            raise ConfigError("config.json: partial_rotary_factor", f"{dim} features rotate", rule)
        max_length = top.count("max_position_embeddings", default=0, least=0)
        name = "original_max_position_embeddings"
        fallback = top.count(name, default=max_length, least=0)
        original = read.count(name, default=None if kind == "llama3" else fallback, least=0)
        if kind in ("dynamic", "llama3", "yarn", "longrope") and original < 2:
            raise read.error(name, repr(original), "at least 2")
        bands = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow"),
        }
        optional: dict[str, Any] = {
            key: read.positive(key)
            for key in bands.get(kind, ())
            if kind == "llama3" or scaling.get(key) is not None
        }
        if kind == "longrope":
            stretch = max_length / original if max_length else 1.0
            optional["short_factor"] = read.numbers("short_factor", dim // 2)
            optional["long_factor"] = read.numbers("long_factor", dim // 2)
            for key in ("short_factor", "long_factor"):
                if len(optional[key]) != dim // 2:
                    raise read.error(key, f"{len(optional[key])} numbers", f"{dim // 2}")
        else:
            stretch = None if kind != "default" else 1.0
        factor = float(read.positive("factor", default=stretch))
        return cls(
            dim=dim,
            theta=float(theta),
            kind=kind,
            factor=factor,
            original_length=original,
            max_length=max_length,
            truncate=read.flag("truncate", True),
            magnitude=_magnitude(kind, read, factor, original),
            interleaved=interleaved,
            **optional,
        )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of attention with length: ``0.1 mscale ln(factor) + 1``."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _magnitude(kind: str, read: Fields, factor: float, original: int) -> float:
    """What cos and sin are multiplied by, where the config does not say it itself."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if read.get("attention_factor")[1] is not None:
        return float(read.positive("attention_factor"))
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    mscale = read.number("mscale", default=0.0, least=0)
    all_dim = read.number("mscale_all_dim", default=0.0, least=0)
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def _base_frequencies(theta: Any, dim: int) -> Any:
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    if isinstance(theta, jax.Array):
        return 1.0 / theta[..., None] ** exponent
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def frequencies(rope: Rope, length: jax.Array | None = None) -> Any:
    """Radians per position of each rotated pair.

    Args:
        rope: the embedding.
        length: ``[batch]`` positions in use, for the kinds that depend on it (dynamic, longrope);
            None stands for at most ``original_length``.
    Returns:
        float32 ``[dim / 2]``, or ``[batch, dim / 2]`` where it depends on ``length``.
    """
    base = _base_frequencies(rope.theta, rope.dim)
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "dynamic" and length is not None:
        longest = jnp.maximum(length, rope.original_length).astype(jnp.float32)
        stretch = rope.factor * longest / rope.original_length - (rope.factor - 1)
        return _base_frequencies(rope.theta * stretch ** (rope.dim / (rope.dim - 2)), rope.dim)
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base)
    if rope.kind == "longrope":
        short, long = (
            base / np.asarray(f, np.float32) for f in (rope.short_factor, rope.long_factor)
        )
        if length is None:
            return short
        return jnp.where((length > rope.original_length)[:, None], long, short)
    return base


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / base
    low = rope.original_length / rope.low_freq_factor
    high = rope.original_length / rope.high_freq_factor
    blend = (rope.original_length / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    middle = (1 - blend) * base / rope.factor + blend * base
    scaled = np.where(wavelength > low, base / rope.factor, base)
    inside = (wavelength <= low) & (wavelength >= high)
    return np.where(inside, middle, scaled).astype(np.float32)


def _yarn(rope: Rope, base: np.ndarray) -> np.ndarray:
    def feature(rotations: float) -> float:
        """Index of the pair that makes so many rotations over the original length."""
        turns = math.log(rope.original_length / (rotations * 2 * math.pi))
        return rope.dim * turns / (2 * math.log(rope.theta))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / span, 0, 1)
    return (base / rope.factor * ramp + base * (1 - ramp)).astype(np.float32)


def rotation(
    rope: Rope, positions: jax.Array, length: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for tokens at ``positions``.

    Args:
        rope: the embedding.
        positions: int32 ``[batch, token]``.
        length: ``[batch]`` positions in use, padding not counted, for the kinds that depend on it
            (see :func:`frequencies`); None counts all.
    Returns:
        Two float32 arrays ``[batch, token, 1, dim / 2]``.
    """
    if rope.kind not in ("dynamic", "longrope"):
        length = None
    elif length is None:
        length = jnp.max(positions, axis=-1) + 1
    table = jnp.asarray(frequencies(rope, length))
    table = table[None, None] if table.ndim == 1 else table[:, None]
    angle = positions[..., None].astype(jnp.float32) * table
    cos, sin = jnp.cos(angle) * rope.magnitude, jnp.sin(angle) * rope.magnitude
    return cos[:, :, None], sin[:, :, None]


def rotate(rope: Rope, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first ``rope.dim`` features of every head.

    Interleaved pairs come out as two halves: queries and keys are permuted alike, so that their
    products stay the same.

    Args:
        rope: the embedding.
        x: ``[batch, token, head, features]``.
        cos: from :func:`rotation`.
        sin: from :func:`rotation`.
    Returns:
        Shape and dtype of ``x``; computed in float32.
    """
    turned = x[..., : rope.dim].astype(jnp.float32)
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., rope.dim :]], axis=-1)
