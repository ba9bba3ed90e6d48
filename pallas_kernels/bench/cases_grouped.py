"""What can be timed and tuned of the grouped matmuls: expert layers under random routing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import xla
from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case, Operands
from pallas_kernels.grouped_a8 import GROUPED_A8_KERNELS, grouped_a8_problem, grouped_matmul_a8
from pallas_kernels.grouped_a16 import (
    GROUPED_A16_KERNELS,
    grouped_a16_problem,
    grouped_matmul_a16,
)
from pallas_kernels.prepack import prepack
from pallas_kernels.record import Record
from pallas_kernels.xla_a16 import xla_grouped_matmul_a16

_GROUP = 128


def group_sizes(tokens: int, experts: int, seed: int) -> jax.Array:
    """Return the rows of each expert when every token draws `shapes.TOP_K` different experts."""
    scores = jax.random.uniform(jax.random.key(seed), (tokens, experts))
    chosen = lax.top_k(scores, shapes.TOP_K)[1]
    return jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.int32)


def _operands(dtype: Any, blocked: bool, m: int, n: int, k: int, seed: int) -> Operands:
    experts = shapes.EXPERTS.get((n, k), shapes.TOP_K)
    keys = jax.random.split(jax.random.key(seed), 4)

    def codes(key, shape):
        codes = jax.random.bits(key, shape, jnp.uint8)
        if dtype != jnp.int8:
            codes = codes & 0xBF  # e4m3 up to 1.875: no NaN, and no few codes that decide the sum
        return lax.bitcast_convert_type(codes, dtype)

    def scales(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, 0.5, 2) / 64

    per_expert = (n // _GROUP, k // _GROUP) if blocked else (n, 1)
    return {
        "x_q": codes(keys[0], (m, k)),
        "x_scale": scales(keys[1], (k // _GROUP, m) if blocked else (m, 1)),
        "w": codes(keys[2], (experts, n, k)),
        "w_scale": scales(keys[3], (experts, *per_expert)),
        "group_sizes": group_sizes(m // shapes.TOP_K, experts, seed),
    }


def touched(m: int, n: int, k: int) -> float:
    """Return how many experts have rows, on average."""
    experts = shapes.EXPERTS.get((n, k), shapes.TOP_K)
    return experts * (1 - (1 - shapes.TOP_K / experts) ** (m / shapes.TOP_K))


def _work(m: int, n: int, k: int) -> tuple[float, float]:
    return 2.0 * m * n * k, m * k + touched(m, n, k) * n * k + 2.0 * m * n


def _reference(block: tuple[int, int] | None, operands: Operands) -> jax.Array:
    """One dense matmul an expert over all rows, so that only one expert is ever dequantized."""
    x_q, x_scale, w, w_scale, sizes = operands.values()
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x_q.shape[0])

    def add(expert, y):
        part = xla.matmul_a8(x_q, x_scale, w[expert], w_scale[expert], w_block=block)
        mine = (row >= ends[expert] - sizes[expert]) & (row < ends[expert])
        return jnp.where(mine[:, None], part, y)

    empty = jnp.zeros((x_q.shape[0], w.shape[1]), jnp.bfloat16)
    return lax.fori_loop(0, w.shape[0], add, empty)


def _case(name: str, dtype: Any, blocked: bool, peers: tuple[str, ...]) -> Case:
    block = (_GROUP, _GROUP) if blocked else None
    make = functools.partial(_operands, dtype, blocked)
    return Case(
        name=name,
        op="grouped_matmul_a8",
        kernels=GROUPED_A8_KERNELS,
        operands=jax.jit(make, static_argnums=(0, 1, 2)),
        call=lambda operands, config: grouped_matmul_a8(**operands, w_block=block, config=config),
        reference=jax.jit(functools.partial(_reference, block)),
        problem=lambda operands: grouped_a8_problem(**operands, w_block=block),
        tolerance=6e-3,
        sizes=shapes.GROUPED,
        work=_work,
        rate=jnp.dtype(dtype).name,
        peers=peers,
    )


def _operands_a16(zero: bool, m: int, n: int, k: int, seed: int) -> Operands:
    """Experts are packed one after the other: packing all at once takes the memory of several."""
    experts = shapes.EXPERTS.get((n, k), shapes.TOP_K)

    def expert(key):
        keys = jax.random.split(key, 3)
        cells = (n, k // _GROUP)
        zeros = jax.random.randint(keys[2], cells, 0, 16).astype(jnp.uint8) if zero else None
        scales = jax.random.uniform(keys[1], cells, jnp.float32, 0.5, 2) / 64
        codes = jax.random.bits(keys[0], (n, k // 2), jnp.uint8)
        return prepack(codes, scales.astype(jnp.bfloat16), zeros, group=_GROUP)

    key = jax.random.key(seed)
    return {
        "x": jax.random.normal(key, (m, k), jnp.bfloat16),
        "weight": lax.map(expert, jax.random.split(key, experts)),
        "group_sizes": group_sizes(m // shapes.TOP_K, experts, seed),
    }


def _case_a16(name: str, zero: bool, peers: tuple[str, ...]) -> Case:
    record = Record("uint4", 16, _GROUP, "bfloat16", zero)

    def work(m: int, n: int, k: int) -> tuple[float, float]:
        weight = n * k / 2 * record.rows / record.code_rows
        return 2.0 * m * n * k, touched(m, n, k) * weight + 2.0 * m * (n + k)

    return Case(
        name=name,
        op="grouped_matmul_a16",
        kernels=GROUPED_A16_KERNELS,
        operands=jax.jit(functools.partial(_operands_a16, zero), static_argnums=(0, 1, 2)),
        call=lambda operands, config: grouped_matmul_a16(**operands, config=config),
        reference=jax.jit(lambda operands: xla_grouped_matmul_a16(**operands)),
        problem=lambda operands: grouped_a16_problem(**operands),
        tolerance=6e-3,
        sizes=shapes.GROUPED,
        work=work,
        rate="bfloat16",
        peers=peers,
    )


CASES_GROUPED: tuple[Case, ...] = (
    _case("grouped_fp8", jnp.float8_e4m3fn, False, ("torch grouped fp8",)),
    _case("grouped_int8", jnp.int8, False, ()),
    _case(
        "grouped_fp8_block",
        jnp.float8_e4m3fn,
        True,
        ("DeepGEMM contiguous", "DeepGEMM masked"),
    ),
    _case_a16("grouped_w4a16", False, ("vllm moe marlin",)),
    _case_a16("grouped_w4a16_zero", True, ()),
)
