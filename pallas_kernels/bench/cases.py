"""What can be timed and tuned: for each op and type, operands, call, reference and peers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import xla
from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case as Case
from pallas_kernels.bench.case import Operands
from pallas_kernels.bench.cases_a16 import CASES_A16
from pallas_kernels.bench.cases_grouped import CASES_GROUPED
from pallas_kernels.matmul_a8 import A8_KERNELS, a8_problem, matmul_a8
from pallas_kernels.quantize import QUANTIZE_KERNELS, ScaleLayout, quantize, quantize_problem


def _a8_operands(dtype: Any, blocked: bool, m: int, n: int, k: int, seed: int) -> Operands:
    keys = jax.random.split(jax.random.key(seed), 4)

    def codes(key, shape):
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        # Up to 1.875, as the peers get them: what a product takes depends on its bits.
        codes = jax.random.bits(key, shape, jnp.uint8) & 0xBF
        return jax.lax.bitcast_convert_type(codes, dtype)

    def scales(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, 0.5, 2) / 64

    return {
        "x_q": codes(keys[0], (m, k)),
        "x_scale": scales(keys[1], (k // 128, -(-m // 4) * 4) if blocked else (m, 1)),
        "w": codes(keys[2], (n, k)),
        "w_scale": scales(keys[3], (n // 128, k // 128) if blocked else (n, 1)),
    }


def _a8_work(m: int, n: int, k: int) -> tuple[float, float]:
    return 2.0 * m * n * k, m * k + n * k + 2.0 * m * n


def _a8_case(name: str, dtype: Any, blocked: bool, peers: tuple[str, ...]) -> Case:
    block = (128, 128) if blocked else None
    return Case(
        name=name,
        op="matmul_a8",
        kernels=A8_KERNELS,
        operands=jax.jit(functools.partial(_a8_operands, dtype, blocked), static_argnums=(0, 1, 2)),
        call=lambda operands, config: matmul_a8(**operands, w_block=block, config=config),
        reference=lambda operands: xla.matmul_a8(**operands, w_block=block),
        problem=lambda operands: a8_problem(**operands, w_block=block),
        tolerance=6e-3,
        sizes=shapes.MATMUL,
        work=_a8_work,
        rate=jnp.dtype(dtype).name,
        peers=peers,
    )


def _quantize_operands(fused: str, m: int, n: int, k: int, seed: int) -> Operands:
    del n
    keys = jax.random.split(jax.random.key(seed))
    width = k * (2 if fused == "gated" else 1)
    operands = {"x": jax.random.normal(keys[0], (m, width), jnp.bfloat16)}
    if fused == "rms":
        operands["rms_weight"] = jax.random.uniform(keys[1], (k,), jnp.bfloat16, 0.5, 2)
    return operands


def _quantize_case(name: str, layout: ScaleLayout, fused: str, peers: tuple[str, ...]) -> Case:
    options = {"dtype": jnp.float8_e4m3fn, "layout": layout, "gated": fused == "gated"}

    def work(m: int, n: int, k: int) -> tuple[float, float]:
        del n
        scales = m * 4 if layout == "token" else m * k / 128 * 4
        return 0.0, m * k * (5 if fused == "gated" else 3) + scales

    return Case(
        name=name,
        op="quantize",
        kernels=QUANTIZE_KERNELS,
        operands=jax.jit(functools.partial(_quantize_operands, fused), static_argnums=(0, 1, 2)),
        call=lambda operands, config: quantize(**operands, **options, config=config).codes,
        reference=lambda operands: xla.quantize(**operands, **options).codes,
        problem=lambda operands: quantize_problem(**operands, **options),
        # A product near the middle of two codes may round either way.
        tolerance=6e-3,
        sizes=shapes.QUANTIZE,
        work=work,
        rate="",
        peers=peers,
    )


CASES: tuple[Case, ...] = (
    _a8_case(
        "fp8",
        jnp.float8_e4m3fn,
        False,
        ("torch fp8 tensor", "torch fp8 rowwise", "vllm cutlass fp8"),
    ),
    _a8_case("int8", jnp.int8, False, ("torch int8 mm", "vllm cutlass int8")),
    _a8_case(
        "fp8_block",
        jnp.float8_e4m3fn,
        True,
        ("torch fp8 block", "vllm cutlass fp8 blk", "DeepGEMM fp8 blk"),
    ),
    _quantize_case("quantize_token", "token", "", ("vllm fp8 token",)),
    _quantize_case("quantize_1x128", "1x128", "", ("vllm fp8 1x128",)),
    _quantize_case("quantize_token_rms", "token", "rms", ("vllm rms fp8 token",)),
    _quantize_case("quantize_1x128_rms", "1x128", "rms", ("vllm rms fp8 1x128",)),
    _quantize_case("quantize_token_gated", "token", "gated", ()),
    _quantize_case("quantize_1x128_gated", "1x128", "gated", ("vllm gated fp8 1x128",)),
    *CASES_A16,
    *CASES_GROUPED,
)
