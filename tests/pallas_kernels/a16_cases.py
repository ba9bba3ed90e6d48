"""Random operands of the ops on prepacked weights, and what they must compute in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle

from pallas_kernels import Prepacked, prepack
from pallas_kernels.record import WORDS

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PLANES = {"uint4": (4,), "float4_e2m1fn": (4,), "uint5": (4, 1), "uint6": (4, 2)}

_prepack = jax.jit(prepack, static_argnames=("code", "group", "block", "factor_block", "operand"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: sizes, weight format, and what the activations are.

    Attributes:
        m, n, k: tokens, output channels, contracted extent.
        code: type of the weight codes.
        group: values of k that share a scale; None for all.
        block: channels that share a scale.
        zero: whether there are zero points.
        scale: type of the scales; integers have float16 super-scales for 256 values of k, or for
            narrow activations float16 factors.
        offset: whether there are offsets, of the scales' build.
        factor: channels that share a float32 factor; 0 for no factors.
        x: type of the activations; 8 bits for `matmul_w4a8`.
        bias: type of the bias; "" for none.
        perm: whether activations are gathered.
    """

    m: int
    n: int = 128
    k: int = 256
    code: str = "uint4"
    group: int | None = 128
    block: int = 1
    zero: bool = False
    scale: str = "bfloat16"
    x: str = "bfloat16"
    bias: str = ""
    perm: bool = False
    offset: bool = False
    factor: int = 0

    def __str__(self) -> str:
        factor = f"factor{self.factor}" if self.factor else ""
        flags = ("zero" * self.zero, "offset" * self.offset, "perm" * self.perm, self.bias, factor)
        parts = (self.code, f"g{self.group}x{self.block}", self.scale, self.x, *flags)
        return f"{self.m}x{self.n}x{self.k}-" + "-".join(part for part in parts if part)

    @property
    def narrow(self) -> bool:
        """Whether the activations have 8 bits."""
        return self.x in ("int8", "float8_e4m3fn")

    @property
    def cells(self) -> tuple[int, int]:
        """Shape of the scales."""
        return -(-self.n // self.block), -(-self.k // (self.group or self.k))

    @property
    def out(self) -> str:
        """Type of the result."""
        return "bfloat16" if self.narrow else self.x

    def plain(self, seed: int = 0) -> dict:
        """Return the array operands of `prepack`, random."""
        rng = np.random.default_rng(seed)
        if self.code in PLANES:
            planes = PLANES[self.code]
            shapes = [(self.n, self.k * bits // 8) for bits in planes]
            codes = tuple(rng.integers(0, 256, shape, np.uint8) for shape in shapes)
            codes = codes[0] if len(planes) == 1 else codes
        elif self.code == "int8":
            codes = rng.integers(-128, 128, (self.n, self.k), np.int8)
        else:
            codes = oracle.float8(rng.standard_normal((self.n, self.k)) * 4, self.code)
        scales, zeros = self._scales(rng), None
        if self.zero:
            zeros = rng.integers(0, 16, self.cells, np.uint8)
        if self.offset:
            zeros = self._scales(rng)
        if self.progressive:
            codes, scales, zeros = self._progressive(rng)
        if self.factor:
            factors = np.exp(rng.uniform(-1, 1, (-(-self.n // self.factor), 1))).astype(np.float32)
            scales = (*(scales if isinstance(scales, tuple) else (scales,)), factors)
        return {"codes": codes, "scales": scales, "zeros": zeros}

    @property
    def progressive(self) -> bool:
        """Whether codes by an integer scale are int8 operands."""
        return self.narrow and self.scale == "int8"

    def _progressive(self, rng: np.random.Generator):
        """Return codes, scales and zero points whose products take all of int8."""
        fine = rng.integers(1, 128, self.cells) >> rng.integers(0, 7, self.cells)
        fine = np.maximum(fine, 1).astype(np.int8)
        zeros = rng.integers(0, 16, self.cells).astype(np.uint8)
        step = np.repeat(fine, self.group, 1)[:, : self.k].astype(int)
        zero = np.repeat(zeros, self.group, 1)[:, : self.k].astype(int)
        codes = zero + rng.integers(-128, 128, step.shape) // step
        codes = codes.clip(np.maximum(zero - 128 // step, 0), np.minimum(zero + 127 // step, 15))
        codes = codes.astype(np.uint8)
        tops = (np.exp(rng.uniform(-1, 1, (self.n, 1))) / 64).astype(np.float16)
        return codes[:, ::2] | codes[:, 1::2] << 4, (fine, tops), zeros

    def _scales(self, rng: np.random.Generator):
        if self.scale == "float8_e8m0fnu":
            return rng.integers(120, 132, self.cells, np.uint8).view(ml_dtypes.float8_e8m0fnu)
        if self.scale == "float8_e4m3fn":  # all finite ones, of both signs
            scales = rng.integers(0, 127, self.cells, np.uint8)
            sign = rng.integers(0, 2, self.cells, np.uint8) << 7
            return (scales | sign).view(ml_dtypes.float8_e4m3fn)
        if self.scale in ("uint8", "int8"):
            low, high = (0, 64) if self.scale == "uint8" else (-128, 128)
            tops = np.exp(rng.uniform(-1, 1, (self.n, -(-self.k // 256)))) / 1024
            return rng.integers(low, high, self.cells).astype(self.scale), tops.astype(np.float16)
        scales = np.exp(rng.uniform(-1, 1, self.cells)) / 16
        return scales.astype(getattr(ml_dtypes, self.scale, self.scale))

    def pack(self, plain: dict) -> Prepacked:
        """Return the prepacked weight."""
        operand = 8 if self.narrow else 16
        arrays = jax.tree.map(jnp.asarray, plain)
        sizes = {"group": self.group, "block": self.block, "factor_block": self.factor or 1}
        return _prepack(**arrays, code=self.code, **sizes, operand=operand)

    def activations(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return the operands besides the weight."""
        rng = np.random.default_rng(seed + 1)
        x = rng.standard_normal((self.m, self.k)) + 0.5
        if self.narrow:
            x = np.round(x * 30).clip(-127, 127)
        dtype = getattr(ml_dtypes, self.x, self.x)
        operands = {"x_q" if self.narrow else "x": x.astype(dtype)}
        if self.narrow:
            operands["x_scale"] = np.exp(rng.uniform(-1, 1, (self.m, 1))).astype(np.float32) / 30
        if self.bias:
            bias = rng.standard_normal(self.n) * 8
            operands["bias"] = bias.astype(getattr(ml_dtypes, self.bias, self.bias))
        if self.perm:
            operands["perm"] = rng.permutation(self.k).astype(np.int32)
        return operands

    def values(self, plain: dict) -> np.ndarray:
        """Return the numbers that the codes stand for, in float64."""
        if self.code not in PLANES:
            return plain["codes"].astype(np.float64)
        planes = plain["codes"] if isinstance(plain["codes"], tuple) else (plain["codes"],)
        total, low = 0, 0
        for plane, bits in zip(planes, PLANES[self.code], strict=True):
            parts = [plane >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
            total = total + (np.stack(parts, -1).reshape(self.n, self.k).astype(int) << low)
            low += bits
        if self.code == "float4_e2m1fn":
            return E2M1_VALUES[total]
        if self.zero:
            zeros = oracle.dequantize(np.ones((self.n, self.k)), plain["zeros"], self.spread)
            return total - zeros
        return total - (0.0 if self.offset else 2.0 ** (low - 1))

    @property
    def spread(self) -> tuple[int, int]:
        """Channels and values of k that share a scale."""
        return self.block, self.group or self.k

    def levels(self, given) -> np.ndarray:
        """Return scales or offsets of all weights, every level multiplied, in float64."""
        result = np.ones((self.n, self.k))
        for level in given if isinstance(given, tuple) else (given,):
            spread = (self.factor, self.k) if level.dtype == np.float32 and self.factor else None
            spread = (1, self.k) if self.narrow and level.shape == (self.n, 1) else spread
            spread = spread or (self.spread if level.shape == self.cells else (1, 256))
            result = oracle.dequantize(result, level, spread)
        return result

    def dense(self, plain: dict) -> np.ndarray:
        """Return the weight in float64."""
        result = self.values(plain) * self.levels(plain["scales"])
        return result - self.levels(plain["zeros"]) if self.offset else result

    def expected(self, plain: dict[str, np.ndarray | None], seed: int = 0) -> np.ndarray:
        """Return the result in float64."""
        given = self.activations(seed)
        x = given["x_q" if self.narrow else "x"].astype(np.float64)
        if self.perm:
            x = x[:, given["perm"]]
        y = x @ self.dense(plain).T
        y = y * given["x_scale"].astype(np.float64) if self.narrow else y
        return y + given["bias"].astype(np.float64) if self.bias else y

    def structs(self) -> dict[str, object]:
        """Return the types of all operands of the op, without values."""
        small = dataclasses.replace(self, m=1)
        tiny = dataclasses.replace(small, n=128, k=max(256, self.group or 0))
        weight = jax.eval_shape(tiny.pack, tiny.plain())
        rows = (self.n // 64 * -(-self.k // 128), weight.record.rows, WORDS)
        if factor := weight.factor:
            width = 1 if self.factor >= self.n else self.n
            factor = jax.ShapeDtypeStruct((width,), factor.dtype)
        if offset := weight.offset:
            offset = jax.ShapeDtypeStruct((self.n,), offset.dtype)
        weight = dataclasses.replace(
            weight,
            offset=offset,
            records=jax.ShapeDtypeStruct(rows, jnp.int32),
            n=self.n,
            k=self.k,
            group=self.group or self.k,
            factor=factor,
        )
        values = small.activations()
        shapes = {name: (self.m, *value.shape[1:]) for name, value in values.items()}
        shapes |= {name: values[name].shape for name in ("bias", "perm") if name in values}
        types = {name: jax.ShapeDtypeStruct(shapes[name], values[name].dtype) for name in values}
        return {"weight": weight, **types}


FORMATS = (
    Case(0),
    Case(0, zero=True, bias="bfloat16"),
    Case(0, group=64, zero=True, scale="float32"),
    Case(0, group=32, zero=True),
    Case(0, group=32, x="float16", scale="float16", bias="float32"),
    Case(0, group=None, scale="float32", perm=True),
    Case(0, k=192, zero=True, x="float16", scale="float16"),
    Case(0, code="int8", group=None, scale="float32", bias="float16"),
    Case(0, code="int8", group=32, x="float16", scale="float16"),
    Case(0, code="float8_e4m3fn", block=128, scale="float32"),
    Case(0, code="float8_e4m3fn", group=64, x="float16", scale="float16"),
    Case(0, code="float8_e4m3fn", group=None, scale="float32", x="float16"),
)
NVFP4 = Case(0, code="float4_e2m1fn", group=16, scale="float8_e4m3fn", factor=4096)
MXFP4 = Case(0, code="float4_e2m1fn", group=32, scale="float8_e8m0fnu")
Q8_0 = Case(0, code="int8", group=32, scale="float16")
Q4_K = Case(0, code="uint4", group=32, scale="uint8", offset=True)
Q5_K = dataclasses.replace(Q4_K, code="uint5")
Q6_K = Case(0, code="uint6", group=16, scale="int8")
# Formats whose scales are always rounded into the operand.
TWO_LEVEL = (
    NVFP4,
    MXFP4,
    Q4_K,
    Q5_K,
    Q6_K,
    dataclasses.replace(NVFP4, factor=64, bias="float32"),
    dataclasses.replace(NVFP4, factor=0, x="float16", k=192),
    Case(0, code="float8_e4m3fn", group=32, scale="float8_e8m0fnu", factor=1, k=320),
    *(dataclasses.replace(case, x="float16", bias="bfloat16") for case in (Q4_K, Q5_K, Q6_K)),
)
NARROW = (
    Case(0, x="int8", bias="float32"),
    Case(0, x="int8", group=32, zero=True),
    Case(0, x="int8", group=64, k=320),
    Case(0, x="float8_e4m3fn", group=None, scale="float32"),
    Case(0, x="float8_e4m3fn", group=32, zero=True, bias="bfloat16"),
)
# QServe's two builds, whose codes become int8 operands.
QSERVE_GROUP = Case(0, x="int8", scale="int8", zero=True)
QSERVE_CHANNEL = Case(0, x="int8", group=None, scale="float16", offset=True)
WHOLE = (
    dataclasses.replace(QSERVE_GROUP, bias="float32"),
    dataclasses.replace(QSERVE_GROUP, k=512, group=256),
    dataclasses.replace(QSERVE_CHANNEL, bias="bfloat16", k=320),
)
# Kind of the tuned table -> case.
TUNED = {
    "bfloat16 uint4 none g128": Case(0),
    "bfloat16 uint4 none g32": Case(0, group=32),
    "bfloat16 int8 none g128 float32": Case(0, code="int8", scale="float32"),
    "bfloat16 float8_e4m3fn none g128 float32": Case(0, code="float8_e4m3fn", scale="float32"),
    "bfloat16 int8 none g32": Q8_0,
}
TUNED_TWO_LEVEL = {
    "bfloat16 float4_e2m1fn none g16 float8_e4m3fn factor one": dataclasses.replace(
        NVFP4, factor=1 << 20
    ),
    "bfloat16 float4_e2m1fn none g32 float8_e8m0fnu": MXFP4,
    "bfloat16 uint4 none g32 uint8 super offset zero": Q4_K,
    "bfloat16 uint5 none g32 uint8 super offset zero": Q5_K,
    "bfloat16 uint6 none g16 int8 super": Q6_K,
}
# Kind of the tuned table -> case, of `matmul_w4a8` with operands that an integer scale makes int8.
TUNED_WHOLE = {
    "int8 uint4 token g128 int8 factor n group zero": QSERVE_GROUP,
    "int8 uint4 token g128 none factor n offset zero": QSERVE_CHANNEL,
}
