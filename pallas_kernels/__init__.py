"""Quantized matmul and activation quantization kernels for NVIDIA Hopper, in Pallas (Mosaic GPU).

Plain arrays in, plain arrays out; only jax and numpy are needed.
"""

from pallas_kernels.gather import gather_rows as gather_rows
from pallas_kernels.gather import gather_rows_refusal as gather_rows_refusal
from pallas_kernels.grouped_a8 import GROUPED_A8_KERNELS as GROUPED_A8_KERNELS
from pallas_kernels.grouped_a8 import grouped_a8_problem as grouped_a8_problem
from pallas_kernels.grouped_a8 import grouped_matmul_a8 as grouped_matmul_a8
from pallas_kernels.grouped_a16 import GROUPED_A16_KERNELS as GROUPED_A16_KERNELS
from pallas_kernels.grouped_a16 import grouped_a16_problem as grouped_a16_problem
from pallas_kernels.grouped_a16 import grouped_matmul_a16 as grouped_matmul_a16
from pallas_kernels.grouped_dense import GROUPED_DENSE_KERNELS as GROUPED_DENSE_KERNELS
from pallas_kernels.grouped_dense import grouped_dense_problem as grouped_dense_problem
from pallas_kernels.grouped_dense import grouped_matmul_dense as grouped_matmul_dense
from pallas_kernels.matmul_a8 import A8_KERNELS as A8_KERNELS
from pallas_kernels.matmul_a8 import a8_problem as a8_problem
from pallas_kernels.matmul_a8 import matmul_a8 as matmul_a8
from pallas_kernels.matmul_a16 import A16_KERNELS as A16_KERNELS
from pallas_kernels.matmul_a16 import a16_problem as a16_problem
from pallas_kernels.matmul_a16 import matmul_a16 as matmul_a16
from pallas_kernels.matmul_w4a8 import W4A8_KERNELS as W4A8_KERNELS
from pallas_kernels.matmul_w4a8 import matmul_w4a8 as matmul_w4a8
from pallas_kernels.matmul_w4a8 import w4a8_problem as w4a8_problem
from pallas_kernels.prepack import Plain as Plain
from pallas_kernels.prepack import Prepacked as Prepacked
from pallas_kernels.prepack import drop_zeros as drop_zeros
from pallas_kernels.prepack import prepack as prepack
from pallas_kernels.prepack import store_zeros as store_zeros
from pallas_kernels.prepack import unpack as unpack
from pallas_kernels.problem import Config as Config
from pallas_kernels.problem import Device as Device
from pallas_kernels.problem import Kernel as Kernel
from pallas_kernels.problem import KernelError as KernelError
from pallas_kernels.problem import Problem as Problem
from pallas_kernels.problem import current_device as current_device
from pallas_kernels.quantize import Quantized as Quantized
from pallas_kernels.quantize import quantize as quantize
from pallas_kernels.quantize import quantize_and_keep as quantize_and_keep
from pallas_kernels.quantize import quantize_problem as quantize_problem
from pallas_kernels.quantize_rows import QUANTIZE_KERNELS as QUANTIZE_KERNELS
