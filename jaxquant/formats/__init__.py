"""Checkpoint formats, one file each; adding one is a file and a line in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.errors import FormatError
from jaxquant.formats.autoround import AUTO_ROUND
from jaxquant.formats.awq import AWQ
from jaxquant.formats.base import Format
from jaxquant.formats.bitsandbytes import BITSANDBYTES
from jaxquant.formats.compressed_tensors import COMPRESSED_TENSORS
from jaxquant.formats.config_types import check_types
from jaxquant.formats.dense import DENSE
from jaxquant.formats.fp8 import FP8
from jaxquant.formats.gptoss import GPT_OSS
from jaxquant.formats.gptq import GPTQ
from jaxquant.formats.hqq import HQQ
from jaxquant.formats.int8 import INT8
from jaxquant.formats.marlin import MARLIN
from jaxquant.formats.modelopt import MODELOPT
from jaxquant.formats.qserve import QSERVE
from jaxquant.formats.quark import QUARK
from jaxquant.formats.torchao import TORCHAO

# MARLIN before GPTQ: its files carry GPTQ's method name.
FORMATS: tuple[Format, ...] = (
    DENSE,
    FP8,
    INT8,
    MARLIN,
    GPTQ,
    AWQ,
    COMPRESSED_TENSORS,
    MODELOPT,
    BITSANDBYTES,
    QSERVE,
    GPT_OSS,
    AUTO_ROUND,
    HQQ,
    TORCHAO,
    QUARK,
)


def detect(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this ``quantization_config``.

    Raises:
        FormatError: no format claims it, or a key has a value of another type than it can have.
    """
    check_types(config)
    for candidate in FORMATS:
        if candidate.claims(config):
            return candidate
    raise FormatError(
        "quantization_config: quant_method",
        repr(config.get("quant_method")),
        f"formats: {', '.join(f.name for f in FORMATS)}",
        "convert the checkpoint to one of these with the tool that made it",
    )
