"""Decoder models whose attribute paths are the names that checkpoints use."""

from jaxquant.models.build import build_model as build_model
from jaxquant.models.build import required_tensors as required_tensors
from jaxquant.models.config import FAMILIES as FAMILIES
from jaxquant.models.config import ModelConfig as ModelConfig
from jaxquant.models.decoder import CausalLM as CausalLM
