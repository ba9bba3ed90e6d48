"""Synthetic modules of every format: raw tensors by the oracle, and the weight they stand for."""

import dataclasses
import json

import ml_dtypes
import numpy as np

from jaxquant.formats.base import DTYPES, RawModule, RawTensor
from tests.oracle.packing import (
    E2M1,
    awq_words,
    e4m3,
    fast_words,
    gptq_words,
    hqq_pack,
    marlin_scales,
    marlin_words,
    nibbles,
    padded,
    qserve_bytes,
    spread,
    stream,
    words,
)

PATH = "model.layers.0.mlp.down_proj"
BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
_NAMES = {
    np.dtype(getattr(ml_dtypes, n, n)): d
    for d, (n, _) in DTYPES.items()
    if not d.startswith(("F4", "F6_"))
}


@dataclasses.dataclass
class Case:
    """A module on disk and the weight that it stands for.

    Attributes:
        format: name of its format.
        config: the quantization_config.
        arrays: suffix -> array.
        weight: float64 ``[out, in]``.
        path: module path.
        model: config.json.
        exact: whether the float32 value is exact, and not only close.
        reversible: whether encoding gives the same bytes (a reciprocal may not).
    """

    format: str
    config: dict
    arrays: dict
    weight: np.ndarray
    path: str = PATH
    model: dict = dataclasses.field(default_factory=dict)
    exact: bool = True
    reversible: bool = True

    def module(self, **changes):
        """The module with some arrays replaced (None: removed), as a reader would hand it over."""
        arrays = {k: v for k, v in {**self.arrays, **changes}.items() if v is not None}
        return RawModule(
            self.path, {k: raw(f"{self.path}.{k}", v) for k, v in arrays.items()}, self.model
        )


def raw(name, array):
    """An array as an unread tensor."""
    dtype = _NAMES[array.dtype]
    return RawTensor(name, dtype, array.shape, "model.safetensors", lambda: array)


def rng(seed=0):
    return np.random.default_rng(seed)


def finite_bytes(shape, seed=0):
    """Random e4m3 bytes without NaN."""
    octets = rng(seed).integers(0, 256, shape).astype(np.uint8)
    return np.where(octets & 0x7F == 0x7F, np.uint8(0x38), octets)


def scales(shape, dtype=np.float32, seed=1):
    return rng(seed).uniform(0.01, 0.1, shape).astype(dtype)


def fp8(
    config, block, scale_shape, shape=(160, 192), suffix="weight_scale", dtype=np.float32, **more
):
    octets = finite_bytes(shape)
    if dtype in (np.uint8, E8M0):
        exponents = rng(1).integers(118, 126, scale_shape).astype(np.uint8)
        scale, value = exponents.view(dtype), 2.0 ** (exponents.astype(np.float64) - 127)
    else:
        scale = scales(scale_shape, dtype)
        value = scale.astype(np.float64)
    weight = e4m3(octets) * spread(value, block, shape)
    arrays = {"weight": octets.view(E4M3), suffix: scale, **more}
    return Case("fp8", config, arrays, weight)


def other_fp8(dtype, values):
    """fp8 of another alphabet; ``values(bytes)`` gives the finite bytes and their values."""
    octets, value = values(rng().integers(0, 256, (64, 96)).astype(np.uint8))
    arrays = {"weight": octets.view(dtype), "weight_scale": np.float32([0.25])}
    return Case("fp8", {"quant_method": "fp8"}, arrays, value * 0.25)


def _e5m2(octets):
    octets = np.where(octets & 0x7C == 0x7C, np.uint8(0x3C), octets)
    return octets, octets.view(ml_dtypes.float8_e5m2).astype(np.float64)


def _fnuz(octets):
    octets = np.where(octets == 0x80, np.uint8(0), octets)
    # Half of the fn value, except that the top mantissa is a number here.
    value = np.where(octets & 0x7F == 0x7F, np.where(octets >> 7, -240.0, 240.0), e4m3(octets) / 2)
    return octets, value


def int8(config, block, scale_shape, shape=(160, 192), suffix="weight_scale", fmt="int8", **more):
    codes = rng().integers(-128, 128, shape).astype(np.int8)
    scale = scales(scale_shape)
    zero = more.get("weight_zero_point")
    shifted = codes.astype(np.float64)
    if zero is not None:
        shifted = shifted - spread(zero, block, shape)
    weight = shifted * spread(scale, block, shape)
    return Case(fmt, config, {"weight": codes, suffix: scale, **more}, weight)


def gptq(
    bits, group=64, sym=True, version=1, act_order=False, shape=(64, 192), path=PATH, **config
):
    out, inputs = shape
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    codes = rng().integers(0, 1 << bits, shape)
    index = np.arange(inputs) // size
    if act_order:
        index = rng(3).permutation(index)
    zeros = np.full((groups, out), 1 << (bits - 1))
    if not sym:
        zeros = rng(2).integers(1, 1 << bits, (groups, out))
    scale = scales((groups, out), np.float16)
    weight = ((codes.T - zeros[index]) * scale.astype(np.float64)[index]).T
    arrays = {
        "qweight": gptq_words(codes, bits),
        "qzeros": words(zeros - (2 - version), bits),
        "scales": scale,
        "g_idx": index.astype(np.int32),
    }
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Case("gptq", settings | config, arrays, weight, path)


def awq(version, group=64, shape=(64, 192), zero_point=True):
    out, inputs = shape
    groups = 1 if group == -1 else inputs // group
    codes = rng().integers(0, 16, shape)
    zeros = rng(2).integers(0, 16, (out, groups)) if zero_point else np.full((out, groups), 8)
    scale = scales((out, groups), np.float16)
    block = (1, group if group != -1 else 0)
    weight = (codes - spread(zeros, block, shape)) * spread(scale, block, shape)
    width = -(-groups // 8) * 8 * {64: 2, 32: 4}.get(group, 1)
    pad = ((0, 0), (0, width - groups))
    exact = True
    if version == "gemm":
        arrays = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scale.T.copy()}
    elif version == "gemv":
        arrays = {
            "qweight": words(codes, 4),
            "qzeros": words(np.pad(zeros, pad), 4),
            "scales": np.pad(scale, pad),
        }
    else:
        offset = (-(zeros * scale.astype(np.float32))).astype(np.float16)
        weight = codes * spread(scale, block, shape) + spread(offset, block, shape)
        arrays = {
            "qweight": fast_words(codes),
            "qzeros": np.pad(offset, pad).T.copy(),
            "scales": np.pad(scale, pad).T.copy(),
        }
        exact = False
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version}
    return Case("awq", config | {"zero_point": zero_point}, arrays, weight, exact=exact)


def ct_config(weights, acts=None, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": acts}
    base = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return base | {"quantization_status": "compressed", "version": "0.19.0"} | more


def ct_packed(
    bits, group=64, sym=True, act_order=False, version="0.19.0", zp8=False, shape=(64, 192)
):
    out, inputs = shape
    how = stream if version >= "0.17" or 32 % bits == 0 else padded
    codes = rng().integers(0, 1 << bits, shape)
    groups = inputs // group if group else 1
    scale = scales((out, groups), BF16)
    middle = 1 << (bits - 1)
    zeros = np.full((out, groups), middle) if sym else rng(2).integers(0, 1 << bits, (out, groups))
    index = np.arange(inputs) // (group or inputs)
    arrays = {
        "weight_packed": words(codes, bits, how),
        "weight_scale": scale,
        "weight_shape": np.array(shape, np.int64),
    }
    if act_order:
        index = rng(3).permutation(index)
        arrays["weight_g_idx"] = index.astype(np.int32)
    if not sym:
        arrays["weight_zero_point"] = (
            (zeros - middle).astype(np.int8) if zp8 else words(zeros.T, bits, how).T.copy()
        )
    weight = (codes - zeros[:, index]) * scale.astype(np.float64)[:, index]
    weights = {"num_bits": bits, "type": "int", "symmetric": sym}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights |= {"actorder": "group"} if act_order else {}
    config = ct_config(weights, version=version, format="pack-quantized")
    return Case("compressed-tensors", config, arrays, weight)


def ct_scaled(weights, acts, block, scale_shape, **more):
    config = ct_config(weights, acts)
    if weights["type"] == "int":
        return int8(config, block, scale_shape, fmt="compressed-tensors", **more)
    case = fp8(config, block, scale_shape, **more)
    return dataclasses.replace(case, format="compressed-tensors")


def fp4(kind, shape=(64, 96)):
    """compressed-tensors NVFP4 (with a reciprocal tensor scale) and MXFP4."""
    codes = rng().integers(0, 16, shape)
    group = 16 if kind == "nvfp4" else 32
    arrays = {"weight_packed": nibbles(codes)}
    cells = (shape[0], shape[1] // group)
    args = {"num_bits": 4, "type": "float", "group_size": group, "strategy": "group"}
    if kind == "nvfp4":
        block = rng(1).integers(0x20, 0x70, cells).astype(np.uint8)
        top = np.float32([3000.5])
        arrays |= {"weight_scale": block.view(E4M3), "weight_global_scale": top}
        arrays["input_global_scale"] = np.float32([700.25])
        value = e4m3(block) / float(top[0])
        args["strategy"] = "tensor_group"
    else:
        block = rng(1).integers(118, 126, cells).astype(np.uint8)
        arrays["weight_scale"] = block
        value = 2.0 ** (block.astype(np.float64) - 127)
        args["scale_dtype"] = "torch.uint8"
    weight = E2M1[codes] * spread(value, (1, group), shape)
    dynamic = "local" if kind == "nvfp4" else True
    config = ct_config(args, args | {"dynamic": dynamic})
    exact = kind != "nvfp4"
    return Case("compressed-tensors", config, arrays, weight, exact=exact, reversible=exact)


def dense(dtype):
    weight = rng().normal(size=(64, 96)).astype(dtype)
    return Case("dense", {}, {"weight": weight}, weight.astype(np.float64))


def _fp8_cases():
    dynamic = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    static = {"quant_method": "fp8", "activation_scheme": "static"}
    blocks = dynamic | {"weight_block_size": [128, 128]}
    act = np.float32([0.125])
    qkv = {"num_attention_heads": 4, "num_key_value_heads": 2}
    parts = np.repeat([0.5, 0.25, 2.0], [80, 40, 40])
    fused = fp8(dynamic, (0, 0), ())
    fused.arrays["weight_scale"] = np.float32([0.5, 0.25, 2.0])
    fused.weight = e4m3(fused.arrays["weight"].view(np.uint8)) * parts[:, None]
    fused.path, fused.model = "model.layers.0.self_attn.qkv_proj", qkv
    square = fp8(blocks, (128, 128), (2, 2), (256, 256), "weight_scale_inv")
    return {
        "fp8-tensor": fp8(dynamic, (0, 0), ()),
        "fp8-tensor-static": fp8(static, (0, 0), (1,), input_scale=act),
        "fp8-transformers-static": fp8(
            static, (0, 0), (), suffix="weight_scale_inv", activation_scale=act.reshape(())
        ),
        "fp8-mistral": fp8(
            {"quant_method": "fp8"}, (0, 0), (), suffix="qscale_weight", qscale_act=act.reshape(())
        ),
        "fp8-channel": fp8({"quant_method": "w8a8_fp8"}, (1, 0), (160, 1)),
        "fp8-fbgemm": fp8({"quant_method": "fbgemm_fp8"}, (1, 0), (160, 1)),
        "fp8-block-partial": fp8(blocks, (128, 128), (2, 2), suffix="weight_scale_inv"),
        "fp8-block-square": square,
        "fp8-block-bf16": fp8(blocks, (128, 128), (2, 2), suffix="weight_scale_inv", dtype=BF16),
        "fp8-block-f16": fp8(
            blocks, (128, 128), (2, 2), suffix="weight_scale_inv", dtype=np.float16
        ),
        "fp8-block-64x32": fp8(
            dynamic | {"weight_block_size": [64, 32]}, (64, 32), (3, 6), suffix="weight_scale_inv"
        ),
        "fp8-block-ue8m0": fp8(
            blocks | {"scale_fmt": "ue8m0"},
            (128, 128),
            (2, 2),
            suffix="weight_scale_inv",
            dtype=np.uint8,
        ),
        "fp8-block-e8m0": fp8(blocks, (128, 128), (2, 2), suffix="scale", dtype=E8M0),
        "fp8-mxfp8": fp8({"quant_method": "mxfp8"}, (1, 32), (160, 6), dtype=np.uint8),
        "fp8-fused-qkv": fused,
        "fp8-e5m2": other_fp8(ml_dtypes.float8_e5m2, _e5m2),
        "fp8-fnuz": other_fp8(ml_dtypes.float8_e4m3fnuz, _fnuz),
    }


def _gptq_cases():
    cases = {
        f"gptq-{bits}b-v{version}-{'sym' if sym else 'asym'}": gptq(bits, 64, sym, version)
        for bits in (2, 3, 4, 8)
        for version in (1, 2)
        for sym in (True, False)
    }
    plain = gptq(4, 32, shape=(128, 128))
    del plain.arrays["g_idx"]
    bare = gptq(4, 32)
    del bare.arrays["qzeros"]
    wide = gptq(8, 64, dynamic={r"+:.*down_proj": {"bits": 8}})
    # The ones that GPTQModel subtracts have the width of the checkpoint, here 4 bits.
    wide.config["bits"] = 4
    wide.arrays["qzeros"] = wide.arrays["qzeros"] - np.int32(0x10101010)
    return cases | {
        "gptq-act-order": gptq(4, 64, act_order=True),
        "gptq-act-order-asym": gptq(4, 64, False, act_order=True),
        "gptq-act-order-3b": gptq(3, 32, act_order=True),
        "gptq-channel": gptq(4, -1),
        "gptq-short-group": gptq(4, 128),
        "gptq-square-no-index": plain,
        "gptq-no-zeros": bare,
        "gptq-lm-head": gptq(4, path="lm_head", lm_head=True),
        "gptq-dynamic-wide": wide,
    }


def _ct_cases():
    static = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    tokenf = token | {"type": "float"}
    channel = {"num_bits": 8, "type": "int", "strategy": "channel"}
    tensorf = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    act = np.float32([0.5]).astype(BF16)
    zero = rng(5).integers(-20, 20, (160, 1)).astype(np.int8)
    narrow = ct_scaled(
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
        tokenf,
        (1, 64),
        (160, 3),
    )
    narrow.arrays["weight"] = rng().integers(-8, 8, (160, 192)).astype(np.int8)
    narrow.weight = narrow.arrays["weight"] * spread(
        narrow.arrays["weight_scale"], (1, 64), (160, 192)
    )
    cases = {f"ct-packed-{bits}b": ct_packed(bits) for bits in range(2, 9)}
    cases |= {f"ct-packed-{bits}b-asym": ct_packed(bits, sym=False) for bits in range(2, 9)}
    cases |= {
        f"ct-packed-{b}b-padded": ct_packed(b, sym=False, version="0.16.0") for b in (3, 5, 6, 7)
    }
    return cases | {
        "ct-packed-channel": ct_packed(4, 0),
        "ct-packed-g32": ct_packed(4, 32),
        "ct-packed-square": ct_packed(4, 64, shape=(128, 128)),
        "ct-packed-odd-out": ct_packed(4, 64, False, shape=(61, 128)),
        "ct-packed-zp-int8": ct_packed(4, sym=False, zp8=True),
        "ct-packed-act-order": ct_packed(4, act_order=True),
        "ct-packed-act-order-asym": ct_packed(4, sym=False, act_order=True),
        "ct-int8-dynamic": ct_scaled(channel, token, (1, 0), (160, 1)),
        "ct-int8-static": ct_scaled(channel, static, (1, 0), (160, 1), input_scale=act),
        "ct-int8-static-asym": ct_scaled(
            channel,
            static | {"symmetric": False},
            (1, 0),
            (160, 1),
            input_scale=act,
            input_zero_point=np.int8([-7]),
        ),
        "ct-int8-asym-weight": ct_scaled(
            channel | {"symmetric": False}, token, (1, 0), (160, 1), weight_zero_point=zero
        ),
        "ct-int4-in-bytes": narrow,
        "ct-fp8-tensor-static": ct_scaled(
            tensorf, tensorf | {"dynamic": False}, (0, 0), (1,), input_scale=act
        ),
        "ct-fp8-channel": ct_scaled(tensorf | {"strategy": "channel"}, tokenf, (1, 0), (160, 1)),
        "ct-fp8-block": ct_scaled(
            tensorf | {"strategy": "block", "block_structure": [128, 128]},
            tokenf | {"strategy": "group", "group_size": 128},
            (128, 128),
            (2, 2),
        ),
        "ct-mxfp8": ct_scaled(
            tensorf | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            tokenf | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            (1, 32),
            (160, 6),
            dtype=np.uint8,
        ),
        "ct-nvfp4": fp4("nvfp4"),
        "ct-mxfp4": fp4("mxfp4"),
    }


def _modelopt_cases():
    def config(algorithm, **more):
        return {"quant_method": "modelopt", "quant_algo": algorithm} | more

    one, pre = np.float32(0.5), scales((192,), BF16, 7)
    plain = {
        "FP8": fp8({}, (0, 0), (), input_scale=one.reshape(())),
        "FP8_PER_CHANNEL_PER_TOKEN": fp8({}, (1, 0), (160,)),
        "FP8_PB_WO": fp8({}, (128, 128), (2, 1, 2, 1)),
        "MXFP8": fp8({}, (1, 32), (160, 6), dtype=np.uint8),
        "INT8_WO": int8({}, (1, 0), (160,)),
        "INT8_SQ": int8({}, (1, 0), (160,), input_scale=one.reshape(()), pre_quant_scale=pre),
    }
    cases = {
        f"modelopt-{name.lower()}": dataclasses.replace(
            case, format="modelopt", config=config(name)
        )
        for name, case in plain.items()
    }
    layers = {PATH: {"quant_algo": "FP8"}}
    cases["modelopt-mixed"] = dataclasses.replace(
        cases["modelopt-fp8"], config=config("MIXED_PRECISION", quantized_layers=layers)
    )
    for name in ("W4A16_AWQ", "W4A8_AWQ"):
        codes = rng().integers(-8, 8, (64, 192))
        nibble = (codes & 15).astype(np.uint8)
        scale = scales((64, 3))
        arrays = {"weight": nibble[0::2] | nibble[1::2] << 4, "weight_scale": scale}
        weight = codes * spread(scale, (1, 64), codes.shape)
        arrays["pre_quant_scale"] = pre
        if name == "W4A8_AWQ":
            arrays["weight_scale_2"] = np.asarray(
                np.float32(np.abs(weight).max()) / np.float32(448)
            )
            arrays["input_scale"] = np.asarray(one)
        cases[f"modelopt-{name.lower()}"] = Case("modelopt", config(name), arrays, weight)
    for name in ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "MXFP4"):
        case = fp4("mxfp4" if name == "MXFP4" else "nvfp4")
        arrays = {
            "weight": case.arrays["weight_packed"],
            "weight_scale": case.arrays["weight_scale"],
        }
        weight = case.weight
        if name != "MXFP4":
            top = np.float32(0.00037)
            arrays["weight_scale_2"] = np.asarray(top)
            weight = weight * 3000.5 * float(top)
        if name in ("NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8"):
            arrays["input_scale"] = np.asarray(one)
        if name == "NVFP4_AWQ":
            arrays["pre_quant_scale"] = scales((96,), BF16, 7)
        cases[f"modelopt-{name.lower()}"] = Case(
            "modelopt", config(name), arrays, weight, exact=name == "MXFP4"
        )
    return cases


NF4 = np.zeros(16, np.float32)
NF4[:8] = -1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0
NF4[8:] = 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1


def bnb4(nested, shape=(64, 192), block=64):
    codes = rng().integers(0, 16, shape)
    flat = codes.reshape(-1)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    count = flat.size // block
    arrays = {
        "weight": (flat[0::2] << 4 | flat[1::2]).astype(np.uint8).reshape(-1, 1),
        "weight.quant_map": NF4,
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        index = rng(1).integers(0, 256, count).astype(np.uint8)
        table, outer = np.linspace(-1, 1, 256, dtype=np.float32), np.float32([0.125])
        absmax = table[index].astype(np.float64) * 0.125 + 0.25
        arrays |= {
            "weight.absmax": index,
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
        }
    else:
        arrays["weight.absmax"] = scales((count,))
        absmax = arrays["weight.absmax"].astype(np.float64)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    arrays["weight.quant_state.bitsandbytes__nf4"] = text
    weight = (NF4.astype(np.float64)[flat].reshape(-1, block) * absmax[:, None]).reshape(shape)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return Case("bitsandbytes", config, arrays, weight, exact=False, reversible=not nested)


def bnb8():
    case = int8(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, (1, 0), (160,), suffix="SCB"
    )
    case.arrays["weight_format"] = np.zeros((), np.uint8)
    return dataclasses.replace(case, format="bitsandbytes", weight=case.weight / 127, exact=False)


def qserve(grouped, shape=(64, 256)):
    out, inputs = shape
    codes = rng().integers(0, 16, shape)
    scale = scales((out,), np.float16)
    arrays = {"qweight": qserve_bytes(codes), "s1_scales": scale}
    if not grouped:
        zero = (scale * np.float16(7)).astype(np.float16)
        arrays["s1_szeros"] = zero
        weight = codes * scale.astype(np.float64)[:, None] - zero.astype(np.float64)[:, None]
    else:
        second = rng(1).integers(1, 9, (out, inputs // 128))
        zero = rng(2).integers(0, 16, second.shape)
        column = [o // 32 * 32 + o % 8 * 4 + o % 32 // 8 for o in range(out)]
        for name, value in (("s2_scales", second), ("s2_zeros", -zero * second)):
            arrays[name] = np.zeros((inputs // 128, out), np.int8)
            arrays[name][:, column] = value.T
        shifted = codes - spread(zero, (1, 128), shape)
        weight = shifted * spread(second, (1, 128), shape) * scale.astype(np.float64)[:, None]
    config = {"quant_method": "qoq", "wbits": 4, "group_size": 128 if grouped else -1}
    return Case("qserve", config, arrays, weight, exact=grouped)


def gpt_oss(shape=(64, 96)):
    case = fp4("mxfp4", shape)
    arrays = {
        "blocks": case.arrays["weight_packed"].reshape(shape[0], shape[1] // 32, 16),
        "scales": case.arrays["weight_scale"],
    }
    path = "model.layers.0.mlp.experts.0.gate_proj"
    return Case("gpt-oss", {"quant_method": "mxfp4"}, arrays, case.weight, path)


def hqq(bits, shape=(64, 192), group=64):
    codes = rng().integers(0, 1 << bits, shape)
    scale = scales((codes.size // group, 1), np.float16)
    zero = rng(2).uniform(0, 1 << bits, scale.shape).astype(np.float16)
    weight = (
        (codes.reshape(-1, group) - zero.astype(np.float64)) * scale.astype(np.float64)
    ).reshape(shape)
    arrays = {"W_q": hqq_pack(codes.reshape(-1, group), bits), "scale": scale, "zero": zero}
    arrays["shape"] = np.array(shape, np.int64)
    params = {"nbits": bits, "group_size": group, "axis": 1}
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}
    return Case("hqq", config, arrays, weight, exact=False)


def _hqq_channel():
    """No group size: one scale for all inputs."""
    case = hqq(4, group=192)
    case.config["quant_config"]["weight_quant_params"]["group_size"] = None
    return case


def marlin(group, shape=(128, 256)):
    codes = rng().integers(0, 16, shape)
    scale = scales((shape[0], 1 if group == -1 else shape[1] // group), np.float16)
    weight = (codes - 8) * spread(scale, (1, 0 if group == -1 else group), shape)
    arrays = {
        "B": marlin_words(codes),
        "s": marlin_scales(scale),
        "workspace": np.zeros(16, np.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "is_marlin_format": True}
    return Case("marlin", config, arrays, weight)


def _other_cases():
    def renamed(case, fmt, config, names=()):
        arrays = {dict(names).get(k, k): v for k, v in case.arrays.items()}
        return dataclasses.replace(case, format=fmt, config=config, arrays=arrays)

    auto = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "data_type": "int"}
    qdata = (("weight", "_weight_qdata"), ("weight_scale", "_weight_scale"))
    torchao = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}},
    }
    static = {"dtype": "fp8_e4m3", "is_dynamic": False}
    quark = {
        "quant_method": "quark",
        "global_quant_config": {"weight": static, "input_tensors": static},
    }
    fp4_quark = {"weight": {"dtype": "fp4"}, "input_tensors": {"dtype": "fp4", "is_dynamic": True}}
    mx = fp4("mxfp4")
    int4 = rng().integers(-8, 8, (64, 256))
    scale = scales((64, 2))
    w4afp8 = Case(
        "fp8",
        {"quant_method": "w4afp8"},
        {
            "weight": nibbles((int4 & 15).astype(np.uint8)).view(np.int8),
            "weight_scale_inv": scale,
            "input_scale": np.float32([0.5]).astype(BF16),
        },
        int4 * spread(scale, (1, 128), int4.shape),
    )
    v4_scale = mx.arrays["weight_scale"].view(E8M0)
    v4 = {"weight": mx.arrays["weight_packed"].view(np.int8), "scale": v4_scale}
    packed = (("weight_packed", "weight"),)
    return {
        "bnb-nf4": bnb4(False),
        "bnb-nf4-nested": bnb4(True),
        "bnb-nf4-square": bnb4(False, (128, 128)),
        "bnb-int8": bnb8(),
        "qserve-channel": qserve(False),
        "qserve-group": qserve(True),
        "gpt-oss": gpt_oss(),
        **{f"hqq-{bits}b": hqq(bits) for bits in (1, 2, 3, 4, 8)},
        "hqq-channel": _hqq_channel(),
        "marlin-g128": marlin(128),
        "marlin-channel": marlin(-1),
        "auto-round-gptq": renamed(
            gptq(4, sym=False),
            "auto-round",
            auto | {"sym": False, "packing_format": "auto_round:auto_gptq"},
        ),
        "auto-round": renamed(
            gptq(4, sym=False, version=2),
            "auto-round",
            auto | {"sym": False, "packing_format": "auto_round"},
        ),
        "auto-round-awq": renamed(
            awq("gemm"),
            "auto-round",
            auto | {"sym": False, "packing_format": "auto_round:auto_awq"},
        ),
        "torchao-float8": renamed(fp8({}, (1, 0), (160, 1)), "torchao", torchao, qdata),
        "torchao-int8": renamed(int8({}, (1, 0), (160,)), "torchao", torchao, qdata),
        "quark-fp8": renamed(fp8({}, (0, 0), (), input_scale=np.float32([0.5])), "quark", quark),
        "quark-mxfp4": renamed(
            mx, "quark", {"quant_method": "quark", "global_quant_config": fp4_quark}, packed
        ),
        "fp8-w4afp8": w4afp8,
        "fp8-deepseek-v4-experts": dataclasses.replace(
            mx, format="fp8", config={"quant_method": "fp8", "expert_dtype": "fp4"}, arrays=v4
        ),
    }


def _cases():
    block8 = {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}
    return {
        "dense-bf16": dense(BF16),
        "dense-f16": dense(np.float16),
        "dense-f32": dense(np.float32),
        **_fp8_cases(),
        "int8-block": int8(block8, (128, 128), (2, 2), suffix="weight_scale_inv"),
        "int8-channel": int8({"quant_method": "w8a8_int8"}, (1, 0), (160, 1)),
        **_gptq_cases(),
        "awq-gemm": awq("gemm"),
        "awq-gemm-g32": awq("gemm", 32, (128, 128)),
        "awq-gemm-channel": awq("gemm", -1),
        "awq-gemm-symmetric": awq("gemm", zero_point=False),
        "awq-gemv": awq("gemv"),
        "awq-gemv-g128": awq("gemv", 128, (64, 256)),
        "awq-gemv-fast": awq("gemv_fast"),
        **_ct_cases(),
        **_modelopt_cases(),
        **_other_cases(),
    }


CASES = _cases()
