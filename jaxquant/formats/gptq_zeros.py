"""The zero points of GPTQ files, in two versions and with GPTQModel's own ones.

v1 files store the zero point less one, v2 files store it as it is.  Reading the wrong version moves
every weight by one step without any other sign of it, so a symmetric file's constant is looked at.
"""

from __future__ import annotations

import warnings

import numpy as np

from jaxquant.formats.base import FormatWarning, RawModule
from jaxquant.transforms.repack import elements_to_words, words_to_elements

BITS = (2, 3, 4, 8)


def _ones(bits: int) -> np.uint32:
    """A word with 1 in every field of ``bits`` bits."""
    return np.uint32(sum(1 << shift for shift in range(0, 32, bits)))


def read_zeros(words: np.ndarray, bits: int, one_bits: int, out: int, version: int) -> np.ndarray:
    """Zero points uint8 ``[groups, out]`` of stored words."""
    if version == 1 and one_bits != bits and 3 not in (bits, one_bits):
        return words_to_elements(words.view(np.uint32) + _ones(one_bits), bits, out)
    stored = words_to_elements(words, bits, out)
    return (stored + np.uint8(2 - version)) & np.uint8((1 << bits) - 1)


def write_zeros(zeros: np.ndarray, bits: int, one_bits: int, version: int) -> np.ndarray:
    """Inverse of :func:`read_zeros`."""
    if version == 1 and one_bits != bits and 3 not in (bits, one_bits):
        words = elements_to_words(zeros, bits).view(np.uint32) - _ones(one_bits)
        return words.view(np.int32)
    stored = (zeros - np.uint8(2 - version)) & np.uint8((1 << bits) - 1)
    return elements_to_words(stored, bits)


def zero_points(
    module: RawModule,
    bits: int,
    one_bits: int,
    groups: int,
    out: int,
    symmetric: bool,
    version: int,
) -> tuple[bool, int, int]:
    """Check ``qzeros`` and find out how it is written.

    A symmetric checkpoint has one constant zero point; which constant tells the version, whatever
    the config says.

    Args:
        module: the module, with ``qzeros`` I32 [groups, out * bits / 32].
        bits: width of the module's codes.
        one_bits: width of the ones that v1 tools subtracted.
        groups: number of groups.
        out: number of outputs.
        symmetric: what the config says.
        version: what the config says.
    Returns:
        whether real zero points remain, the version and the width of ones that the data shows.
    Raises:
        FormatError: dtype or shape contradict the width; names the width that would fit.
    """
    qzeros = module.need("qzeros")
    expected = (groups, out * bits // 32)
    if qzeros.dtype not in ("I32", "U32") or qzeros.shape != expected or out * bits % 32:
        implied = [b for b in BITS if qzeros.shape == (groups, out * b // 32)]
        hint = f"the shape says {implied[0]} bits: correct the config" if implied else ""
        raise qzeros.error(
            f"{qzeros.dtype} {list(qzeros.shape)}", f"I32 {list(expected)} for {bits} bits", hint
        )
    words, middle = qzeros.read(), 1 << (bits - 1)
    where = f"{qzeros.file}: {qzeros.name}"
    if symmetric:
        for candidate, ones in dict.fromkeys(
            ((version, one_bits), (version, bits), (3 - version, bits))
        ):
            if (read_zeros(words, bits, ones, out, candidate) == middle).all():
                if candidate != version:
                    warnings.warn(
                        f"{where}: zero points are those of gptq v{candidate}, the config says "
                        f"v{version}; the data is trusted",
                        FormatWarning,
                        stacklevel=2,
                    )
                return False, candidate, ones
        warnings.warn(
            f"{where}: the config says symmetric, the zero points vary; they are used",
            FormatWarning,
            stacklevel=2,
        )
    if version == 1 and not read_zeros(words, bits, one_bits, out, version).all():
        warnings.warn(
            f"{where}: a stored zero point of -1 is read as zero point 0",
            FormatWarning,
            stacklevel=2,
        )
    return True, version, one_bits
