"""Random operands of the ops on prepacked weights, and what they must compute in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle

from pallas_kernels import Prepacked, prepack
from pallas_kernels.record import WORDS, Record


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: sizes, weight format, and what the activations are.

    Attributes:
        m, n, k: tokens, output channels, contracted extent.
        code: type of the weight codes.
        group: values of k that share a scale; None for all.
        block: channels that share a scale.
        zero: whether there are zero points.
        scale: type of the scales.
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

    def __str__(self) -> str:
        flags = ("zero" * self.zero, "perm" * self.perm, self.bias)
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

    def plain(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """Return the operands of `prepack`, random."""
        rng = np.random.default_rng(seed)
        if self.code == "uint4":
            codes = rng.integers(0, 256, (self.n, self.k // 2), np.uint8)
        elif self.code == "int8":
            codes = rng.integers(-128, 128, (self.n, self.k), np.int8)
        else:
            codes = oracle.float8(rng.standard_normal((self.n, self.k)) * 4, self.code)
        scales = np.exp(rng.uniform(-1, 1, self.cells)) / 16
        return {
            "codes": codes,
            "scales": scales.astype(getattr(ml_dtypes, self.scale, self.scale)),
            "zeros": rng.integers(0, 16, self.cells, np.uint8) if self.zero else None,
        }

    def pack(self, plain: dict[str, np.ndarray | None]) -> Prepacked:
        """Return the prepacked weight."""
        operand = 8 if self.narrow else 16
        arrays = jax.tree.map(jnp.asarray, plain)
        return prepack(**arrays, group=self.group, block=self.block, operand=operand)

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

    def dense(self, plain: dict[str, np.ndarray | None]) -> np.ndarray:
        """Return the weight in float64."""
        codes = plain["codes"]
        zero = plain["zeros"]
        if self.code == "uint4":
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(self.n, self.k)
            zero = np.full(self.cells, 8) if zero is None else zero
        spread = (self.block, self.group or self.k)
        values = codes.astype(np.float64)
        if zero is not None:
            values = values - oracle.dequantize(np.ones_like(values), zero, spread)
        return oracle.dequantize(values, plain["scales"], spread)

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
        group = self.group if self.group in (32, 64) else 128
        record = Record(self.code, 8 if self.narrow else 16, group, self.scale, self.zero)
        rows = (self.n // 64 * -(-self.k // 128), record.rows, WORDS)
        weight = Prepacked(
            jax.ShapeDtypeStruct(rows, jnp.int32),
            self.n,
            self.k,
            self.group or self.k,
            self.block,
            record,
        )
        small = dataclasses.replace(self, m=1).activations()
        shapes = {name: (self.m, *value.shape[1:]) for name, value in small.items()}
        shapes |= {name: small[name].shape for name in ("bias", "perm") if name in small}
        types = {name: jax.ShapeDtypeStruct(shapes[name], small[name].dtype) for name in small}
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
NARROW = (
    Case(0, x="int8", bias="float32"),
    Case(0, x="int8", group=32, zero=True),
    Case(0, x="int8", group=64, k=320),
    Case(0, x="float8_e4m3fn", group=None, scale="float32"),
    Case(0, x="float8_e4m3fn", group=32, zero=True, bias="bfloat16"),
)
