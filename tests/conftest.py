"""Strict JAX: implicit promotions are exactly the bugs of a quantization library."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores and the GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
elif "JAX_COMPILATION_CACHE_DIR" not in os.environ and not importlib.util.find_spec("jax_plugins"):
    # Most of the time goes into compiling small programs for the CPU.  Each is compiled once in a
    # run, whichever process meets it first: workers and the children of tests inherit this.
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxquant-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture
def few_optimizations() -> Iterator[None]:
    """Compile whole models in two thirds of the time; their logits differ in rounding at most."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
