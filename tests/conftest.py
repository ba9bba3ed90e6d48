"""Strict JAX: implicit promotions are exactly the bugs of a quantization library."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax

jax.config.update("jax_numpy_dtype_promotion", "standard")
