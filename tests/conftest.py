"""Strict JAX: implicit promotions are exactly the bugs of a quantization library."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores and the GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "standard")
