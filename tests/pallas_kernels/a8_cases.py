"""Random operands of `matmul_a8`, shared by the interpreter, lowering and GPU tests."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, in the words of the op's contract."""

    m: int
    n: int = 256
    k: int = 512
    x: str = "float8_e4m3fn"
    w: str = "float8_e4m3fn"
    x_scale: str = "token"
    w_scale: str = "channel"
    zero: str = ""
    bias: str = ""
    out: str = "bfloat16"

    def __str__(self) -> str:
        parts = (self.x, self.w, self.x_scale, self.w_scale, self.zero, self.bias, self.out)
        return f"{self.m}x{self.n}x{self.k}-" + "-".join(part for part in parts if part)

    @property
    def w_block(self) -> tuple[int, int] | None:
        """Block of one weight scale, or None."""
        if "x" not in self.w_scale:
            return None
        bn, bk = self.w_scale.split("x")
        return int(bn), int(bk)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return operand name -> (shape, dtype)."""
        groups = -(-self.k // 128)
        x_scale = {"token": (self.m, 1), "tensor": (1, 1), "1x128": (groups, self.m)}
        w_scale = {"channel": (self.n, 1), "tensor": (1, 1)}
        if self.w_block:
            bn, bk = self.w_block
            w_scale[self.w_scale] = (-(-self.n // bn), -(-self.k // bk))
        shapes = {
            "x_q": ((self.m, self.k), self.x),
            "x_scale": (x_scale[self.x_scale], "float32"),
            "w": ((self.n, self.k), self.w),
            "w_scale": (w_scale[self.w_scale], "float32"),
        }
        if self.zero:
            shapes["x_zero"] = ((self.m, 1) if self.zero == "token" else (1, 1), "int32")
            shapes["w_sum"] = ((self.n,), "int32")
        if self.bias:
            shapes["bias"] = ((self.n,), self.bias)
        return shapes

    def operands(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random operands whose scales differ enough for any mix-up to show."""
        rng = np.random.default_rng(seed)

        def draw(name, shape, dtype):
            if name in ("x_q", "w"):
                if dtype == "int8":
                    return rng.integers(-127, 128, shape, np.int8)
                return oracle.float8(rng.standard_normal(shape, np.float32) * 4, dtype)
            if name == "x_zero":
                return rng.integers(-100, 100, shape, np.int32)
            if name == "bias":
                return (rng.standard_normal(shape) * 8).astype(getattr(ml_dtypes, dtype, dtype))
            return np.exp(rng.uniform(-2, 2, shape)).astype(np.float32) / 16

        values = {
            name: draw(name, shape, dtype)
            for name, (shape, dtype) in self.shapes().items()
            if name != "w_sum"
        }
        if self.zero:
            values["w_sum"] = values["w"].astype(np.int32).sum(1, dtype=np.int32)
        return values

    def expected(self, operands: dict[str, np.ndarray]) -> np.ndarray:
        """Return the float64 result."""
        return oracle.matmul_a8(**operands, w_block=self.w_block)

    @property
    def options(self) -> dict:
        """Return the keyword arguments that are no arrays."""
        return {"w_block": self.w_block, "out_dtype": jnp.dtype(self.out)}


TOKENS = (1, 5, 13, 64, 100, 200)
LAYOUTS = (
    *(
        Case(0, x_scale=x_scale, w_scale=w_scale)
        for x_scale in ("token", "tensor", "1x128")
        for w_scale in ("channel", "tensor", "128x128")
    ),
    Case(0, x_scale="1x128", w_scale="64x64"),
    Case(0, x_scale="token", w_scale="128x32", bias="float32"),
    Case(0, bias="bfloat16", out="float16"),
    Case(0, x="int8", w="int8", bias="float32"),
    Case(0, x="int8", w="int8", zero="token", bias="bfloat16"),
    Case(0, x="int8", w="int8", x_scale="tensor", zero="tensor", out="float16"),
    Case(0, x="int8", w="int8", x_scale="1x128", w_scale="128x128"),
    Case(0, x="float8_e5m2", w="float8_e5m2"),
    Case(0, x="float8_e4m3fn", w="float8_e5m2"),
    Case(0, x="float8_e5m2", w="float8_e4m3fn", k=576),
    Case(0, k=192),
    Case(0, n=320, k=320, x_scale="1x128", w_scale="128x128"),
)
