"""The one place that launches a kernel: lowering options, interpreter, names, sharding types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.problem import KernelError

# Names of the axes inside a kernel body: thread block, block within its cluster, warpgroup.
GRID, CLUSTER, WARPGROUP = "tile", "cluster", "warpgroup"


def can_interpret() -> bool:
    """Return whether this jax can run the kernels under the GPU interpreter (0.11 and later)."""
    return hasattr(plgpu, "InterpretGPUParams")


def _interpreter(interpret: bool) -> Any:
    if not interpret:
        return None
    if not can_interpret():
        raise KernelError(f"interpret=True needs jax 0.11 or later; this is jax {jax.__version__}")
    return getattr(plgpu, "InterpretGPUParams")(detect_races=True)  # noqa: B009 - absent in 0.10


def _varying_axes(operands: tuple[jax.Array, ...]) -> frozenset[str]:
    """Return the mesh axes over which any operand varies inside `shard_map`."""
    axes = frozenset()
    for operand in operands:
        manual = getattr(jax.typeof(operand), "manual_axis_type", None)
        axes |= getattr(manual, "varying", frozenset())
    return axes


def _as_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = axes - _varying_axes((x,))
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def launch(
    body: Callable[..., None],
    *operands: jax.Array,
    out: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    scratch: Mapping[str, Any],
    grid: int,
    warpgroups: int,
    name: str,
    cluster: int = 1,
    interpret: bool = False,
    into: jax.Array | None = None,
) -> Any:
    """Run a Mosaic GPU kernel with Warpgroup semantics and hand-written synchronisation.

    Args:
        body: called with one global ref per operand and output, then the scratch refs by keyword.
            Inside, the axes are `GRID` (extent `grid`), `CLUSTER` and `WARPGROUP`.
        *operands: arrays in global memory.
        out: shape and dtype of each output.
        scratch: keyword -> shared memory, barrier or accumulator type.
        grid: number of clusters of thread blocks.
        warpgroups: warpgroups of 128 threads in a block.
        name: the kernel's name in profiles.
        cluster: thread blocks per cluster.
        interpret: run on the host under the GPU interpreter, with its race detector.
        into: array whose buffer the one output takes over; what the kernel leaves keeps its value.

    Returns:
        The output array, or a tuple of them when `out` is a tuple.
    """
    kernel = plgpu.kernel(
        body,
        out_type=() if into is not None else out,
        scratch_types=dict(scratch),
        grid=(grid,),
        grid_names=(GRID,),
        cluster=(cluster,),
        cluster_names=(CLUSTER,),
        num_threads=warpgroups,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            unsafe_no_auto_barriers=True,
        ),
        interpret=_interpreter(interpret),
    )
    if into is None:
        result = kernel(*operands)
    else:
        # XLA fuses a slice that a kernel reads, or an update that takes its result, into the call,
        # and the fusion has an output of its own: the rows in `into` would be lost.  It does not
        # look through a barrier.
        operands, into = lax.optimization_barrier((operands, into))
        # A ref that a kernel writes is an operand aliased to an output.  The wrapper that would
        # map a kernel over a batch cannot be discharged of refs in jax 0.10: go around it.
        output = jax.new_ref(into)
        getattr(kernel, "fun")(*operands, output)  # noqa: B009 - of jax.custom_batching
        result = lax.optimization_barrier(jax.freeze(output))
    # Under shard_map(check_vma=True) the kernel's output carries no sharding type of its own.
    axes = _varying_axes(operands)
    return jax.tree.map(lambda x: _as_varying(x, axes), result) if axes else result
