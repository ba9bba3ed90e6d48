"""Ops: the only door from weights to kernels."""

from jaxquant.ops.activations import QActivation as QActivation
from jaxquant.ops.backend import Backend as Backend
from jaxquant.ops.backend import backend as backend
from jaxquant.ops.fused import rms_norm as rms_norm
from jaxquant.ops.fused import rms_norm_quantize as rms_norm_quantize
from jaxquant.ops.fused import silu_mul_quantize as silu_mul_quantize
from jaxquant.ops.grouped_matmul import grouped_matmul as grouped_matmul
from jaxquant.ops.matmul import matmul as matmul
