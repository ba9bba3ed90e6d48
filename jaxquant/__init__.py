"""jaxquant: quantized inference in JAX.

Public names are imported on first use, so that ``jaxquant --help`` does not pay for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxquant.arrays.bank import ExpertBank as ExpertBank
    from jaxquant.arrays.layout import Layout as Layout
    from jaxquant.arrays.qtensor import QTensor as QTensor
    from jaxquant.arrays.scheme import Scheme as Scheme
    from jaxquant.configs import AWQConfig as AWQConfig
    from jaxquant.configs import BlockInt8Config as BlockInt8Config
    from jaxquant.configs import Fp8Config as Fp8Config
    from jaxquant.configs import GPTQConfig as GPTQConfig
    from jaxquant.convert import export_pretrained as export_pretrained
    from jaxquant.convert import from_pretrained as from_pretrained
    from jaxquant.convert import read_quantized as read_quantized
    from jaxquant.convert import save_pretrained as save_pretrained
    from jaxquant.errors import ConfigError as ConfigError
    from jaxquant.errors import FormatError as FormatError
    from jaxquant.errors import JaxquantError as JaxquantError
    from jaxquant.errors import KernelError as KernelError
    from jaxquant.errors import LayoutError as LayoutError
    from jaxquant.errors import PlanError as PlanError
    from jaxquant.evaluate import perplexity as perplexity
    from jaxquant.explanation import explain as explain
    from jaxquant.generation import generate as generate
    from jaxquant.models import CausalLM as CausalLM
    from jaxquant.models import ModelConfig as ModelConfig
    from jaxquant.nn import Linear as Linear
    from jaxquant.nn import QWeight as QWeight
    from jaxquant.nn.prepare import prepare_model as prepare_model
    from jaxquant.nn.quantize import quantize_model as quantize_model
    from jaxquant.nn.stack import stack_layers as stack_layers
    from jaxquant.nn.stack import unstack_layers as unstack_layers
    from jaxquant.ops import Backend as Backend
    from jaxquant.ops import backend as backend
    from jaxquant.ops import grouped_matmul as grouped_matmul
    from jaxquant.ops import matmul as matmul
    from jaxquant.transforms.experts import bank_experts as bank_experts
    from jaxquant.transforms.experts import plan_experts as plan_experts
    from jaxquant.transforms.numeric import dequantize as dequantize
    from jaxquant.transforms.numeric import quantize as quantize

_HOMES = {
    "jaxquant.arrays.bank": ("ExpertBank",),
    "jaxquant.arrays.layout": ("Layout",),
    "jaxquant.arrays.qtensor": ("QTensor",),
    "jaxquant.arrays.scheme": ("Scheme",),
    "jaxquant.configs": ("AWQConfig", "BlockInt8Config", "Fp8Config", "GPTQConfig"),
    "jaxquant.convert": (
        "export_pretrained",
        "from_pretrained",
        "read_quantized",
        "save_pretrained",
    ),
    "jaxquant.errors": (
        "ConfigError",
        "FormatError",
        "JaxquantError",
        "KernelError",
        "LayoutError",
        "PlanError",
    ),
    "jaxquant.evaluate": ("perplexity",),
    "jaxquant.explanation": ("explain",),
    "jaxquant.generation": ("generate",),
    "jaxquant.models": ("CausalLM", "ModelConfig"),
    "jaxquant.nn": ("Linear", "QWeight"),
    "jaxquant.nn.prepare": ("prepare_model",),
    "jaxquant.nn.quantize": ("quantize_model",),
    "jaxquant.nn.stack": ("stack_layers", "unstack_layers"),
    "jaxquant.ops": ("Backend", "backend", "grouped_matmul", "matmul"),
    "jaxquant.transforms.experts": ("bank_experts", "plan_experts"),
    "jaxquant.transforms.numeric": ("dequantize", "quantize"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxquant' has no attribute {name!r}")
    # A submodule may have the name of its function (generate): the function wins for good.
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
