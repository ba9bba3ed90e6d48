"""vLLM's compiled operators and DeepGEMM, from a folder or from an installed vLLM."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu_peers import COMPILED


def load(folder: Path | None) -> list[str]:
    """Load the compiled operators; returns what could not be loaded, and why.

    Args:
        folder: holds `_C.abi3.so` and its like, `scalar_type.py` and the package `deep_gemm` of a
            vLLM wheel; None for the installed vLLM.
    """
    failures = []
    for name in COMPILED:
        try:
            if folder is None:
                importlib.import_module(f"vllm.{name}")
            else:
                torch.ops.load_library(str(folder.resolve() / f"{name}.abi3.so"))
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}"[:300])
    if folder is not None:
        sys.path.insert(0, str(folder.resolve()))
    return failures


def operator(name: str) -> Any:
    """Return an operator of vLLM's; looked up late, because it may not have been loaded.

    Raises:
        AttributeError: no loaded library has it.
    """
    for space in ("_C", "_moe_C", "_C_stable_libtorch"):
        if hasattr(getattr(torch.ops, space), name):
            return getattr(getattr(torch.ops, space), name)
    raise AttributeError(f"no loaded library has the operator {name}")


def scalar_type(name: str) -> int:
    """Return vLLM's number of a type of codes: "uint4b8", "uint8b128", "float4_e2m1f"."""
    module = "scalar_type" if importlib.util.find_spec("scalar_type") else "vllm.scalar_type"
    return getattr(importlib.import_module(module).scalar_types, name).id


def deep_gemm() -> Any:
    """Return the package DeepGEMM: beside vLLM's libraries, or the one inside vLLM."""
    os.environ.setdefault("DG_JIT_USE_NVRTC", "0")  # nvcc, which its authors measure with
    beside = importlib.util.find_spec("deep_gemm")
    return importlib.import_module("deep_gemm" if beside else "vllm.third_party.deep_gemm")
