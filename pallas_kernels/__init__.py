"""Quantized matmul and activation quantization kernels for NVIDIA Hopper, in Pallas (Mosaic GPU).

Plain arrays in, plain arrays out; only jax and numpy are needed.
"""

from pallas_kernels.problem import Config as Config
from pallas_kernels.problem import Device as Device
from pallas_kernels.problem import Kernel as Kernel
from pallas_kernels.problem import KernelError as KernelError
from pallas_kernels.problem import Problem as Problem
