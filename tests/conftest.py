"""Strict JAX: implicit promotions are exactly the bugs of a quantization library."""

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores and the GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
elif not importlib.util.find_spec("jax_plugins"):  # workers and the children of tests inherit this
    # Tests compile thousands of small programs for the CPU and run each of them a few times: XLA's
    # simplest path takes half the time.  Give XLA_FLAGS to test with all optimizations, as the demo
    # runs.
    if "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = (
            "--xla_force_host_platform_device_count=4"
            " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
            " --xla_cpu_parallel_codegen_split_count=1"
        )
        if importlib.metadata.version("jaxlib").startswith("0.10."):
            # XLA aborts on a flag that it does not know, as that of jaxlib 0.12 on this one.
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Each is compiled once in a run, whichever process meets it first.
        COMPILED = tempfile.TemporaryDirectory(prefix="jaxquant-compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Programs of a module are of little use to the next, and a worker would keep gigabytes."""
    yield
    jax.clear_caches()
