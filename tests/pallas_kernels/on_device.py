"""Problems that are drawn, run and judged on the GPU, so that thousands of them take seconds.

A `Trial` draws operands of the largest size asked for.  Programs of smaller sizes cut their own
operands from these, and one judge serves them all: it masks what was cut off.  So a new size costs
one compiled program, and a new problem of that size none.  Factors are float32 (a code times its
scale), sums are float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import a8_cases
import a16_cases
import jax
import jax.numpy as jnp
import oracle
from jax import lax

from pallas_kernels import matmul_a8, matmul_a16, matmul_w4a8, prepack

Arrays = dict[str, Any]
Size = tuple[int, int, int]
CHUNK = 1024


def spread(scale: jax.Array, steps: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """Return each scale repeated over its (rows, columns)."""
    scale = jnp.repeat(jnp.repeat(scale.astype(jnp.float32), steps[0], 0), steps[1], 1)
    return scale[: shape[0], : shape[1]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A case of `a8_cases` or `a16_cases` with the largest sizes that its programs may have."""

    case: Any

    def at(self, size: Size) -> Trial:
        """Return this trial at another size."""
        m, n, k = size
        return type(self)(dataclasses.replace(self.case, m=m, n=n, k=k))

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return operand name -> (shape, dtype) of what is drawn."""
        raise NotImplementedError

    def value(self, name: str, key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
        """Return a random operand."""
        raise NotImplementedError

    def call(self, given: Arrays, config: Any) -> jax.Array:
        """Return what the op makes of operands of this size."""
        raise NotImplementedError

    def factors(self, given: Arrays, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return x [M, K] and w [N, K] in float32; columns of x from k on do not matter."""
        raise NotImplementedError

    @property
    def bound(self) -> float:
        """Error allowed, in units of that of rounding the result once."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TrialA8(Trial):
    """A problem of `matmul_a8`."""

    case: a8_cases.Case

    def shapes(self):
        return {name: value for name, value in self.case.shapes().items() if name != "w_sum"}

    def value(self, name, key, shape, dtype):
        if dtype == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        if name in ("x_q", "w"):
            return (jax.random.normal(key, shape, jnp.float32) * 4).astype(dtype)
        if name == "x_zero":
            return jax.random.randint(key, shape, -100, 100, jnp.int32)
        if name == "bias":
            return (jax.random.normal(key, shape) * 8).astype(dtype)
        # Sums of int8 products would leave the range of float16 under larger scales.
        small = 256 if self.case.x == "int8" and self.case.out == "float16" else 16
        return jnp.exp(jax.random.uniform(key, shape, jnp.float32, -2, 2)) / small

    def call(self, given, config):
        if self.case.zero:
            given = {**given, "w_sum": given["w"].astype(jnp.int32).sum(1, dtype=jnp.int32)}
        return matmul_a8(**given, **self.case.options, config=config)

    def factors(self, given, k):
        del k
        x, w = given["x_q"].astype(jnp.float32), given["w"].astype(jnp.float32)
        if self.case.zero:
            x = x - given["x_zero"]
        if self.case.x_scale == "1x128":
            x = x * spread(given["x_scale"].T, (1, 128), x.shape)
        else:
            x = x * given["x_scale"]
        if self.case.w_block:
            return x, w * spread(given["w_scale"], self.case.w_block, w.shape)
        return x, w * given["w_scale"]

    @property
    def bound(self):
        # The tensor cores add fp8 products in reduced precision: visible in eleven bits.
        return 6 if "float8" in self.case.x and self.case.out == "float16" else 2


@dataclasses.dataclass(frozen=True)
class TrialA16(Trial):
    """A problem of `matmul_a16` or `matmul_w4a8`."""

    case: a16_cases.Case

    def shapes(self):
        case = self.case
        codes = (case.n, case.k // 2) if case.code == "uint4" else (case.n, case.k)
        shapes = {
            "codes": (codes, "uint8" if case.code == "uint4" else case.code),
            "scales": (case.cells, case.scale),
            "x": ((case.m, case.k), case.x),
        }
        shapes |= {"tops": ((case.n, 1), "float16")} if case.progressive else {}
        shapes |= {"zeros": (case.cells, "uint8")} if case.zero else {}
        shapes |= {"offsets": (case.cells, case.scale)} if case.offset else {}
        shapes |= {"x_scale": ((case.m, 1), "float32")} if case.narrow else {}
        shapes |= {"bias": ((case.n,), case.bias)} if case.bias else {}
        # The permutation is the order of random numbers, of which the first k can be taken.
        return shapes | ({"order": ((case.k,), "float32")} if case.perm else {})

    def value(self, name, key, shape, dtype):
        if name == "codes" and dtype != "float8_e4m3fn":
            return lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
        if name == "zeros":
            return jax.random.randint(key, shape, 0, 16).astype(jnp.uint8)
        if name == "order":
            return jax.random.uniform(key, shape, jnp.float32)
        if name == "scales" and dtype == "int8":
            return jax.random.randint(key, shape, 1, 33).astype(jnp.int8)
        if name in ("scales", "x_scale", "tops", "offsets"):
            return (jnp.exp(jax.random.uniform(key, shape, jnp.float32, -1, 1)) / 16).astype(dtype)
        x = jax.random.normal(key, shape, jnp.float32)
        if name == "x":
            x = jnp.round((x + 0.5) * 30).clip(-127, 127) if self.case.narrow else x + 0.5
        else:
            x = x * (4 if name == "codes" else 8)
        return x.astype(dtype)

    def codes(self, given):
        """Return the codes, kept where an integer scale makes them int8 operands."""
        case, codes = self.case, given["codes"]
        if case.code == "uint4":
            codes = jnp.stack([codes & 15, codes >> 4], -1).reshape(case.n, case.k)
        if not case.progressive:
            return codes
        zeros, scales = (
            jnp.repeat(given[name].astype(jnp.int32), case.group, 1)[:, : case.k]
            for name in ("zeros", "scales")
        )
        return codes.astype(jnp.int32).clip(zeros - 128 // scales, zeros + 127 // scales)

    def call(self, given, config):
        codes = given["codes"]
        if self.case.progressive:
            pairs = self.codes(given).astype(jnp.uint8)
            codes = pairs[:, ::2] | pairs[:, 1::2] << 4
        weight = prepack(
            codes,
            (given["scales"], given["tops"]) if self.case.progressive else given["scales"],
            given["offsets"] if self.case.offset else given.get("zeros"),
            group=self.case.group,
            block=self.case.block,
            operand=8 if self.case.narrow else 16,
        )
        options = {"weight": weight, "bias": given.get("bias"), "config": config}
        if self.case.narrow:
            return matmul_w4a8(given["x"], given["x_scale"], **options)
        perm = jnp.argsort(given["order"]).astype(jnp.int32) if self.case.perm else None
        return matmul_a16(given["x"], perm=perm, **options)

    def factors(self, given, k):
        case = self.case
        x, w = given["x"].astype(jnp.float32), self.codes(given).astype(jnp.float32)
        steps = (case.block, case.group or case.k)
        if case.zero:
            w = w - spread(given["zeros"], steps, w.shape)
        elif case.code == "uint4" and not case.offset:
            w = w - 8
        if case.perm:
            kept = jnp.arange(case.k) < k
            x = x[:, jnp.argsort(jnp.where(kept, given["order"], 2.0))]
        x = x * given["x_scale"] if case.narrow else x
        w = w * spread(given["scales"], steps, w.shape)
        w = w * given["tops"].astype(jnp.float32) if case.progressive else w
        return x, w - given["offsets"].astype(jnp.float32) if case.offset else w

    @property
    def bound(self):
        return 2.5 if self.case.m > 32 else 2


def trial_of(case: Any) -> Trial:
    """Return the trial of a case."""
    return TrialA8(case) if isinstance(case, a8_cases.Case) else TrialA16(case)


@functools.partial(jax.jit, static_argnums=0)
def draw(trial: Trial, seed: jax.typing.ArrayLike) -> Arrays:
    """Return random operands of the trial's size."""
    shapes = trial.shapes()
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: trial.value(name, key, shape, dtype)
        for key, (name, (shape, dtype)) in zip(keys, shapes.items(), strict=True)
    }


def runner(trial: Trial, sizes: Sequence[Size], configs: Sequence[Any] = (None,)) -> Callable:
    """Return operands -> a result, padded to the trial's size, for each size and config."""

    def run(operands: Arrays) -> list[jax.Array]:
        results = []
        for size in sizes:
            small = trial.at(size)
            cut = {
                name: operands[name][tuple(map(slice, shape))]
                for name, (shape, _) in small.shapes().items()
            }
            pad = ((0, trial.case.m - size[0]), (0, trial.case.n - size[1]))
            results += [jnp.pad(small.call(cut, config), pad) for config in configs]
        return results

    return run


@functools.partial(jax.jit, static_argnums=0)
def _judge(trial: Trial, operands: Arrays, got: jax.Array, again: jax.Array, size: jax.Array):
    m, n, k = size
    x, w = trial.factors(operands, k)
    x = jnp.where(jnp.arange(x.shape[1]) < k, x, 0)
    w = w.astype(jnp.float64)
    bias = operands.get("bias", jnp.zeros((), jnp.float32)).astype(jnp.float64)
    kept = jnp.arange(w.shape[0]) < n

    def squares(first: jax.Array, rows: int) -> jax.Array:
        block = lax.dynamic_slice_in_dim(x, first, rows).astype(jnp.float64)
        want = lax.dot_general(block, w, (((1,), (1,)), ((), ()))) + bias
        made = lax.dynamic_slice_in_dim(got, first, rows).astype(jnp.float64)
        mask = (first + jnp.arange(rows) < m)[:, None] & kept
        parts = (jnp.where(mask, part, 0) for part in (made - want, want))
        return jnp.stack([jnp.sum(part * part) for part in parts])

    rows = min(CHUNK, x.shape[0])
    starts = jnp.arange(0, x.shape[0], rows)
    off, size_of = lax.map(lambda first: squares(first, rows), starts).sum(0)
    bits = (lax.bitcast_convert_type(result, jnp.uint16) for result in (got, again))
    return jnp.where(jnp.equal(*bits).all(), jnp.sqrt(off / size_of), jnp.inf)


def judge(
    trial: Trial, operands: Arrays, got: jax.Array, again: jax.Array, size: Size
) -> jax.Array:
    """Return the error of a result over that of rounding it once; infinite if two runs differ.

    Args:
        trial: whose operands these are; more than 1024 tokens must be a multiple of 1024.
        operands: from `draw`.
        got: [M, N], the result of a problem of the sizes in `size`.
        again: the result of a second run.
        size: m, n, k of the problem; what lies beyond is not looked at.
    """
    with jax.enable_x64(True):
        error = _judge(trial, operands, got, again, jnp.asarray(size, jnp.int32))
        return error / oracle.rounding(got.dtype)
