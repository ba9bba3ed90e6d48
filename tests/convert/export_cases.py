"""Checkpoints to export, and exporting them: each format with every layout that it holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

import jaxquant as jq
from tests.convert.writer import write_checkpoint
from tests.small_models import BASE, random_tensors

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
BUNDLED = ROOT / "jaxquant" / "bundled" / "tiny-qwen3-moe"
LAST_BIT = ("nvfp4",)
"""A stored reciprocal, and a product of two scales in another order."""


class Case(NamedTuple):
    """One export.

    Attributes:
        source: a golden folder, "bundled" or "mixtral".
        format: what it is exported to.
        scheme: what it is quantized to on the way.
        peer: whether a peer's package reads it on the CPU.
        whole: whether transformers loads the whole model: dequantized, or as it is (AWQ, GPTQ).
    """

    source: str
    format: str
    scheme: str | None = None
    peer: bool = True
    whole: bool = False

    @property
    def label(self):
        return "-".join(filter(None, (self.source, self.scheme, "to", self.format)))


CT = "compressed-tensors"
CASES = (
    Case("awq-g64-gemm-llama-s", CT),
    Case("awq-g64-gemm-llama-s", "gptq"),
    Case("awq-g64-gemm-llama-s", "awq"),
    Case("ct-awq-w4a16-asym-llama", CT),
    Case("ct-awq-w4a16-asym-llama", "gptq"),
    Case("ct-awq-w4a16-asym-llama", "awq", whole=True),
    Case("ct-mixed-fp8attn-w4mlp-llama", CT),
    Case("ct-mxfp4-llama", CT),
    Case("ct-nvfp4a16-llama", CT),
    Case("ct-w3a16-g128-llama", CT),
    Case("ct-w3a16-g128-llama", "gptq", whole=True),
    Case("ct-w8a8-int8-static-asymact-llama", CT),
    Case("ct012-w4a16-actorder-group-llama", "gptq", whole=True),
    Case("fp8block-dsstyle-dsv3", CT),
    Case("fp8block-dsstyle-dsv3", "fp8"),
    Case("gptq-4b-dynamic-llama", CT),
    Case("gptq-4b-dynamic-llama", "gptq"),
    Case("bundled", CT, "w4a16_g32", whole=True),
    Case("bundled", "gptq", "w4a16_g32"),
    Case("bundled", "awq", "w4a16_g32"),
    Case("bundled", "awq", "w4a16_g128_asym"),
    Case("bundled", "gptq", "w8a16"),
    Case("bundled", CT, "w5a16_g32_asym"),
    Case("bundled", CT, "w4a8_g32"),
    Case("bundled", CT, "w4afp8"),
    Case("bundled", CT, "w8a8"),
    Case("bundled", CT, "fp8"),
    Case("bundled", CT, "fp8_tensor"),
    Case("bundled", CT, "fp8a16"),
    Case("bundled", CT, "mxfp8"),
    Case("bundled", CT, "nvfp4a16"),
    Case("bundled", "fp8", "fp8_b128", whole=True),
    # transformers reads blocks only, and SGLang and vLLM do not run on a plain CPU.
    Case("bundled", "fp8", "fp8", peer=False),
    Case("bundled", "fp8", "fp8_tensor", peer=False),
    Case("bundled", "fp8", "mxfp8", peer=False),
    Case("mixtral", "gptq", "w4a16_g32_asym"),
    Case("mixtral", CT, "w4a16_g32"),
)


def mixtral(folder: Path) -> Path:
    """A checkpoint under Mixtral's own names, with a biasless router and two experts."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 2, "head_dim": 16}
    config = BASE | sizes | {"model_type": "mixtral", "num_experts_per_tok": 1}
    config |= {"architectures": ["MixtralForCausalLM"]}
    names = ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"))
    arrays = {}
    for name, value in random_tensors(jq.ModelConfig.from_hf(config)).items():
        for ours, theirs in (*names, ("down_proj", "w2")):
            name = name.replace(ours, theirs)
        arrays[name] = value.astype(ml_dtypes.bfloat16)
    return write_checkpoint(folder, arrays, config)


def source_of(case: Case, folder: Path) -> Path:
    """Where the case's source lies; ``folder`` is for those that are made."""
    if case.source == "mixtral":
        path = folder / "mixtral"
        return path if path.exists() else mixtral(path)
    return BUNDLED if case.source == "bundled" else GOLDEN / case.source


def export(case: Case, folder: Path) -> Path:
    """Export the case into a new directory of ``folder``."""
    out = folder / case.label
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*key-value cache.*")
        jq.export_pretrained(source_of(case, folder), out, format=case.format, scheme=case.scheme)
    return out


def values(q) -> np.ndarray:
    """The float32 weight."""
    return np.asarray(jq.dequantize(q))
