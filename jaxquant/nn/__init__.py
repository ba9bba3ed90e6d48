"""Flax NNX modules that hold quantized weights and call ops."""

from jaxquant.nn.attention import Attention as Attention
from jaxquant.nn.basic import MLP as MLP
from jaxquant.nn.basic import Embedding as Embedding
from jaxquant.nn.basic import RMSNorm as RMSNorm
from jaxquant.nn.cache import Cache as Cache
from jaxquant.nn.linear import Buffer as Buffer
from jaxquant.nn.linear import Linear as Linear
from jaxquant.nn.linear import QWeight as QWeight
from jaxquant.nn.mla import LatentAttention as LatentAttention
from jaxquant.nn.moe import MoE as MoE
from jaxquant.nn.quantize import quantize_model as quantize_model
