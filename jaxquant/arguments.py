"""Arguments of public functions, checked: a wrong one is an error of this package's family."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxquant.errors import ConfigError

T = TypeVar("T")
MOST = 2**31 - 1


def described(value: Any) -> str:
    """A number, text or None itself, shortened; of anything else, which may be large, its type."""
    plain = value is None or isinstance(value, str | bytes | int | float | complex | np.generic)
    return repr(value)[:80] if plain else type(value).__name__


def known_values(x: jax.Array) -> np.ndarray | None:
    """The values of an array, None while a program is traced or where other hosts hold them."""
    if isinstance(x, Tracer) or not x.is_fully_addressable:
        return None
    return np.asarray(x)


def instance(where: str, value: Any, kind: type[T], rule: str, action: str = "") -> T:
    """Return ``value``, which has to be a ``kind``.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, kind):
        raise ConfigError(where, described(value), rule, action)
    return value


def path_of(where: str, value: Any) -> Path:
    """Return a path given as text or as a path.

    Raises:
        ConfigError: neither, or an empty text.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(where, described(value), "the name of a file or directory is needed")
    return Path(value)


def whole(where: str, value: Any, least: int | None = 1, most: int = MOST) -> int:
    """Return a whole number of any integer type, from ``least`` (if any) to ``most``.

    Raises:
        ConfigError: no number, one with a fraction, or out of range.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number > most or (least is not None and number < least):
        rule = "a whole number" + ("" if least is None else f" from {least}")
        rule += f" to {most}" if most != MOST else ""
        raise ConfigError(where, described(value), rule)
    return number


def real(where: str, value: Any) -> float:
    """Return a number that is no NaN.

    Raises:
        ConfigError: no number.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ConfigError(where, described(value), "a number")
    if value != value:
        raise ConfigError(where, repr(value), "a number")
    return float(value)


def float_dtype(where: str, value: Any) -> np.dtype:
    """Return a float type given by name or by type.

    Raises:
        ConfigError: no such type, or none of floats.
    """
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(where, repr(value)[:80], "a float type, e.g. jax.numpy.bfloat16")
    return dtype


def token_ids(where: str, value: Any, vocabulary: int) -> np.ndarray:
    """Return token ids as an int32 array of any shape.

    Raises:
        ConfigError: rows of several lengths, no integers, or ids outside the vocabulary.
    """
    try:
        ids = np.asarray(value)
    except ValueError:
        raise ConfigError(
            where, "rows of several lengths", "rows of token ids are one array"
        ) from None
    if not ids.size:
        return ids.astype(np.int32)
    if ids.dtype.kind not in "iu":
        raise ConfigError(where, f"{ids.dtype} values", "token ids are integers")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        rule = f"the vocabulary is 0 to {vocabulary - 1}"
        raise ConfigError(
            where, f"token ids {low} to {high}", rule, "use the model's own tokenizer"
        )
    return ids.astype(np.int32)
