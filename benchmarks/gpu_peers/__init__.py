"""Times of other libraries' GPU kernels, as `pallas_kernels.bench --against` reads them."""

# vLLM's compiled libraries.
COMPILED = ("_C_stable_libtorch", "_C", "_moe_C")
