"""Shared by the kernel tests: which tests can run here, and fixtures to lower and interpret."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from pallas_kernels.launch import can_interpret


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip interpreter tests on old jax, and GPU tests away from a Hopper GPU."""
    no_interpreter = pytest.mark.skip(reason="the GPU interpreter needs jax 0.11")
    no_hopper = pytest.mark.skip(reason="needs an NVIDIA Hopper GPU")
    hopper = _has_hopper()
    for item in items:
        if "interpret" in item.keywords and not can_interpret():
            item.add_marker(no_interpreter)
        if "gpu" in item.keywords and not hopper:
            item.add_marker(no_hopper)


def _has_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@pytest.fixture
def lower() -> Callable[..., str]:
    """Return a function that lowers a function for CUDA, on any host, and returns the module."""

    def run(function: Callable, *args, **kwargs) -> str:
        lowered = jax.jit(function).trace(*args, **kwargs).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    return run


@pytest.fixture
def interpret() -> Callable[..., np.ndarray]:
    """Return a function that runs a kernel call and fails when its race detector found a race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    def run(function: Callable, *args, **kwargs) -> np.ndarray:
        gpu_callbacks.reset_gpu_interpret_mode_state()
        result = jax.device_get(function(*args, **kwargs, interpret=True))
        assert not gpu_callbacks.get_races().races_found, "the kernel has a race"
        return result

    return run
