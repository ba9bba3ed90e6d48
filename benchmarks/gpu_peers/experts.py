"""Layers of experts under random routing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu_peers.libraries import deep_gemm, operator, scalar_type
from benchmarks.gpu_peers.peer import Call, Peer, Size, empty, fp8, locks, normal, uniform, words
from pallas_kernels.bench import shapes

BF16 = torch.bfloat16
TOKENS = (1, 16, 128, 1024, 4096)
BLOCK_SIZES = (8, 16, 32, 48, 64)  # rows of a block of vLLM's Marlin
ROW_BLOCK = 128  # rows that an expert's are padded to for DeepGEMM


def _key(size: Size) -> str:
    m, n, k = size
    return f"{m}x{n}x{k}xE{shapes.EXPERTS[n, k]}k{shapes.TOP_K}"


def routings(tokens: int, experts: int) -> list[torch.Tensor]:
    """Return [tokens, top k] expert numbers, as many routings as keep weights out of the cache.

    Routings of one token are disjoint, so that together they read every expert once.
    """
    if tokens == 1:
        every = torch.randperm(experts, device="cuda", dtype=torch.int32)
        return list(every.view(-1, 1, shapes.TOP_K))
    return [
        torch.rand(tokens, experts, device="cuda").topk(shapes.TOP_K)[1].to(torch.int32)
        for _ in range(3)
    ]


def counts(routing: torch.Tensor, experts: int) -> torch.Tensor:
    """Return the rows of each expert."""
    return torch.bincount(routing.flatten(), minlength=experts).to(torch.int32)


@functools.lru_cache(maxsize=1)
def _fp8_weight(n: int, k: int) -> torch.Tensor:
    """The weight of the last layer is kept: building it takes longer than timing a kernel."""
    return fp8(shapes.EXPERTS[n, k], n, k)


@functools.lru_cache(maxsize=1)
def _marlin_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words are weights in Marlin's order as well as in any other."""
    experts = shapes.EXPERTS[n, k]
    return words(experts, k // 16, 2 * n), uniform(experts, k // 128, n, dtype=BF16)


def forget() -> None:
    """Free the weights that are kept."""
    _fp8_weight.cache_clear()
    _marlin_weight.cache_clear()


def _torch(m: int, n: int, k: int) -> list[list[Call]]:
    w, w_scale = _fp8_weight(n, k), uniform(shapes.EXPERTS[n, k], n)

    def make(routing: torch.Tensor) -> Call:
        ends = counts(routing, len(w)).cumsum(0).to(torch.int32)
        x, x_scale = fp8(routing.numel(), k), uniform(routing.numel())
        return lambda: torch._scaled_grouped_mm(
            x, w.mT, x_scale, w_scale, offs=ends, out_dtype=BF16, use_fast_accum=True
        )

    return [[make(routing) for routing in routings(m, len(w))]]


def _fp8_operands(n: int, k: int) -> tuple[Callable, tuple[torch.Tensor, torch.Tensor]]:
    """DeepGEMM's layout of activation scales, and a weight with its scales."""
    w = _fp8_weight(n, k)
    aligned = deep_gemm().utils.layout.get_mn_major_tma_aligned_tensor
    return aligned, (w, uniform(len(w), n // 128, k // 128))


def _contiguous(m: int, n: int, k: int) -> list[list[Call]]:
    library = deep_gemm()
    aligned, w = _fp8_operands(n, k)

    def make(routing: torch.Tensor) -> Call:
        sizes = counts(routing, len(w[0])).tolist()
        numbers = [  # the expert of every row, -1 where it is padding
            number
            for expert, size in enumerate(sizes)
            for number in [expert] * size + [-1] * (-size % ROW_BLOCK)
        ]
        rows = torch.tensor(numbers, device="cuda", dtype=torch.int32)
        x = fp8(len(numbers), k), aligned(uniform(len(numbers), k // 128))
        y = empty(len(numbers), n)
        return lambda: library.m_grouped_fp8_gemm_nt_contiguous(
            x, w, y, rows, disable_ue8m0_cast=True
        )

    return [[make(routing) for routing in routings(m, len(w[0]))]]


def _masked(m: int, n: int, k: int) -> list[list[Call]]:
    library = deep_gemm()
    aligned, w = _fp8_operands(n, k)
    experts = len(w[0])
    sizes = [counts(routing, experts) for routing in routings(m, experts)]
    most = max(int(size.max()) for size in sizes)
    most += -most % ROW_BLOCK
    expected = -(-m * shapes.TOP_K // experts)
    # One x and y for all: their rows would otherwise take more memory than the weight.
    x = fp8(experts, most, k), aligned(uniform(experts, most, k // 128))
    y = empty(experts, most, n)

    def make(size: torch.Tensor) -> Call:
        return lambda: library.m_grouped_fp8_gemm_nt_masked(
            x, w, y, size, expected, disable_ue8m0_cast=True
        )

    return [[make(size) for size in sizes]]


def _marlin(m: int, n: int, k: int) -> Sequence[Sequence[Call]]:
    run, align = operator("moe_wna16_marlin_gemm"), operator("moe_align_block_size")
    w, scales = _marlin_weight(n, k)
    workspace, kind = locks(), scalar_type("uint4b8")

    def make(routing: torch.Tensor, x: torch.Tensor, y: torch.Tensor, block: int) -> Call:
        most = routing.numel() + len(w) * (block - 1)
        rows = empty(most, dtype=torch.int32)
        experts = empty(-(-most // block), dtype=torch.int32)
        padded = empty(1, dtype=torch.int32)
        align(routing, len(w), block, rows, experts, padded, None)
        share = torch.ones(routing.shape, device="cuda")

        def call():
            weight = (w, None, scales, None, None, None, None, None, workspace)
            layout = (rows, experts, padded, share, block, shapes.TOP_K, False)
            options = (True, False, True, False, -1, -1, -1)
            return run(x, y, *weight, *layout, kind, m, n, k, *options)

        return call

    sets = [(routing, normal(m, k), empty(routing.numel(), n)) for routing in routings(m, len(w))]
    return [[make(*operands, block) for operands in sets] for block in BLOCK_SIZES]


_ALL = tuple((m, n, k) for n, k in shapes.EXPERTS for m in TOKENS)
# A masked layout of 4096 tokens would hold more padding than rows.
_FEW = tuple(size for size in _ALL if size[0] <= 1024)

PEERS = (
    Peer("vllm moe marlin", "moe", _ALL, _marlin, _key, compiles="once"),
    Peer("torch grouped fp8", "moe", _ALL, _torch, _key),
    Peer("DeepGEMM contiguous", "moe", _ALL, _contiguous, _key, compiles="sizes"),
    Peer("DeepGEMM masked", "moe", _FEW, _masked, _key, compiles="sizes"),
)
