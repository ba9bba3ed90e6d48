"""Dense layers: 8-bit products, and 4- and 8-bit weights of bfloat16 activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu_peers.libraries import deep_gemm, operator, scalar_type
from benchmarks.gpu_peers.peer import (
    Call,
    Peer,
    Size,
    empty,
    fp8,
    int8,
    locks,
    normal,
    uniform,
    words,
)
from pallas_kernels.bench import shapes
from pallas_kernels.bench.timing import copies

BF16 = torch.bfloat16
Build = Callable[[int, int, int], Sequence[Sequence[Call]]]
FEW = (1, 16, 64)


def rotated(bits: float, operand_bytes: int) -> Callable[[Callable[[int, int, int], Call]], Build]:
    """Make a build of a function that makes one call with operands of its own.

    Args:
        bits: of a weight.
        operand_bytes: of an element of x.
    """

    def decorate(make: Callable[[int, int, int], Call]) -> Build:
        @functools.wraps(make)
        def build(m: int, n: int, k: int) -> list[list[Call]]:
            nbytes = n * k * bits / 8 + m * k * operand_bytes + 2 * m * n
            return [[make(m, n, k) for _ in range(copies(nbytes))]]

        return build

    return decorate


def _scaled_mm(x, w, x_scale, w_scale, fast: bool = True) -> Call:
    return lambda: torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=BF16, use_fast_accum=fast)


@rotated(8, 1)
def _torch_tensor(m: int, n: int, k: int) -> Call:
    one = torch.ones((), device="cuda")
    return _scaled_mm(fp8(m, k), fp8(n, k), one, one)


@rotated(8, 1)
def _torch_rowwise(m: int, n: int, k: int) -> Call:
    return _scaled_mm(fp8(m, k), fp8(n, k), uniform(m, 1), uniform(1, n))


@rotated(8, 1)
def _torch_block(m: int, n: int, k: int) -> Call:
    x_scale, w_scale = uniform(k // 128, m).t(), uniform(n // 128, k // 128).t()
    return _scaled_mm(fp8(m, k), fp8(n, k), x_scale, w_scale, fast=False)


@rotated(8, 1)
def _torch_int8(m: int, n: int, k: int) -> Call:
    x, w = int8(m, k), int8(n, k)
    return lambda: torch._int_mm(x, w.t())


def _cutlass(x, w, x_scale, w_scale) -> Call:
    y = empty(x.shape[0], w.shape[0])
    run = operator("cutlass_scaled_mm")
    return lambda: run(y, x, w.t(), x_scale, w_scale, None)


@rotated(8, 1)
def _cutlass_fp8(m: int, n: int, k: int) -> Call:
    return _cutlass(fp8(m, k), fp8(n, k), uniform(m, 1), uniform(n, 1))


@rotated(8, 1)
def _cutlass_int8(m: int, n: int, k: int) -> Call:
    return _cutlass(int8(m, k), int8(n, k), uniform(m, 1), uniform(n, 1))


@rotated(8, 1)
def _cutlass_block(m: int, n: int, k: int) -> Call:
    x_scale, w_scale = uniform(k // 128, m).t(), uniform(n // 128, k // 128).t()
    return _cutlass(fp8(m, k), fp8(n, k), x_scale, w_scale)


@rotated(8, 1)
def _deep_gemm(m: int, n: int, k: int) -> Call:
    library = deep_gemm()
    aligned = library.utils.layout.get_mn_major_tma_aligned_tensor
    x, w = (fp8(m, k), aligned(uniform(m, k // 128))), (fp8(n, k), uniform(n // 128, k // 128))
    y = empty(m, n)
    return lambda: library.fp8_gemm_nt(x, w, y, disable_ue8m0_cast=True)


def _marlin(code: str, bits: int, group: int, scale_dtype: torch.dtype) -> Build:
    """Marlin; random words are weights in its order as well as in any other."""

    @rotated(bits, 2)
    def make(m: int, n: int, k: int) -> Call:
        run, kind = operator("marlin_gemm"), scalar_type(code)
        x, w, workspace = normal(m, k), words(k // 16, n * bits // 2), locks()
        factor = None
        if scale_dtype == torch.float8_e8m0fnu:
            scales = torch.randint(118, 124, (k // group, n), device="cuda", dtype=torch.uint8)
            scales = scales.view(scale_dtype)
        else:
            scales = uniform(k // group, n, dtype=BF16).to(scale_dtype)
        if scale_dtype == torch.float8_e4m3fn:
            factor = torch.ones(1, device="cuda")

        def call():
            rest = (workspace, kind, m, n, k, True, False, True, False)
            return run(x, None, w, None, scales, None, factor, None, None, None, *rest)

        return call

    return make


@rotated(4, 2)
def _machete(m: int, n: int, k: int) -> Call:
    run, pack = operator("machete_mm"), operator("machete_prepack_B")
    kind = scalar_type("uint4b8")
    x, scales = normal(m, k), uniform(k // 128, n, dtype=BF16)
    w = pack(words(n, k // 8).t(), BF16, kind, BF16)
    return lambda: run(x, w, kind, None, scales, None, 128, None, None, None)


def _ggml(number: int, block: int, nbytes: int, factors: tuple[int, ...]) -> Build:
    """ggml's products as vLLM has them: by vectors, or by tiles above one token.

    Args:
        number: ggml's number of the type.
        block: weights of a block.
        nbytes: of a block.
        factors: places of float16 factors in a block; random bits there could be infinite.
    """

    def build(m: int, n: int, k: int) -> list[list[Call]]:
        def call(run: Callable, x: torch.Tensor, w: torch.Tensor) -> Call:
            return lambda: run(w, x, number, n)

        sets = []
        for _ in range(copies(n * k / block * nbytes + 2 * m * (n + k))):
            blocks = words(-(-n * (k // block) * nbytes // 4)).view(torch.float16)
            blocks = blocks[: n * (k // block) * nbytes // 2].view(n * (k // block), nbytes // 2)
            blocks[:, list(factors)] = 2.0**-10
            sets.append((normal(m, k), blocks.view(torch.uint8).view(n, -1)))
        ways = ("ggml_mul_mat_vec_a8", "ggml_mul_mat_a8")
        return [[call(operator(way), *operands) for operands in sets] for way in ways]

    return build


def _sizes(tokens: tuple[int, ...]) -> tuple[Size, ...]:
    return tuple((m, n, k) for n, k in shapes.LAYERS for m in tokens)


_ALL = _sizes(shapes.TOKENS)
_SOME = _sizes(tuple(m for m in shapes.TOKENS if m > 1))  # not with one token's scales of blocks
_MANY = _sizes(tuple(m for m in shapes.TOKENS if m > 16))  # _int_mm refuses fewer
_FEW = _sizes(FEW)

PEERS = (
    Peer("torch fp8 tensor", "dense8", _ALL, _torch_tensor),
    Peer("torch fp8 rowwise", "dense8", _ALL, _torch_rowwise),
    Peer("vllm cutlass fp8", "dense8", _ALL, _cutlass_fp8),
    Peer("DeepGEMM fp8 blk", "dense8", _ALL, _deep_gemm, compiles="sizes"),
    Peer("torch fp8 block", "dense8", _SOME, _torch_block),
    Peer("vllm cutlass fp8 blk", "dense8", _SOME, _cutlass_block),
    Peer("vllm cutlass int8", "dense8", _ALL, _cutlass_int8),
    Peer("torch int8 mm", "dense8", _MANY, _torch_int8),
    Peer("vllm marlin w4a16", "w4", _ALL, _marlin("uint4b8", 4, 128, BF16)),
    Peer("vllm machete w4a16", "w4", _ALL, _machete),
    Peer("vllm marlin w8a16", "w8", _FEW, _marlin("uint8b128", 8, 128, BF16)),
    Peer("vllm marlin nvfp4", "fp4", _FEW, _marlin("float4_e2m1f", 4, 16, torch.float8_e4m3fn)),
    Peer("vllm marlin mxfp4", "fp4", _FEW, _marlin("float4_e2m1f", 4, 32, torch.float8_e8m0fnu)),
    Peer("vllm ggml q8_0", "gguf", _FEW, _ggml(8, 32, 34, (0,))),
    Peer("vllm ggml q4_k", "gguf", _FEW, _ggml(12, 256, 144, (0, 1))),
    Peer("vllm ggml q5_k", "gguf", _FEW, _ggml(13, 256, 176, (0, 1))),
    Peer("vllm ggml q6_k", "gguf", _FEW, _ggml(14, 256, 210, (104,))),
)
