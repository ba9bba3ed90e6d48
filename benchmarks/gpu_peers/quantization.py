"""vLLM's quantization of activations to e4m3, alone and with what stands before it."""

from __future__ import annotations

from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu_peers.libraries import operator
from benchmarks.gpu_peers.peer import Call, Peer, empty, normal, uniform
from pallas_kernels.bench import shapes
from pallas_kernels.bench.timing import copies

EPSILON = 1e-6
E4M3_MAX = 448.0


def _codes(m: int, k: int) -> torch.Tensor:
    return empty(m, k, dtype=torch.float8_e4m3fn)


def _token_scales(m: int) -> torch.Tensor:
    return empty(m, 1, dtype=torch.float32)


def _block_scales(m: int, k: int) -> torch.Tensor:
    """Scales of 1 x 128, tokens contiguous, as products by block read them."""
    return empty(k // 128, m, dtype=torch.float32).t()


def _token(m: int, k: int) -> Call:
    run = operator("dynamic_per_token_scaled_fp8_quant")
    x, codes, scales = normal(m, k), _codes(m, k), _token_scales(m)
    return lambda: run(codes, x, scales, None)


def _block(m: int, k: int) -> Call:
    run = operator("per_token_group_fp8_quant")
    x, codes, scales = normal(m, k), _codes(m, k), _block_scales(m, k)
    return lambda: run(x, codes, scales, 128, 1e-10, -E4M3_MAX, E4M3_MAX, False, True, False)


def _rms_token(m: int, k: int) -> Call:
    run = operator("rms_norm_dynamic_per_token_quant")
    x, codes, scales = normal(m, k), _codes(m, k), _token_scales(m)
    weight = uniform(k, dtype=torch.bfloat16)
    return lambda: run(codes, x, weight, scales, EPSILON, None, None)


def _rms_block(m: int, k: int) -> Call:
    run = operator("rms_norm_per_block_quant")
    x, codes, scales = normal(m, k), _codes(m, k), _block_scales(m, k)
    weight = uniform(k, dtype=torch.bfloat16)
    return lambda: run(codes, x, weight, scales, EPSILON, None, None, 128, True)


def _gated_block(m: int, k: int) -> Call:
    run = operator("silu_and_mul_per_block_quant")
    x, codes, scales = normal(m, 2 * k), _codes(m, k), _block_scales(m, k)
    return lambda: run(codes, x, scales, 128, None, True)


def _peer(name: str, make: Callable[[int, int], Call], bytes_per_value: int = 3) -> Peer:
    def build(m: int, n: int, k: int) -> list[list[Call]]:
        del n
        return [[make(m, k) for _ in range(copies(m * k * bytes_per_value))]]

    return Peer(name, "quant", shapes.QUANTIZE, build)


PEERS = (
    _peer("vllm fp8 token", _token),
    _peer("vllm fp8 1x128", _block),
    _peer("vllm rms fp8 token", _rms_token),
    _peer("vllm rms fp8 1x128", _rms_block),
    _peer("vllm gated fp8 1x128", _gated_block, 5),
)
