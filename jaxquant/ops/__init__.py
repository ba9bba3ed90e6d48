"""Ops: the only door from weights to kernels."""

from jaxquant.ops.backend import Backend as Backend
from jaxquant.ops.backend import backend as backend
from jaxquant.ops.grouped_matmul import grouped_matmul as grouped_matmul
from jaxquant.ops.matmul import matmul as matmul
