"""jaxquant: quantized inference in JAX."""
