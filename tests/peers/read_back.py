"""Read exported checkpoints with the peers' own packages; runs in their own environment.

Usage: python read_back.py FOLDER...

Every folder gets a ``peer.safetensors`` with the float32 weight of each linear, as the package that
owns the format dequantizes it, and with every other tensor as the package leaves it.  Scales are
widened to float32 first, so that no package rounds the product to 16 bits.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

# GPTQModel compiles every linear, and loading asks a hub.
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file, save_file

WIDE = (torch.float16, torch.bfloat16)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor; 16-bit floats as float32."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return {name: t.float() if t.dtype in WIDE else t for name, t in tensors.items()}


def compressed_tensors(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    """The library's converter, which goes by the config's groups, targets and ignore list."""
    from compressed_tensors.compressors.mxfp4 import base as mxfp4
    from compressed_tensors.compressors.nvfp4 import base as nvfp4
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import (
        CompressedTensorsDequantizer,
    )

    # Its decoder of 4-bit floats rounds to bfloat16 unless it is told otherwise.
    for module in (nvfp4, mxfp4):
        if hasattr(module, "unpack_fp4_from_uint8"):
            unpack = functools.partial(unpack_fp4_from_uint8, dtype=torch.float32)
            module.unpack_fp4_from_uint8 = unpack
    # It knows no static activation scales, which are no part of a weight.
    acts = ("input_scale", "input_zero_point")
    kept = {n: t for n, t in tensors_of(folder).items() if not n.endswith(acts)}
    return CompressedTensorsDequantizer(str(folder), dtype=torch.float32).validate(kept)


def gptq(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    """GPTQModel's torch linear for each module that its config means to be quantized."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    settings = QuantizeConfig.from_quant_config(dict(config))
    tensors = tensors_of(folder)
    found = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        rule = settings.dynamic_get(module, default={})
        assert rule is not False, f"{module} is excluded"
        bits = rule.get("bits", settings.bits)
        parts = {key: tensors.pop(f"{module}.{key}") for key in ("qweight", "qzeros", "scales")}
        g_idx = tensors.pop(f"{module}.g_idx")
        linear = TorchLinear(
            bits=bits,
            group_size=rule.get("group_size", settings.group_size),
            sym=rule.get("sym", settings.sym),
            desc_act=rule.get("desc_act", settings.desc_act),
            in_features=len(g_idx),
            out_features=parts["scales"].shape[1],
        )
        for key, value in {**parts, "g_idx": g_idx}.items():
            assert getattr(linear, key).shape == value.shape, (module, key)
            setattr(linear, key, value)
        if settings.format == FORMAT.GPTQ:
            convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
        linear.post_init()
        found[f"{module}.weight"] = linear.dequantize_weight().T.float().contiguous()
    for name in tensors:
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight") or module.endswith((".gate", ".w1", ".w2", ".w3")):
            assert settings.dynamic_get(module, default={}) is False, f"{module} is not excluded"
    return tensors | found


def awq(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    """The vLLM project's reader of AutoAWQ checkpoints, into compressed-tensors and out of it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    converter = AutoAWQConverter.from_autoawq_config(config)
    tensors = tensors_of(folder)
    scales = {name: t for name, t in tensors.items() if name.endswith(".scales")}
    converter.validate(dict(tensors))
    if converter.group_size == -1:
        converter.group_size = None
    converted = converter.process(tensors)
    scheme = converter._build_quant_config().config_groups["config_group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name in scales:
        module = name.removesuffix(".scales")
        keys = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        state = {key: converted.pop(f"{module}.{key}") for key in keys}
        converted[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
    return converted


def fp8(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    """transformers' loader where its blocks divide the weights, else the library of vLLM."""
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
        FP8BlockDequantizer,
    )
    from transformers.quantizers.quantizers_utils import should_convert_module

    tensors = tensors_of(folder)
    for name in tensors:
        module = name.removesuffix(".weight")
        linear = name.endswith(".weight") and tensors[name].ndim == 2
        if linear and not module.endswith(("embed_tokens", "lm_head")):
            wanted = should_convert_module(module, config["modules_to_not_convert"])
            assert wanted == (f"{module}.weight_scale_inv" in tensors), module
    block = tuple(config["weight_block_size"])
    reader = FP8BlockDequantizer.from_pretrained(
        str(folder), weight_block_size=block, dtype=torch.float32
    )
    return reader.validate(tensors)


def linears_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the quantized linears of transformers' own model make of the unit vectors, and the rest.

    GPTQModel's linears stay packed, with the kernel that it chooses for this CPU.
    """
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    found = {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            with torch.inference_mode():
                weight = module(torch.eye(module.in_features, dtype=torch.float16)).T
            found[f"{name}.weight"] = weight.float()
    return found


def whole_model(folder: Path, config: dict) -> dict[str, torch.Tensor]:
    """The state dict of transformers' own model, dequantized while it loads."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    if config["quant_method"] in ("gptq", "awq"):
        return linears_of(folder)
    if config["quant_method"] == "fp8":
        how = FineGrainedFP8Config(dequantize=True)
    else:
        how = CompressedTensorsConfig(run_compressed=False)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=how, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return {name: t.clone() for name, t in model.state_dict().items()}


READERS = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
}


def main(folders: list[str]) -> None:
    """Write ``peer.safetensors`` (and ``model.peer.safetensors`` where the folder asks for it)."""
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        found = READERS[config["quant_method"]](folder, config)
        save_file({name: t.contiguous() for name, t in found.items()}, folder / "peer.safetensors")
        if (folder / "whole_model").exists():
            state = whole_model(folder, config)
            state = {name: t.contiguous() for name, t in state.items()}
            save_file(state, folder / "whole_model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
