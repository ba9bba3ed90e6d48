"""How checkpoint tools lay codes out in memory, written element by element from their definitions.

Nothing here is shared with the package: words are built as Python integers.
"""

import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def stream(codes, bits):
    """Dense little-endian bit stream of one row of codes, as uint32 words."""
    total = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [total >> (32 * i) & 0xFFFFFFFF for i in range(count)]


def padded(codes, bits):
    """floor(32/bits) codes to a word."""
    per = 32 // bits
    rows = [codes[i : i + per] for i in range(0, len(codes), per)]
    return [sum(int(c) << (j * bits) for j, c in enumerate(row)) for row in rows]


def words(matrix, bits, how=stream):
    """Rows of codes ``[r, n]`` as int32 words ``[r, w]``."""
    return np.array([how(row, bits) for row in matrix], np.uint32).view(np.int32)


def gptq_words(codes, bits):
    """Codes ``[out, in]`` as qweight ``[in*bits/32, out]``."""
    return np.ascontiguousarray(words(codes, bits).T)


def awq_words(codes):
    """Codes ``[out, in]`` as gemm words ``[in, out/8]``."""
    out, inputs = codes.shape
    packed = np.zeros((inputs, out // 8), np.uint32)
    for i, n in enumerate(AWQ_ORDER):
        packed |= codes[n::8].T.astype(np.uint32) << np.uint32(4 * i)
    return packed.view(np.int32)


def fast_place(n, k):
    """(row, column, nibble) of a code in AWQ GEMV_FAST words."""
    k32 = k % 32
    a, b, c = k32 // 8, (k32 % 8) // 2, k32 % 2
    pos = 8 * b + 2 * a + c
    x, y = pos % 8 // 2, pos % 8 % 2
    kk = 32 * (k // 32) + 8 * (pos // 8) + 4 * y + x
    flat = (n % 4) * 64 + kk % 64
    return n // 4, kk // 64 * 64 + flat // 4, flat % 4


def fast_words(codes):
    """Codes ``[out, in]`` as GEMV_FAST words int16 ``[out/4, in]``."""
    out, inputs = codes.shape
    packed = np.zeros((out // 4, inputs), np.uint16)
    for n in range(out):
        for k in range(inputs):
            row, column, nibble = fast_place(n, k)
            packed[row, column] |= np.uint16(int(codes[n, k]) << (4 * nibble))
    return packed.view(np.int16)


def nibbles(codes):
    """Codes ``[r, n]`` as bytes, low nibble first."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(octets):
    """Values of e4m3fn bytes, from the definition."""
    octets = octets.astype(np.int64)
    sign = np.where(octets >> 7, -1.0, 1.0)
    exponent, mantissa = octets >> 3 & 15, octets & 7
    small = mantissa * 2.0**-9
    large = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    return sign * np.where(exponent == 0, small, large)


def spread(cells, block, shape):
    """A grid of cells at full extents; a block of 0 covers the axis."""
    rows = np.arange(shape[0]) // (block[0] or shape[0])
    columns = np.arange(shape[1]) // (block[1] or shape[1])
    return np.asarray(cells, np.float64).reshape(rows[-1] + 1, columns[-1] + 1)[
        np.ix_(rows, columns)
    ]


def marlin_place(k, n, bits=4):
    """(row, field) of a code in Marlin words; fields count from the start of the row."""
    kr, nt, nc = k % 16, n // 16, n % 16
    hi, i4, lo = kr // 8, kr % 8 // 2, kr % 2
    ch, j, col, block = nt // 4, nt % 4, nc % 8, nc // 8
    pos = 32 * (4 * col + i4) + 8 * j + 4 * block + 2 * hi + lo
    il = AWQ_ORDER if bits == 4 else [0, 2, 1, 3]
    pos = pos // len(il) * len(il) + il.index(pos % len(il))
    return k // 16, 1024 * ch + pos


def marlin_words(codes):
    """4-bit codes ``[out, in]`` as Marlin words int32 ``[in/16, 2 * out]``."""
    out, inputs = codes.shape
    packed = np.zeros((inputs // 16, 2 * out), np.uint32)
    for n in range(out):
        for k in range(inputs):
            row, field = marlin_place(k, n)
            packed[row, field // 8] |= np.uint32(int(codes[n, k]) << (4 * (field % 8)))
    return packed.view(np.int32)


def marlin_scales(scales):
    """Scales ``[out, groups]`` as Marlin stores them, ``[groups, out]``."""
    flat = scales.T
    if scales.shape[1] > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    blocks = np.ascontiguousarray(flat).reshape(-1, len(order))
    return blocks[:, order].reshape(flat.shape)


def qserve_place(o, k, inputs):
    """(byte, nibble) of a code in QServe's qweight."""
    byte = (o // 32 * (inputs // 32) + k // 32) * 512 + (o % 8 * 4 + k % 16 // 4) * 16
    return byte + k % 32 // 16 * 8 + o // 8 % 2 * 4 + k % 4, o % 32 // 16


def qserve_bytes(codes):
    """Codes ``[out, in]`` as int8 ``[out, in/2]``."""
    out, inputs = codes.shape
    packed = np.zeros(out * inputs // 2, np.uint8)
    for o in range(out):
        for k in range(inputs):
            byte, nibble = qserve_place(o, k, inputs)
            packed[byte] |= np.uint8(int(codes[o, k]) << (4 * nibble))
    return packed.reshape(out, inputs // 2).view(np.int8)


def hqq_pack(codes, bits):
    """Codes ``[rows, group]`` in strided parts, the first part in the top bits."""
    per = 10 if bits == 3 else 8 // bits
    codes = np.pad(codes, ((0, -len(codes) % per), (0, 0)))
    step = len(codes) // per
    packed = sum(codes[i * step : (i + 1) * step] << (bits * (per - 1 - i)) for i in range(per))
    return packed.astype(np.uint32).view(np.int32) if bits == 3 else packed.astype(np.uint8)
