"""What can be timed and tuned of the ops on prepacked weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case, Operands
from pallas_kernels.matmul_a16 import A16_KERNELS, a16_problem, matmul_a16
from pallas_kernels.matmul_w4a8 import W4A8_KERNELS, matmul_w4a8, w4a8_problem
from pallas_kernels.prepack import prepack
from pallas_kernels.record import Record
from pallas_kernels.xla_a16 import xla_matmul_a16, xla_matmul_w4a8

_W4 = Record("uint4", 16, 128, "bfloat16", False)
_PEERS = ("vllm marlin w4a16", "vllm machete w4a16")


def _operands(record: Record, x_dtype: Any, m: int, n: int, k: int, seed: int) -> Operands:
    keys = jax.random.split(jax.random.key(seed), 4)
    if record.code == "uint4":
        codes = jax.random.bits(keys[0], (n, k // 2), jnp.uint8)
    elif record.code == "int8":
        codes = jax.random.randint(keys[0], (n, k), -127, 128, jnp.int8)
    else:
        codes = jax.random.normal(keys[0], (n, k), jnp.bfloat16).astype(record.code)
    cells = (n, k // record.group)
    scales = jax.random.uniform(keys[1], cells, jnp.float32, 0.5, 2) / 64
    zeros = jax.random.randint(keys[2], cells, 0, 16).astype(jnp.uint8) if record.zero else None
    x = jax.random.normal(keys[3], (m, k), jnp.float32)
    operands = {
        "weight": prepack(
            codes,
            scales.astype(record.scale_dtype),
            zeros,
            group=record.group,
            operand=record.operand,
        )
    }
    if record.operand == 16:
        return {"x": x.astype(x_dtype), **operands}
    x_q = jnp.round(x * 32).astype(x_dtype)
    return {"x_q": x_q, "x_scale": jnp.full((m, 1), 1 / 32, jnp.float32), **operands}


def _case(
    name: str,
    record: Record,
    x_dtype: Any = jnp.bfloat16,
    tokens: tuple[int, ...] = (1, 16, 64),
    peers: tuple[str, ...] = (),
) -> Case:
    def work(m: int, n: int, k: int) -> tuple[float, float]:
        weight = n * k * record.rows / record.code_rows / (2 if record.code == "uint4" else 1)
        return 2.0 * m * n * k, weight + m * k * jnp.dtype(x_dtype).itemsize + 2.0 * m * n

    narrow = record.operand == 8
    call, problem = (matmul_w4a8, w4a8_problem) if narrow else (matmul_a16, a16_problem)
    reference = xla_matmul_w4a8 if narrow else xla_matmul_a16
    make = functools.partial(_operands, record, x_dtype)
    return Case(
        name=name,
        op="matmul_w4a8" if narrow else "matmul_a16",
        kernels=W4A8_KERNELS if narrow else A16_KERNELS,
        operands=jax.jit(make, static_argnums=(0, 1, 2)),
        call=lambda operands, config: call(**operands, config=config),
        reference=lambda operands: reference(**operands),
        problem=lambda operands: problem(**operands),
        tolerance=6e-3,
        sizes=tuple((m, n, k) for n, k in shapes.LAYERS for m in tokens),
        work=work,
        rate=jnp.dtype(x_dtype).name,
        peers=peers,
    )


CASES_A16: tuple[Case, ...] = (
    _case("w4a16", _W4, tokens=(*shapes.TOKENS, 8, 32, 256), peers=_PEERS),
    _case("w4a16_zero", Record("uint4", 16, 128, "bfloat16", True)),
    _case("w4a16_g32", Record("uint4", 16, 32, "bfloat16", False)),
    _case("w4a16_g64", Record("uint4", 16, 64, "bfloat16", False)),
    _case("w8a16", Record("int8", 16, 128, "float32", False)),
    _case("fp8a16", Record("float8_e4m3fn", 16, 128, "float32", False)),
    _case("w4a8_int8", Record("uint4", 8, 128, "bfloat16", False), jnp.int8),
    _case("w4a8_fp8", Record("uint4", 8, 128, "bfloat16", False), jnp.float8_e4m3fn),
)
