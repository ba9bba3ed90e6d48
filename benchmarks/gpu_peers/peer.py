"""A kernel of another library, and the operands that several of them take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch  # pyright: ignore[reportMissingImports]

Call = Callable[[], object]
Size = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A kernel of another library.

    Attributes:
        name: as the cases of `pallas_kernels.bench` name it.
        group: what `--only` selects.
        sizes: (m, n, k) to time; m counts tokens.
        build: size -> ways to run it (block sizes, kernels), the fastest of which counts; each is
            one call for every set of operands.
        key: size -> key of the report.
        compiles: "sizes" where the library compiles a kernel for each size at its first call,
            "once" where the driver compiles one for all, "" where nothing is compiled.
    """

    name: str
    group: str
    sizes: tuple[Size, ...]
    build: Callable[[int, int, int], Sequence[Sequence[Call]]]
    key: Callable[[Size], str] = lambda size: "x".join(map(str, size))
    compiles: Literal["", "once", "sizes"] = ""


def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random numbers of moderate size, as scales are."""
    return torch.rand(shape, device="cuda", dtype=dtype) / 64 + 1 / 128


def normal(*shape: int) -> torch.Tensor:
    """Return random activations in bfloat16."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def fp8(*shape: int) -> torch.Tensor:
    """Return random e4m3 codes up to 1.875: no NaN, and no few codes that decide the sum."""
    codes = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
    return codes.bitwise_and_(0xBF).view(torch.float8_e4m3fn)


def int8(*shape: int) -> torch.Tensor:
    """Return random int8 codes."""
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


def words(*shape: int) -> torch.Tensor:
    """Return random 32-bit words of packed codes."""
    low, high = -(2**31), 2**31 - 1
    return torch.randint(low, high, shape, device="cuda", dtype=torch.int32)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return memory for a result."""
    return torch.empty(shape, device="cuda", dtype=dtype)


def locks() -> torch.Tensor:
    """Return the workspace in which the thread blocks of a Marlin kernel wait for each other."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    return torch.zeros(4 * count, device="cuda", dtype=torch.int32)
