"""The small problems that compute-sanitizer watches: every kernel, every layout of scales."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import (
    gather_rows,
    grouped_matmul_a8,
    grouped_matmul_a16,
    grouped_matmul_dense,
    matmul_a8,
    prepack,
    quantize,
    quantize_and_keep,
)
from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.bench import shapes
from pallas_kernels.bench.case import Case
from pallas_kernels.bench.cases import CASES
from pallas_kernels.bench.cases_grouped import group_sizes
from pallas_kernels.problem import Config
from pallas_kernels.record import E2M1, E4M3

N, K, EXPERTS = 256, 512, 16
Operands = dict[str, Any]
# Operands of a number of tokens, and what is run on them.
Work = tuple[Callable[[int], Operands], Callable[[Operands], Any]]


def _nvfp4(rows: int) -> Operands:
    keys = jax.random.split(jax.random.key(0), 3)
    scales = jax.random.randint(keys[1], (EXPERTS, N, K // 16), 40, 80, jnp.int32)
    scales = lax.bitcast_convert_type(scales.astype(jnp.uint8), jnp.dtype(E4M3))
    codes = jax.random.bits(keys[0], (EXPERTS, N, K // 2), jnp.uint8)
    factors = jnp.ones((EXPERTS, 1, 1), jnp.float32)
    return {
        "x": jax.random.normal(keys[2], (rows, K), jnp.bfloat16),
        "weight": prepack(codes, (scales, factors), code=E2M1, group=16, factor_block=N),
        "group_sizes": group_sizes(rows // shapes.TOP_K, EXPERTS, 0),
    }


def _dense(rows: int) -> Operands:
    return {
        "x": jnp.ones((rows, K), jnp.bfloat16),
        "w": jnp.ones((EXPERTS, N, K), jnp.bfloat16),
        "group_sizes": group_sizes(rows // shapes.TOP_K, EXPERTS, 0),
    }


def _rows(tokens: int) -> Operands:
    """Rows of tokens for their experts; every eighth row is nobody's."""
    source = jnp.arange(tokens * shapes.TOP_K, dtype=jnp.int32)
    source = jnp.where(source % 8 == 7, -1, source * 5 % tokens)
    return {"x": jnp.ones((tokens, 2 * K), jnp.bfloat16), "source": source}


def _quantize_rows(layout: str, gated: bool, given: Operands) -> Any:
    return quantize(**given, dtype=jnp.float8_e4m3fn, layout=layout, gated=gated)


def _keep_rows(layout: str, gated: bool, given: Operands) -> Any:
    return quantize_and_keep(**given, dtype=jnp.float8_e4m3fn, layout=layout, gated=gated)


def _given_scale(tokens: int) -> Operands:
    return {"x": jnp.ones((tokens, K), jnp.bfloat16), "scale": jnp.ones((1, 1), jnp.float32)}


def _gather(gated: bool, given: Operands) -> jax.Array:
    return gather_rows(given["x"], given["source"], gated=gated)


def _of_experts(make: Callable[[int], Operands]) -> Callable[[int], Operands]:
    return lambda tokens: make(tokens * shapes.TOP_K)


def _block(w_scale: str) -> tuple[int, int] | None:
    """Return the (channels, k) of a name like 64x128, or None."""
    if "x" not in w_scale:
        return None
    channels, k = w_scale.split("x")
    return int(channels), int(k)


def _a8(dtype: str, x_scale: str, w_scale: str, extra: str, experts: int, rows: int) -> Operands:
    """Return operands of matmul_a8, or of grouped_matmul_a8 where there are experts."""
    lead = (experts,) if experts else ()
    scales = {"token": (rows, 1), "tensor": (1, 1), "1x128": (K // 128, rows), "channel": (N, 1)}
    block = _block(w_scale)
    w_shape = (N // block[0], K // block[1]) if block else scales[w_scale]
    given: Operands = {
        "x_q": jnp.ones((rows, K), dtype),
        "x_scale": jnp.ones(scales[x_scale], jnp.float32),
        "w": jnp.ones((*lead, N, K), dtype),
        "w_scale": jnp.ones((*lead, *w_shape), jnp.float32),
    }
    if experts:
        given["group_sizes"] = group_sizes(rows // shapes.TOP_K, experts, 0)
    if "zero" in extra:
        given["x_zero"] = jnp.ones((rows, 1), jnp.int32)
        given["w_sum"] = jnp.full(N, K, jnp.int32)
    if "bias" in extra:
        given["bias"] = jnp.ones(N, jnp.float32)
    return given


def _call_a8(
    op: Callable[..., jax.Array],
    w_scale: str,
    config: Callable[[int], Config | None],
    given: Operands,
) -> jax.Array:
    rows = given["x_q"].shape[0]
    return op(**given, w_block=_block(w_scale), config=config(rows))


def _call_run(given: Operands) -> jax.Array:
    """The middle of a bank's experts, of the second of two layers, into an array of ones."""
    mine = slice(4, 12)
    stacked = {name: jnp.stack([given[name][mine]] * 2) for name in ("w", "w_scale")}
    into = jnp.ones((given["x_q"].shape[0], N), jnp.bfloat16)
    return grouped_matmul_a8(
        **(given | stacked), w_block=(128, 128), first=4, into=into, layer=jnp.int32(1)
    )


def _chosen(rows: int) -> None:
    """The config that selection chooses."""


def _clustered(rows: int) -> Config:
    """Blocks of a cluster share out K for few tokens, and a weight tile for many."""
    if rows <= 64:
        return DecodeConfig(bm=8 if rows <= 8 else 64, stages=4, split=2, cluster=2)
    return PrefillConfig(bm=64, bn=64, stages=3, warpgroups=1, cluster=2)


def _split(rows: int) -> Config:
    """Warpgroups share out K of experts with few rows; three share a tile of many."""
    if rows <= 64 * EXPERTS:
        return DecodeConfig(bm=32, stages=4, split=2)
    return PrefillConfig(bm=192, bn=128, stages=2, warpgroups=3)


def _a8_works() -> dict[str, Work]:
    """Return what the bench has no row for of the 8-bit matmuls, dense and of experts."""
    found: dict[str, Work] = {}
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    kinds = (
        (e4m3, "tensor", "tensor", ""),
        (e5m2, "token", "tensor", ""),
        (e4m3, "tensor", "channel", "bias"),
        (e4m3, "token", "64x64", ""),
        (e4m3, "token", "128x32", "bias"),
        (e4m3, "1x128", "channel", ""),
        ("int8", "token", "channel", "zero bias"),
        ("int8", "1x128", "128x128", ""),
    )
    for dtype, x_scale, w_scale, extra in kinds:
        name = "_".join((dtype, x_scale, w_scale, *extra.split()))
        make = functools.partial(_a8, dtype, x_scale, w_scale, extra, 0)
        call = functools.partial(_call_a8, matmul_a8, w_scale, _chosen)
        found[f"a8_{name}"] = make, call
        if not extra:
            make = functools.partial(_a8, dtype, x_scale, w_scale, extra, EXPERTS)
            call = functools.partial(_call_a8, grouped_matmul_a8, w_scale, _chosen)
            found[f"grouped_a8_{name}"] = _of_experts(make), call
    for x_scale, w_scale in (("token", "channel"), ("1x128", "128x128")):
        make = functools.partial(_a8, e4m3, x_scale, w_scale, "", 0)
        call = functools.partial(_call_a8, matmul_a8, w_scale, _clustered)
        found[f"a8_{x_scale}_cluster"] = make, call
        make = functools.partial(_a8, e4m3, x_scale, w_scale, "", EXPERTS)
        call = functools.partial(_call_a8, grouped_matmul_a8, w_scale, _split)
        found[f"grouped_a8_{x_scale}_split"] = _of_experts(make), call
    run = functools.partial(_a8, e4m3, "1x128", "128x128", "", EXPERTS)
    return found | {"grouped_a8_run_of_a_bank": (_of_experts(run), _call_run)}


# What the bench has no row for besides.
_MORE: dict[str, Work] = {
    "grouped_nvfp4": (_of_experts(_nvfp4), lambda given: grouped_matmul_a16(**given)),
    "grouped_dense": (_of_experts(_dense), lambda given: grouped_matmul_dense(**given)),
    "gather": (_rows, functools.partial(_gather, False)),
    "gather_gated": (_rows, functools.partial(_gather, True)),
    "quantize_token_gather": (_rows, functools.partial(_quantize_rows, "token", False)),
    "quantize_1x128_gather": (_rows, functools.partial(_quantize_rows, "1x128", True)),
    "quantize_and_keep": (_rows, functools.partial(_keep_rows, "1x128", False)),
    "quantize_and_keep_gated": (_rows, functools.partial(_keep_rows, "token", True)),
    "quantize_tensor": (
        _given_scale,
        lambda given: quantize(**given, dtype=jnp.float8_e4m3fn, layout="tensor"),
    ),
    "quantize_int8": (
        lambda tokens: {"x": jnp.ones((tokens, K), jnp.bfloat16)},
        lambda given: quantize(**given, dtype=jnp.int8, layout="token", symmetric=False),
    ),
}


def case_operands(case: Case, tokens: int) -> Operands:
    """Return the operands of a row of the bench for a number of tokens."""
    rows = tokens * shapes.TOP_K if case.op.startswith("grouped") else tokens
    return case.operands(rows, N, K, 0)


def _call_case(case: Case, operands: Operands) -> Any:
    return case.call(operands, None)


def works() -> dict[str, Work]:
    """Return name -> operands and call of every problem."""
    found: dict[str, Work] = {
        case.name: (
            functools.partial(case_operands, case),
            functools.partial(_call_case, case),
        )
        for case in CASES
    }
    return found | _a8_works() | _MORE
