"""What can be timed and tuned of the ops on prepacked weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case, Operands
from pallas_kernels.matmul_a16 import A16_KERNELS, a16_problem, matmul_a16
from pallas_kernels.matmul_w4a8 import W4A8_KERNELS, matmul_w4a8, w4a8_problem
from pallas_kernels.prepack import Levels, prepack
from pallas_kernels.record import CODES, E2M1, E4M3, E8M0, Record
from pallas_kernels.xla_a16 import xla_matmul_a16, xla_matmul_w4a8

_W4 = Record("uint4", 16, 128, "bfloat16", False)
NVFP4 = Record(E2M1, 16, 16, E4M3, False)
MXFP4 = Record(E2M1, 16, 32, E8M0, False)
Q4_K = Record("uint4", 16, 32, "uint8", False, offset=True, product=True)
Q6_K = Record("uint6", 16, 16, "int8", False, product=True)
QSERVE_GROUP = Record("uint4", 8, 128, "int8", True)
QSERVE_CHANNEL = Record("uint4", 8, 128, "", False, offset=True)
_PEERS = ("vllm marlin w4a16", "vllm machete w4a16")


def _scales(record: Record, key: jax.Array, n: int, k: int) -> Levels:
    """Return random scales (or offsets) of a format's build."""
    cells = (n, k // record.group)
    if record.progressive:
        fine = jax.random.randint(key, cells, 1, 9, jnp.int32).astype(jnp.int8)
        return fine, jnp.full((n, 1), 1 / 256, jnp.float16)
    if not record.scale_bits:
        return jax.random.uniform(key, (n, 1), jnp.float32, 0.5, 2).astype(jnp.float16) / 64
    if record.product:
        low, high = (0, 64) if record.scale_dtype == "uint8" else (-128, 128)
        fine = jax.random.randint(key, cells, low, high, jnp.int32).astype(record.scale_dtype)
        tops = jax.random.uniform(key, (n, -(-k // 256)), jnp.float32, 0.5, 2) / 4096
        return fine, tops.astype(jnp.float16)
    if record.scale_bits == 8:  # positive, of moderate size in either type
        low, high = (40, 80) if record.scale_dtype == E4M3 else (118, 124)
        fine = jax.random.randint(key, cells, low, high, jnp.int32).astype(jnp.uint8)
        return lax.bitcast_convert_type(fine, jnp.dtype(record.scale_dtype))
    scales = jax.random.uniform(key, cells, jnp.float32, 0.5, 2) / 64
    return scales.astype(record.scale_dtype)


def _operands(record: Record, x_dtype: Any, m: int, n: int, k: int, seed: int) -> Operands:
    keys = jax.random.split(jax.random.key(seed), 6)
    planes = CODES[record.code].planes
    if record.code == "int8":
        codes = jax.random.randint(keys[0], (n, k), -127, 128, jnp.int8)
    elif record.code == E4M3:
        codes = jax.random.normal(keys[0], (n, k), jnp.bfloat16).astype(record.code)
    else:
        codes = tuple(  # random bits are random codes of every such type
            jax.random.bits(key, (n, k * bits // 8), jnp.uint8)
            for key, bits in zip(keys[4:], planes, strict=False)
        )
    scales, zeros = _scales(record, keys[1], n, k), None
    if record.zero:
        cells = (n, k // record.group)
        zeros = jax.random.randint(keys[2], cells, 0, 16).astype(jnp.uint8)
    if record.offset:
        zeros = _scales(record, keys[2], n, k)
    if record.scale_dtype == E4M3:
        scales = (*jax.tree.leaves(scales), jnp.full((1, 1), 1 / 64, jnp.float32))
    x = jax.random.normal(keys[3], (m, k), jnp.float32)
    operands = {
        "weight": prepack(
            codes,
            scales,
            zeros,
            code=record.code,
            group=record.group if record.scale_bits else None,
            factor_block=1 if record.progressive or not record.scale_bits else n,
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
    bits: float = 0.0,
) -> Case:
    """Return a case; `bits` are those of a weight in the format's own files, if records differ."""

    def work(m: int, n: int, k: int) -> tuple[float, float]:
        packed = sum(CODES[record.code].planes) * record.rows / record.code_rows
        weight = n * k / 8 * (bits or packed)
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
    _case("nvfp4", NVFP4, bits=4.5, peers=("vllm marlin nvfp4",)),
    _case("mxfp4", MXFP4, bits=4.25, peers=("vllm marlin mxfp4",)),
    _case("q8_0", Record("int8", 16, 32, "float16", False), bits=8.5, peers=("vllm ggml q8_0",)),
    _case("q4_k", Q4_K, bits=4.5, peers=("vllm ggml q4_k",)),
    _case("q5_k", dataclasses.replace(Q4_K, code="uint5"), bits=5.5, peers=("vllm ggml q5_k",)),
    _case("q6_k", Q6_K, bits=6.5625, peers=("vllm ggml q6_k",)),
    _case("w4a8_int8", Record("uint4", 8, 128, "bfloat16", False), jnp.int8),
    _case("qserve_group", QSERVE_GROUP, jnp.int8, tokens=shapes.TOKENS),
    _case("qserve_channel", QSERVE_CHANNEL, jnp.int8, tokens=shapes.TOKENS),
    _case("w4a8_fp8", Record("uint4", 8, 128, "bfloat16", False), jnp.float8_e4m3fn),
)
