"""The swizzled order of block scales that tensor-core libraries read (tiles of 128 rows x 4).

Checkpoints keep block scales row-major; some runtimes store them swizzled.  With the matrix padded
to 128 rows and 4 columns, byte (m, k) stands at
``(m // 128 * columns / 4 + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4``.
"""

from __future__ import annotations

import numpy as np

from jaxquant.arrays.layout import cells
from jaxquant.errors import FormatError


def swizzle_scales(scales: np.ndarray) -> np.ndarray:
    """Swizzled bytes ``[ceil(rows, 128) * ceil(columns, 4)]`` of scales ``[rows, columns]``.

    Args:
        scales: any one-byte dtype; padding is zero bytes.
    """
    rows, columns = scales.shape
    tall, wide = cells(rows, 128), cells(columns, 4)
    padded = np.zeros((tall * 128, wide * 4), np.uint8)
    padded[:rows, :columns] = scales.view(np.uint8)
    # Axes m//128, m%128//32, m%32, k//4, k%4 go to m//128, k//4, m%32, m%128//32, k%4.
    tiles = padded.reshape(tall, 4, 32, wide, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles).reshape(-1).view(scales.dtype)


def unswizzle_scales(swizzled: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Inverse of :func:`swizzle_scales`: scales ``[rows, columns]`` without the padding.

    Raises:
        FormatError: another number of bytes than the padded matrix has.
    """
    tall, wide = cells(rows, 128), cells(columns, 4)
    if swizzled.size != tall * wide * 512:
        raise FormatError(
            "swizzled scales",
            f"{swizzled.size} bytes",
            f"{tall * wide * 512} for {rows} x {columns}",
        )
    tiles = swizzled.reshape(-1).view(np.uint8).reshape(tall, wide, 32, 4, 4)
    padded = tiles.transpose(0, 3, 2, 1, 4).reshape(tall * 128, wide * 4)
    return np.ascontiguousarray(padded[:rows, :columns]).view(swizzled.dtype)
