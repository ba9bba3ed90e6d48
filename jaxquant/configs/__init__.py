"""One frozen config per checkpoint family, with exactly that family's fields.

Each reads Hugging Face's ``quantization_config`` with ``from_hf`` and writes it with ``to_hf``.  A
field of another family is a ``TypeError`` that names the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.configs.base import QuantizationConfig as QuantizationConfig
from jaxquant.configs.families import (
    AWQConfig,
    BlockInt8Config,
    CompressedTensorsConfig,
    FbgemmFp8Config,
    Fp8Config,
    GPTQConfig,
    ModelOptConfig,
    W8A8Int8Config,
)
from jaxquant.errors import ConfigError

FAMILIES: tuple[type[QuantizationConfig], ...] = (
    Fp8Config,
    GPTQConfig,
    AWQConfig,
    BlockInt8Config,
    FbgemmFp8Config,
    W8A8Int8Config,
    CompressedTensorsConfig,
    ModelOptConfig,
)


def config_from_hf(config: Mapping[str, Any]) -> QuantizationConfig:
    """Read a ``quantization_config`` of any family.

    Raises:
        ConfigError: no family has its ``quant_method``.
    """
    method = str(config.get("quant_method") or "").lower().replace("-", "_")
    for family in FAMILIES:
        if method in family.methods:
            return family.from_hf(config)
    known = [name for family in FAMILIES for name in family.methods]
    raise ConfigError("quant_method", repr(config.get("quant_method")), f"one of {known}")
