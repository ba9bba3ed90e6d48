"""The vocabulary of kernel selection: problems, configs, kernels and the choice among them.

Everything here is static data.  A `Problem` says what has to be computed and on which device, a
`Kernel` says which problems it takes, a `Config` says how one kernel runs one problem, and
`select` picks from a literal table.  Nothing is decided by catching exceptions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# An operand from which a problem is formed: only its shape and dtype are read.
Shaped = jax.Array | jax.ShapeDtypeStruct


class KernelError(ValueError):
    """No kernel takes a problem, or an operand breaks an op's contract.

    Attributes:
        problem: the refused problem, or None when the operands did not even form one.
        reasons: kernel name -> why it refused; empty for a bad operand.
    """

    def __init__(
        self,
        message: str,
        problem: Problem | None = None,
        reasons: dict[str, str] | None = None,
    ):
        self.problem = problem
        self.reasons = dict(reasons or {})
        lines = [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        super().__init__("\n".join([message, *lines]))


@dataclasses.dataclass(frozen=True)
class Device:
    """What selection needs to know about a GPU.

    Attributes:
        name: the driver's name, which also chooses the table of tuned configs.
        capability: compute capability such as "9.0".
        sms: number of streaming multiprocessors.
        smem: shared memory that one thread block may use, in bytes.
    """

    name: str
    capability: str
    sms: int
    smem: int


H200 = Device("NVIDIA H200", "9.0", 132, 227 * 1024)


def current_device() -> Device:
    """Return the GPU that this process runs on, or an H200 when it has none.

    The second case serves lowering for CUDA on a machine without a GPU.
    """
    if jax.default_backend() != "gpu":
        return H200
    device = jax.devices()[0]
    return Device(
        name=device.device_kind,
        capability=str(getattr(device, "compute_capability", "")),
        sms=getattr(device, "core_count", H200.sms),
        smem=getattr(device, "shared_memory_per_block_optin", H200.smem),
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One operation on operands of known shape, type and scale layout.

    Attributes:
        op: public function, such as "matmul_a8".
        m, n, k: rows (tokens), output channels and contracted extent, in elements.
        x_dtype, w_dtype, out_dtype: dtype names; sub-byte weights use their logical type ("uint4").
        x_scale: "none", "tensor", "token" or "1x128".
        w_scale: "none", "tensor", "channel", "<bn>x<bk>" for blocks, "g<size>" for groups along k
            (followed by what `stream_config.scale_name` says of their build).
        zero: layout of the zero points ("tensor", "token" or "group"), or "offset"; "" when there
            are none.
        bias: dtype name of the bias; "" when there is none.
        fused: what the op does besides, such as "rms" or "gated" before quantizing.
        experts: weights in the stack, which have about m rows between them; 0 for a single weight.
        device: the GPU to run on.
    """

    op: str
    m: int
    n: int
    k: int
    x_dtype: str
    w_dtype: str
    out_dtype: str
    x_scale: str = "none"
    w_scale: str = "none"
    zero: str = ""
    bias: str = ""
    fused: str = ""
    experts: int = 0
    device: Device = H200

    @property
    def kind(self) -> str:
        """Problems of one kind may use each other's tuned configs: all but sizes and device.

        What only the epilogue of an 8-bit matmul sees does not matter to its tiles: scales that are
        constant along K, zero points, and which float8 types are multiplied.
        """
        if self.op in ("matmul_a8", "grouped_matmul_a8"):
            along_k = [s for s in (self.x_scale, self.w_scale) if "x" in s]
            return " ".join(["int8" if self.x_dtype == "int8" else "float8", *along_k])
        parts = [self.x_dtype, self.w_dtype, self.x_scale, self.w_scale]
        if self.op == "quantize":
            parts = [self.x_dtype, self.out_dtype, self.x_scale]
        if self.zero:
            parts.append(f"{self.zero} zero")
        return " ".join([*parts, self.fused] if self.fused else parts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds whose tuned configs suit this problem, its own first.

        For weights decoded in registers, zero points, the size of a group, factors and the 16-bit
        type of the activations change little in what a tile costs; only the width of the codes
        does, and whether they become int8 operands.
        """
        if self.op == "matmul_w4a8":
            return self.kind, "int8 uint4 token g128 int8 factor n group zero"
        if self.op not in ("matmul_a16", "grouped_matmul_a16"):
            return (self.kind,)
        _, *weight = self.kind.replace("factor n", "factor one").split()
        wide = self.w_dtype in ("int8", "float8_e4m3fn")
        common = "int8 none g128 float32" if wide else "uint4 none g128"
        return self.kind, " ".join(["bfloat16", *weight]), f"bfloat16 {common}"


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the tile configs; each kernel has its own subclass with integer or string fields."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None when it can."""
        raise NotImplementedError

    def adapted(self, problem: Problem) -> Config:
        """Return this config, tuned for a problem of other sizes, as `problem` should use it."""
        del problem
        return self


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One body that can run some problems.

    Attributes:
        name: unique name, shown in errors and stored in the tuned tables.
        op: the public function that it implements.
        config_type: its subclass of `Config`.
        fn: called as `fn(problem, config, interpret, *operands)`; operands are defined per op.
        accepts: returns the reason for refusing a problem, or None.
        default_config: a sane config for an accepted problem that nobody tuned.
        candidates: the configs worth measuring for a problem.
    """

    name: str
    op: str
    config_type: type[Config]
    fn: Callable[..., Any]
    accepts: Callable[[Problem], str | None]
    default_config: Callable[[Problem], Config]
    candidates: Callable[[Problem], Iterable[Config]]


def dtype_bits(dtype: Any) -> int:
    """Return the width of one element in bits (4 for int4, 8 for float8 and int8)."""
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def require_hopper(problem: Problem) -> str | None:
    """Return the refusal shared by all kernels: another GPU, or nothing to compute."""
    if 0 in (problem.m, problem.n, problem.k):
        return f"M, N and K must be at least 1, not {problem.m}, {problem.n} and {problem.k}"
    if problem.device.capability == "9.0":
        return None
    return (
        f"needs compute capability 9.0, and {problem.device.name} "
        f"has {problem.device.capability or 'none'}"
    )


def require_tiles(problem: Problem) -> str | None:
    """Return the refusal shared by all matmul kernels, whose tiles are 64 channels wide."""
    if reason := require_hopper(problem):
        return reason
    if problem.n % 64 or problem.k % 64:
        return f"N and K must be multiples of 64, not N={problem.n}, K={problem.k}"
    return None


# All Hopper cards have the same multiprocessors: what was measured on an H200 serves those that
# nobody measured.  Entries of a card's own file replace the common ones for the same problem.
_COMMON_FILES = {"9.0": "h200.json"}
_OWN_FILES = {"NVIDIA H200": "h200.json", "NVIDIA H100 80GB HBM3": "h100.json"}
_TUNED = Path(__file__).parent / "tuned"
# What tells the problems of a table's entries apart, within an op.
ENTRY_KEY = ("kind", "m", "n", "k", "experts")


def own_tuned_path(device: Device) -> Path | None:
    """Return the file that holds what was measured on this very card, or None."""
    file = _OWN_FILES.get(device.name)
    return _TUNED / file if file else None


@functools.cache
def tuned_table(device: Device) -> dict[str, list[dict[str, Any]]]:
    """Return the configs tuned for a GPU, op -> entries; empty for an unknown architecture."""
    table: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    common = _COMMON_FILES.get(device.capability)
    for path in (common and _TUNED / common, own_tuned_path(device)):
        if not path:
            continue
        for op, entries in json.loads(path.read_text()).items():
            for entry in entries:
                key = tuple(entry.get(name) for name in ENTRY_KEY)
                table.setdefault(op, {})[key] = entry
    return {op: list(entries.values()) for op, entries in table.items()}


def tuned_config(kernels: Iterable[Kernel], problem: Problem) -> tuple[Kernel, Config] | None:
    """Return the kernel and config measured best on the nearest tuned problem of the same kind.

    Nearness is the distance of (m, n, k) in octaves, m (of each expert, if there are any) counting
    double because the best tile follows it most, and another kind counting one.  Entries that
    cannot run `problem`, even after `Config.adapted`, are passed over.
    """
    by_name = {kernel.name: kernel for kernel in kernels if kernel.accepts(problem) is None}
    if not by_name:  # an empty problem has no distance to any other
        return None

    def distance(entry: dict[str, Any]) -> float:
        rows = problem.m / max(problem.experts, 1)
        return (
            2 * abs(math.log2(entry["m"] / max(entry.get("experts", 0), 1) / rows))
            + abs(math.log2(entry["n"] / problem.n))
            + abs(math.log2(entry["k"] / problem.k))
            + (entry["kind"] != problem.kind)
        )

    entries = tuned_table(problem.device).get(problem.op, [])
    for entry in sorted((e for e in entries if e["kind"] in problem.kinds), key=distance):
        kernel = by_name.get(entry["kernel"])
        if kernel is None:
            continue
        config = kernel.config_type(**entry["config"]).adapted(problem)
        if config.refuses(problem) is None:
            return kernel, config
    return None


def select(
    kernels: Iterable[Kernel], problem: Problem, config: Config | None = None
) -> tuple[Kernel, Config]:
    """Choose the kernel and config that run a problem.

    A given `config` decides the kernel by its type; else the tuned table of the device does, else
    the first kernel that accepts runs with its default config.

    Raises:
        KernelError: nothing accepts; the message lists every kernel's reason.
    """
    kernels = [kernel for kernel in kernels if kernel.op == problem.op]
    reasons: dict[str, str] = {}
    if config is None and (tuned := tuned_config(kernels, problem)):
        return tuned
    for kernel in kernels:
        if config is not None and not isinstance(config, kernel.config_type):
            reasons[kernel.name] = f"runs {kernel.config_type.__name__}, not {config!r}"
            continue
        reason = kernel.accepts(problem)
        if reason is None:
            chosen = config or kernel.default_config(problem)
            reason = chosen.refuses(problem)
            if reason is None:
                return kernel, chosen
            reason = f"{chosen!r}: {reason}"
        reasons[kernel.name] = reason
    raise KernelError(f"no kernel runs {problem}", problem, reasons)
