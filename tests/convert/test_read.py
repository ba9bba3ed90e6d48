"""The survey of a checkpoint: what each module is, and every contradiction it must not swallow."""

import dataclasses
import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jaxquant.arrays.codes import CODES
from jaxquant.convert import read_safetensors
from jaxquant.convert.read import kv_scales, modules, open_checkpoint, read_quantized, survey
from jaxquant.convert.read_kv import kv_cache_scheme
from jaxquant.errors import FormatError
from jaxquant.formats.base import FormatWarning
from jaxquant.transforms.numeric import dequantize
from tests.convert.writer import write_checkpoint
from tests.formats.cases import CASES, awq, ct_packed, fp8, gptq

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
DOWN = "model.layers.0.mlp.down_proj"


def named(case, path=DOWN):
    """A case's arrays under full names."""
    return {f"{path}.{suffix}": array for suffix, array in case.arrays.items()}


def write(folder, arrays, quant=None, shards=1, **model):
    config = {"quantization_config": quant, **model} if quant else model
    return write_checkpoint(folder, arrays, config, shards)


def contents(folder, *args, **kwargs):
    return survey(open_checkpoint(write(folder, *args, **kwargs)))


def refused(folder, *args, load=False, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FormatError) as caught:
            found = contents(folder, *args, **kwargs)
            if load:
                for module in found.modules.values():
                    module.load()
    return caught.value


def weights(*shape, dtype=BF16, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def value(module):
    return np.asarray(dequantize(module.load()))


def test_linears_and_the_rest_are_told_apart(tmp_path):
    case = CASES["fp8-block-partial"]
    arrays = named(case) | {
        "model.embed_tokens.weight": weights(96, 160),
        "model.norm.weight": weights(160),
        "lm_head.weight": weights(96, 160),
        "model.layers.0.mlp.gate.weight": weights(4, 160),
        "model.layers.0.mlp.gate.e_score_correction_bias": weights(4, dtype=np.float32),
        f"{DOWN}.bias": weights(160),
        "model.layers.0.conv1d.weight": weights(8, 1, 4),
    }
    found = contents(tmp_path, arrays, case.config)
    formats = {path: module.format.name for path, module in found.modules.items()}
    assert formats == {
        DOWN: "fp8",
        "lm_head": "dense",
        "model.layers.0.mlp.gate": "dense",
    }
    assert set(found.tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        f"{DOWN}.bias",
        "model.layers.0.conv1d.weight",
    }
    np.testing.assert_array_equal(value(found.modules[DOWN]), case.weight.astype(np.float32))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name", ["gptq-4b-v1-asym", "awq-gemm", "ct-packed-3b", "fp8-block-partial"]
)
def test_shards_change_nothing(name, shards, tmp_path):
    case = CASES[name]
    arrays = named(case) | {"lm_head.weight": weights(96, 192)}
    write(tmp_path, arrays, case.config, shards)
    got = read_quantized(tmp_path)
    assert set(got) == {DOWN, "lm_head"}
    np.testing.assert_allclose(np.asarray(dequantize(got[DOWN])), case.weight, rtol=1e-6)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("shape", [(128, 128), (128, 192), (192, 128)])
def test_acceptance_shapes(group, shape, tmp_path):
    for i, case in enumerate(
        (gptq(4, group, shape=shape), awq("gemm", group, shape), ct_packed(4, group, shape=shape))
    ):
        write(tmp_path / str(i), named(case), case.config)
        got = read_quantized(tmp_path / str(i))[DOWN]
        np.testing.assert_array_equal(np.asarray(dequantize(got)), case.weight.astype(np.float32))


def experts(count, skip=()):
    case = CASES["fp8-tensor"]
    arrays = {}
    for expert in range(count):
        for part in ("gate_proj", "up_proj", "down_proj"):
            if (expert, part) not in skip:
                arrays |= named(case, f"model.layers.0.mlp.experts.{expert}.{part}")
    return arrays, case.config


def test_six_experts_are_found(tmp_path):
    arrays, config = experts(6)
    assert len(contents(tmp_path, arrays, config, num_experts=6).modules) == 18


def test_missing_experts_are_listed(tmp_path):
    arrays, config = experts(6, {(2, "up_proj"), (4, "up_proj")})
    error = refused(tmp_path / "a", arrays, config)
    assert "up_proj: experts [2, 4] missing" in error.found and "gate_proj" not in error.found
    arrays, config = experts(6, {(2, "up_proj"), (0, "down_proj")})
    error = refused(tmp_path / "both", arrays, config)
    assert "up_proj: experts [2]" in error.found and "down_proj: experts [0]" in error.found
    arrays, config = experts(6)
    assert "[6, 7]" in refused(tmp_path / "b", arrays, config, num_local_experts=8).found
    assert "too many" in refused(tmp_path / "c", arrays, config, n_routed_experts=4).found


# ---- rows of the bad-input catalogue: a case, changes to its arrays, the field that must say it


def bad(case, where=None, load=True, **changes):
    arrays = {**case.arrays, **changes}
    return case, {k: v for k, v in arrays.items() if v is not None}, where, load


def scale_with(case, suffix, bad_value):
    changed = case.arrays[suffix].copy()
    changed.reshape(-1)[0] = bad_value
    return changed


BLOCK, TENSOR, G4 = CASES["fp8-block-partial"], CASES["fp8-tensor"], CASES["gptq-4b-v1-asym"]
CT4, NV, ASYM = CASES["ct-packed-4b"], CASES["ct-nvfp4"], CASES["ct-packed-4b-asym"]
NF4, GPT_OSS, QS = CASES["bnb-nf4"], CASES["gpt-oss"], CASES["qserve-group"]
ACT_ORDER = CASES["gptq-act-order"]
nan_byte = BLOCK.arrays["weight"].view(np.uint8).copy()
nan_byte[3, 5] = 0xFF
zero_scale = np.zeros((2, 2), np.float32)
wide = fp8(BLOCK.config, (128, 128), (3, 2), (300, 192), suffix="weight_scale_inv")

BAD = {
    "fp8 weight without scale": bad(TENSOR, "scale", weight_scale=None),
    "scale beside a 16-bit weight": bad(TENSOR, "dtype", weight=weights(160, 192)),
    "transposed scale grid": bad(wide, "[3, 2]", weight_scale_inv=np.ones((2, 3), np.float32)),
    "floor instead of ceil": bad(BLOCK, "[2, 2]", weight_scale_inv=np.ones((1, 1), np.float32)),
    "per-tensor scale with blocks": bad(BLOCK, "[2, 2]", weight_scale_inv=np.float32([1])),
    "two scales": bad(BLOCK, "both", weight_scale=np.float32([1])),
    "negative scale": bad(BLOCK, "-1", weight_scale_inv=scale_with(BLOCK, "weight_scale_inv", -1)),
    "NaN scale": bad(BLOCK, "nan", weight_scale_inv=scale_with(BLOCK, "weight_scale_inv", np.nan)),
    "infinite scale": bad(
        BLOCK, "inf", weight_scale_inv=scale_with(BLOCK, "weight_scale_inv", np.inf)
    ),
    "zero scale over codes": bad(BLOCK, "scale 0", weight_scale_inv=zero_scale),
    "integer scale": bad(BLOCK, "dtype I32", weight_scale_inv=np.ones((2, 2), np.int32)),
    "e8m0 NaN": bad(
        CASES["fp8-block-ue8m0"], "nan", weight_scale_inv=np.full((2, 2), 255, np.uint8)
    ),
    "NaN weight byte": bad(BLOCK, "0xFF", weight=nan_byte.view(E4M3)),
    "static without scale": bad(CASES["fp8-tensor-static"], "activation scale", input_scale=None),
    "static scale of zero": bad(
        CASES["fp8-tensor-static"], "0", input_scale=np.zeros(1, np.float32)
    ),
    "gptq without scales": bad(G4, "scales", scales=None),
    "gptq float qweight": bad(G4, "F32", qweight=G4.arrays["qweight"].astype(np.float32)),
    "gptq g_idx out of range": bad(G4, "group 3", g_idx=np.full(192, 3, np.int32)),
    "gptq g_idx negative": bad(G4, "group -1", g_idx=np.full(192, -1, np.int32)),
    "gptq g_idx float": bad(G4, "F32", g_idx=np.zeros(192, np.float32)),
    "gptq act-order without g_idx": bad(ACT_ORDER, "g_idx", g_idx=None),
    "gptq act-order g_idx of zeros": bad(ACT_ORDER, "all zero", g_idx=np.zeros(192, np.int32)),
    "gptq asymmetric without zeros": bad(G4, "qzeros", qzeros=None),
    "gptq NaN scale": bad(G4, "nan", scales=scale_with(G4, "scales", np.nan)),
    "ct asymmetric without zeros": bad(ASYM, "zero_point", weight_zero_point=None),
    "ct words of another width": bad(CT4, "words", weight_packed=np.zeros((64, 25), np.int32)),
    "ct shape of other rows": bad(CT4, "[65, 192]", weight_shape=np.array([65, 192])),
    "ct 16-bit weight beside scales": bad(
        CASES["ct-fp8-channel"], "dtype", weight=weights(160, 192)
    ),
    "ct int8 weight for a float config": bad(
        CASES["ct-fp8-channel"], "dtype I8", weight=np.ones((160, 192), np.int8)
    ),
    "ct narrow codes out of range": bad(
        CASES["ct-int4-in-bytes"], "codes", weight=np.full((160, 192), 9, np.int8)
    ),
    "ct act-order without index": bad(
        CASES["ct-packed-act-order"], "weight_g_idx", weight_g_idx=None
    ),
    "nvfp4 padded scales": bad(NV, "swizzled", weight_scale=np.ones((128, 8), E4M3)),
    "nvfp4 multiplier under the reciprocal's name": bad(
        NV, "weight_global_scale", weight_global_scale=np.float32([0.001])
    ),
    "nvfp4 both tensor scales": bad(NV, "weight_scale_2", weight_scale_2=np.float32([0.001])),
    "mxfp4 with float scales": bad(
        CASES["ct-mxfp4"], "dtype", weight_scale=np.ones((64, 3), np.float32)
    ),
    "mxfp4 with e4m3 scales": bad(
        CASES["ct-mxfp4"], "weight_scale", weight_scale=np.ones((64, 3), E4M3)
    ),
    "e5m2 weight for an e4m3 config": bad(
        dataclasses.replace(BLOCK, config=BLOCK.config | {"fmt": "e4m3"}),
        "fmt",
        weight=np.ones(BLOCK.arrays["weight"].shape, ml_dtypes.float8_e5m2),
    ),
    "gpt-oss blocks of another width": bad(GPT_OSS, "16", blocks=np.zeros((64, 6, 8), np.uint8)),
    "gpt-oss scales of another shape": bad(GPT_OSS, "[64, 3]", scales=np.zeros((64, 6), np.uint8)),
    "qserve second level beyond int8": bad(
        QS,
        "fits int8",
        s2_scales=np.full((2, 64), 120, np.int8),
        s2_zeros=np.zeros((2, 64), np.int8),
    ),
    "qserve both kinds of zeros": bad(QS, "both", s1_szeros=np.ones(64, np.float16)),
    "bnb without state": bad(NF4, "state", **{"weight.quant_state.bitsandbytes__nf4": None}),
    "bnb state of another size": bad(NF4, "bytes", weight=np.zeros((10, 1), np.uint8)),
    "bnb tiled int8": bad(CASES["bnb-int8"], "row-major", weight_format=np.uint8(2)),
    "awq bad arrangement": bad(CASES["awq-gemm"], "gemv", qweight=np.zeros((7, 7), np.int32)),
    "awq without zeros": bad(CASES["awq-gemm"], "qzeros", qzeros=None),
    "modelopt reciprocal name": bad(
        CASES["modelopt-nvfp4"], "weight_scale_2", weight_global_scale=np.float32([5])
    ),
    "hqq float view": bad(CASES["hqq-4b"], "view_as_float", W_q=np.zeros((96, 64), np.float16)),
    "torchao int4": bad(
        CASES["torchao-int8"], "Int4Tensor", _weight_zero_point=np.zeros((3, 160), np.float32)
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_catalogue_of_bad_modules(name, tmp_path):
    case, arrays, said, load = BAD[name]
    full = {f"{case.path}.{suffix}": array for suffix, array in arrays.items()}
    error = refused(tmp_path, full, case.config, load=load)
    assert "model.safetensors" in error.where
    assert case.path in error.where
    assert said is None or said in str(error)


CONFIG_ERRORS = {
    "unknown method": ({"quant_method": "aqlm"}, "quant_method"),
    "SmoothQuant of torch-int": ({"quant_method": "smoothquant"}, "quant_method"),
    "fmt contradicts dtype": (BLOCK.config | {"fmt": "e5m2"}, "fmt"),
    "block of one": (BLOCK.config | {"weight_block_size": [128]}, "weight_block_size"),
    "block of zero": (BLOCK.config | {"weight_block_size": [0, 128]}, "weight_block_size"),
    "ignore list no list": (BLOCK.config | {"ignored_layers": 5}, "ignored_layers"),
    "endless pattern": (BLOCK.config | {"modules_to_not_convert": ["(a+)+x"]}, "pattern"),
    "broken pattern": (BLOCK.config | {"modules_to_not_convert": ["(a"]}, "pattern"),
    "long pattern": (BLOCK.config | {"modules_to_not_convert": ["x?" * 2000]}, "pattern"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_bad_configs_are_named(name, tmp_path):
    config, said = CONFIG_ERRORS[name]
    assert said in str(refused(tmp_path, named(BLOCK), config))


GPTQ_ERRORS = {
    "wrong bits": ({"bits": 8}, "4 bits"),
    "bits as text": ({"bits": "4"}, "integer"),
    "bits missing": ({"bits": None}, "integer"),
    "boolean bits": ({"bits": True}, "integer"),
    "group size of zero": ({"group_size": 0}, "group_size"),
    "other group size": ({"group_size": 128}, "groups"),
    "bitblas": ({"checkpoint_format": "bitblas"}, "checkpoint_format"),
    "planar": ({"checkpoint_format": "gptq_p"}, "checkpoint_format"),
    "odd words": ({"pack_dtype": "int16"}, "pack_dtype"),
}


@pytest.mark.parametrize("name", GPTQ_ERRORS)
def test_bad_gptq_configs(name, tmp_path):
    change, said = GPTQ_ERRORS[name]
    assert said in str(refused(tmp_path, named(G4), G4.config | change))


CT_ERRORS = {
    "no groups": ({"config_groups": {}}, "config_groups"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "rotated": ({"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
    "unknown preset": ({"config_groups": {"W9A9": ["Linear"]}}, "preset"),
    "no target matches": (
        {"config_groups": {"g": {"targets": ["re:nothing"], "weights": {"num_bits": 4}}}},
        "does not mean",
    ),
    "bad strategy": (
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "row"}}}},
        "strategy",
    ),
}


@pytest.mark.parametrize("name", CT_ERRORS)
def test_bad_compressed_tensors_configs(name, tmp_path):
    change, said = CT_ERRORS[name]
    assert said in str(refused(tmp_path, named(CT4), CT4.config | change))


def test_zeros_that_contradict_the_version_are_trusted(tmp_path):
    case = CASES["gptq-4b-v2-sym"]
    with pytest.warns(FormatWarning, match="v2"):
        found = contents(tmp_path, named(case), case.config | {"checkpoint_format": "gptq"})
    np.testing.assert_array_equal(value(found.modules[DOWN]), case.weight.astype(np.float32))


def test_symmetric_files_with_varying_zeros_keep_them(tmp_path):
    with pytest.warns(FormatWarning, match="vary"):
        found = contents(tmp_path, named(G4), G4.config | {"sym": True})
    np.testing.assert_array_equal(value(found.modules[DOWN]), G4.weight.astype(np.float32))


def test_act_order_is_seen_without_being_declared(tmp_path):
    found = contents(tmp_path, named(ACT_ORDER), ACT_ORDER.config | {"desc_act": False})
    assert found.modules[DOWN].load().perm is not None
    np.testing.assert_array_equal(value(found.modules[DOWN]), ACT_ORDER.weight.astype(np.float32))


def test_groups_of_unequal_size_keep_a_scale_for_every_input(tmp_path):
    case = gptq(4, 64)
    index = np.repeat([0, 1, 2], [100, 60, 32]).astype(np.int32)
    scale = case.arrays["scales"].astype(np.float64)
    codes = np.asarray(dequantize(load_one(tmp_path / "a", case))) / np.repeat(scale, 64, axis=0).T
    case.arrays["g_idx"] = index
    got = np.asarray(dequantize(load_one(tmp_path / "b", case)))
    np.testing.assert_allclose(got, codes * scale[index].T, rtol=1e-6)


def load_one(folder, case):
    write(folder, named(case), case.config)
    return read_quantized(folder)[DOWN]


def test_int64_group_index_is_accepted(tmp_path):
    case = gptq(4, act_order=True)
    case.arrays["g_idx"] = case.arrays["g_idx"].astype(np.int64)
    np.testing.assert_array_equal(
        np.asarray(dequantize(load_one(tmp_path, case))), case.weight.astype(np.float32)
    )


def test_placeholder_group_indices_are_ignored(tmp_path):
    case = ct_packed(4)
    case.arrays["weight_g_idx"] = np.full(192, -1, np.int32)
    assert load_one(tmp_path / "ct", case).perm is None
    case = gptq(4)
    case.arrays["g_idx"] = np.zeros(192, np.int32)
    assert load_one(tmp_path / "gptq", case).perm is None


def test_awq_shapes_win_over_the_declared_version(tmp_path):
    case = awq("gemv", shape=(128, 128))
    with pytest.warns(FormatWarning, match="gemv"):
        found = contents(tmp_path, named(case), case.config | {"version": "GEMM"})
    np.testing.assert_array_equal(value(found.modules[DOWN]), case.weight.astype(np.float32))


def test_unset_zeros_of_symmetric_awq_mean_eight(tmp_path):
    case = awq("gemm", zero_point=False)
    case.arrays["qzeros"] = np.zeros_like(case.arrays["qzeros"])
    with pytest.warns(FormatWarning, match="8 is used"):
        found = contents(tmp_path, named(case), case.config)
    np.testing.assert_array_equal(value(found.modules[DOWN]), case.weight.astype(np.float32))


def test_packed_shape_may_be_derived(tmp_path):
    case = ct_packed(4)
    del case.arrays["weight_shape"]
    np.testing.assert_array_equal(
        np.asarray(dequantize(load_one(tmp_path, case))), case.weight.astype(np.float32)
    )


def test_weights_that_were_never_compressed_are_read_as_they_are(tmp_path):
    case = CASES["ct-fp8-channel"]
    plain = weights(160, 192)
    arrays = named(case) | {f"{DOWN}.weight": plain}
    config = case.config | {"quantization_status": "frozen"}
    with pytest.warns(FormatWarning, match="frozen"):
        found = contents(tmp_path, arrays, config)
    assert found.modules[DOWN].format.name == "dense"
    assert f"{DOWN}.weight_scale" in found.tensors


@pytest.mark.parametrize("says", [{"sym": True}, {"zero_point": False}])
def test_symmetric_awq_with_unset_zero_points_is_centred(says, tmp_path):
    """GPTQModel's AWQ files say ``sym``; exporters of symmetric weights left qzeros at 0."""
    case = CASES["awq-gemm-symmetric"]
    config = {key: v for key, v in case.config.items() if key != "zero_point"} | says
    arrays = named(case) | {f"{DOWN}.qzeros": np.zeros_like(case.arrays["qzeros"])}
    with pytest.warns(FormatWarning, match="symmetric"):
        found = contents(tmp_path, arrays, config)
    np.testing.assert_array_equal(value(found.modules[DOWN]), case.weight.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq-4b-v1-sym", {"provider": "auto-round"}),
        ("awq-gemm-symmetric", {"provider": "auto-round"}),
        ("auto-round", {}),
        ("auto-round-awq", {}),
    ],
)
def test_scales_of_auto_round_have_either_sign(name, config, tmp_path):
    case = CASES[name]
    arrays = named(case) | {f"{DOWN}.scales": -case.arrays["scales"]}
    found = contents(tmp_path, arrays, case.config | config)
    np.testing.assert_array_equal(value(found.modules[DOWN]), -case.weight.astype(np.float32))


def test_bits_of_single_modules_of_auto_round(tmp_path):
    case = CASES["auto-round"]
    arrays = named(case) | {"lm_head.weight": weights(96, 192)}

    def extra(bits):
        return case.config | {"extra_config": {DOWN: {"bits": bits}, "lm_head": {"bits": 16}}}

    found = contents(tmp_path / "a", arrays, extra(None))
    np.testing.assert_array_equal(value(found.modules[DOWN]), case.weight.astype(np.float32))
    assert "extra_config" in str(refused(tmp_path / "b", arrays, extra("4")))


# ---- ignore lists


def test_an_empty_list_of_hqq_skips_nothing(tmp_path):
    case = CASES["hqq-4b"]
    found = contents(tmp_path / "a", named(case, "lm_head"), case.config | {"skip_modules": []})
    assert found.modules["lm_head"].format.name == "hqq"
    assert "ignores it" in str(refused(tmp_path / "b", named(case, "lm_head"), case.config))


def test_an_unquantized_weight_is_used_with_a_warning(tmp_path):
    arrays = named(TENSOR) | {"model.layers.0.mlp.up_proj.weight": weights(64, 64)}
    with pytest.warns(FormatWarning, match="up_proj"):
        found = contents(tmp_path, arrays, TENSOR.config)
    assert found.modules["model.layers.0.mlp.up_proj"].format.name == "dense"


def test_exponents_of_an_early_mxfp4_writer_are_reported(tmp_path):
    case = CASES["ct-mxfp4"]
    with pytest.warns(FormatWarning, match="another rule"):
        old = contents(tmp_path / "old", named(case), case.config | {"version": "0.13.1"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = contents(tmp_path / "new", named(case), case.config | {"version": "0.19.0"})
    np.testing.assert_array_equal(value(old.modules[DOWN]), value(new.modules[DOWN]))


def test_ignored_and_quantized_is_a_contradiction(tmp_path):
    error = refused(tmp_path, named(TENSOR), TENSOR.config | {"ignored_layers": [DOWN]})
    assert DOWN in error.where
    assert "ignores" in error.rule


def test_an_ignore_list_that_matches_nothing_is_reported(tmp_path):
    config = TENSOR.config | {"ignored_layers": ["language_model.decoder.0.mlp"]}
    with pytest.warns(FormatWarning, match="no entry of the ignore list"):
        contents(tmp_path, named(TENSOR), config)


UP = "model.layers.1.mlp.up_proj"
IGNORES = {
    "fp8 component": (TENSOR, {"ignored_layers": ["mlp.up_proj"]}, True),
    "fp8 without root": (TENSOR, {"ignored_layers": ["layers.1.mlp.up_proj"]}, True),
    "fp8 other root": (TENSOR, {"ignored_layers": ["language_model.model.layers.1.mlp"]}, False),
    "fp8 part of a component": (TENSOR, {"ignored_layers": ["mlp.up"]}, False),
    "fp8 fused name": (TENSOR, {"ignored_layers": ["model.layers.1.mlp.gate_up_proj"]}, True),
    "fp8 regex": (TENSOR, {"modules_to_not_convert": [r"model\.layers\.\d+\.mlp\.up_proj"]}, True),
    "fp8 suffix": (TENSOR, {"modules_to_not_convert": ["up_proj"]}, True),
    "awq substring": (CASES["awq-gemm"], {"modules_to_not_convert": ["p_pro"]}, True),
    "awq other": (CASES["awq-gemm"], {"modules_to_not_convert": ["gate"]}, False),
    "ct exact": (CT4, {"ignore": [UP]}, True),
    "ct prefix is not exact": (CT4, {"ignore": ["model.layers.1"]}, False),
    "ct regex": (CT4, {"ignore": ["re:.*up_proj"]}, True),
    "ct regex anchored": (CT4, {"ignore": ["re:up_proj"]}, False),
    "modelopt glob": (CASES["modelopt-fp8"], {"ignore": ["model.layers.1*"]}, True),
    "modelopt bare": (CASES["modelopt-fp8"], {"ignore": ["model.layers.1"]}, True),
    "modelopt other layer": (CASES["modelopt-fp8"], {"ignore": ["model.layers.10*"]}, False),
    "gptq dynamic": (CASES["gptq-4b-v1-sym"], {"dynamic": {r"-:.*\.up_proj": {}}}, True),
    "gptq first rule wins": (
        CASES["gptq-4b-v1-sym"],
        {"dynamic": {r"+:.*layers\.1.*": {"bits": 4}, r"-:.*\.up_proj": {}}},
        False,
    ),
    "bnb component": (CASES["bnb-int8"], {"llm_int8_skip_modules": ["up_proj"]}, True),
}


@pytest.mark.parametrize("name", IGNORES)
def test_ignore_rules_of_each_family(name, tmp_path):
    """Ignored: no complaint about the plain weight.  Not ignored: a warning that names it."""
    case, change, ignored = IGNORES[name]
    arrays = named(case) | {f"{UP}.weight": weights(64, 64)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FormatWarning)
        found = contents(tmp_path, arrays, case.config | change)
    assert found.modules[UP].format.name == "dense"
    complained = any("plain 16-bit" in str(w.message) for w in caught)
    assert complained != ignored


@pytest.mark.parametrize("entry", ["gate", "mlp.gate", "layers.0.mlp.gate"])
def test_an_awq_entry_of_a_router_leaves_gate_projections_alone(entry, tmp_path):
    """AutoAWQ matches substrings, transformers components: the file shows which wrote it."""
    case, config = CASES["awq-gemm"], {"modules_to_not_convert": [entry]}
    gate, router = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate"
    both = named(case, gate) | {f"{router}.weight": weights(8, 192)}
    found = contents(tmp_path / "router", both, case.config | config)
    assert found.modules[gate].format.name == "awq"
    # Without the router, or with quantized codes of its own, nothing says what was meant.
    error = refused(tmp_path / "alone", named(case, gate), case.config | config)
    assert repr(entry) in error.rule and "names no unquantized module" in error.rule
    both |= named(case, "model.layers.1.mlp.gate")
    if entry != "layers.0.mlp.gate":
        error = refused(tmp_path / "own", both, case.config | config)
        assert "model.layers.1.mlp.gate" in error.where and "whole" not in error.rule


def test_groups_of_several_schemes(tmp_path):
    attention, mlp = CASES["ct-fp8-channel"], ct_packed(4)
    groups = {
        "a": attention.config["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]},
        "b": mlp.config["config_groups"]["group_0"] | {"targets": [DOWN]},
    }
    config = mlp.config | {"config_groups": groups, "format": "mixed-precision"}
    q_proj = "model.layers.0.self_attn.q_proj"
    found = contents(tmp_path, named(mlp) | named(attention, q_proj), config)
    assert found.modules[DOWN].layout.code == CODES["int4"]
    assert found.modules[q_proj].layout.code == CODES["e4m3"]
    assert found.modules[q_proj].spec.act is not None
    np.testing.assert_array_equal(value(found.modules[q_proj]), attention.weight.astype(np.float32))


def test_presets_as_group_names(tmp_path):
    case = ct_packed(4, 128, shape=(64, 256))
    config = case.config | {"config_groups": {"W4A8": ["Linear"]}}
    found = contents(tmp_path, named(case), config)
    act = found.modules[DOWN].spec.act
    assert act is not None
    assert (act.code.name, act.levels) == ("int8", 127.5)


def test_the_preset_of_mxfp4_with_fp8_activations(tmp_path):
    case = CASES["ct-mxfp4"]
    config = case.config | {"config_groups": {"MXFP4XFP8": ["Linear"]}}
    act = contents(tmp_path, named(case), config).modules[DOWN].spec.act
    assert act is not None
    assert (act.code.name, act.group_size) == ("e4m3", 128)


@pytest.mark.parametrize(
    ("name", "preset"), [("ct-mxfp4", "W4A16"), ("ct-mxfp4", "NVFP4A16"), ("ct-nvfp4", "MXFP4")]
)
def test_the_config_agrees_with_packed_floats(name, preset, tmp_path):
    case = CASES[name]
    config = case.config | {"config_groups": {preset: ["Linear"]}}
    assert "in groups of" in str(refused(tmp_path, named(case), config))


def test_tied_embeddings_leave_no_lm_head(tmp_path):
    arrays = named(TENSOR) | {"model.embed_tokens.weight": weights(96, 160)}
    found = contents(tmp_path, arrays, TENSOR.config, tie_word_embeddings=True)
    assert list(found.modules) == [DOWN]


def test_rows_of_k_proj_must_be_the_configs_heads(tmp_path):
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    path = "model.layers.0.self_attn.k_proj"
    good = {f"{path}.weight": weights(64, 128)}
    contents(tmp_path / "a", good, None, hidden_size=128, **config)
    error = refused(tmp_path / "b", good, None, hidden_size=256, **config)
    assert path in error.where


@pytest.mark.parametrize(
    "path,listed",
    [
        ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv_proj"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up_proj"),
        ("model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
        ("model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts"),
    ],
)
def test_layers_of_modelopt_go_by_several_names(path, listed, tmp_path):
    case = CASES["modelopt-fp8"]
    config = case.config | {"quant_algo": "MIXED_PRECISION"}
    # An exact name goes before one of several modules.
    for layers in (
        {listed: {"quant_algo": "FP8"}},
        {listed: {"quant_algo": "NVFP4"}, path: {"quant_algo": "FP8"}},
    ):
        folder = tmp_path / str(len(layers))
        found = contents(folder, named(case, path), config | {"quantized_layers": layers})
        assert found.modules[path].layout.code == CODES["e4m3"]
    other = config | {"quantized_layers": {"model.layers.0.mlp": {"quant_algo": "FP8"}}}
    assert "targets" in refused(tmp_path / "other", named(case, path), other).action


@pytest.mark.parametrize("kind", ["fp8", "fp4", "mxfp8", "mixed"])
def test_methods_of_modelopt(kind, tmp_path):
    case = CASES["modelopt-fp8"]
    found = contents(tmp_path, named(case), case.config | {"quant_method": f"modelopt_{kind}"})
    assert found.modules[DOWN].format.name == "modelopt"


def test_quantized_tensors_need_a_config(tmp_path):
    assert "quantization_config" in str(refused(tmp_path, named(TENSOR)))


# ---- stacked experts


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_vl_moe", "gpt_oss"])
def test_stacked_experts_are_read_one_by_one(kind, tmp_path):
    gate, up, down = weights(3, 8, 8, seed=1), weights(3, 8, 8, seed=2), weights(3, 8, 8, seed=3)
    if kind == "gpt_oss":
        fused = np.stack([gate, up], axis=2).reshape(3, 16, 8)
    else:
        fused = np.concatenate([gate, up], axis=1)
    turn = kind != "qwen3_moe"
    stem = "model.layers.0.mlp.experts"
    arrays = {
        f"{stem}.gate_up_proj": fused.swapaxes(1, 2).copy() if turn else fused,
        f"{stem}.down_proj": down.swapaxes(1, 2).copy() if turn else down,
    }
    found = contents(tmp_path, arrays, None, model_type=kind, num_experts=3)
    assert len(found.modules) == 9
    for expert in range(3):
        for part, want in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            got = value(found.modules[f"{stem}.{expert}.{part}"])
            np.testing.assert_array_equal(got, want[expert].astype(np.float32))


def test_stacked_fp8_experts_take_their_own_scales(tmp_path):
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    one = fp8(config, (128, 128), (4, 1), (512, 128), suffix="weight_scale_inv")
    stem = "model.layers.0.mlp.experts"
    arrays = {
        f"{stem}.gate_up_proj": np.stack([one.arrays["weight"]] * 2),
        f"{stem}.gate_up_proj_scale_inv": np.stack([one.arrays["weight_scale_inv"]] * 2),
    }
    found = contents(tmp_path, arrays, config, model_type="qwen3_moe", num_experts=2)
    want = one.weight.astype(np.float32)
    np.testing.assert_array_equal(value(found.modules[f"{stem}.1.gate_proj"]), want[:256])
    np.testing.assert_array_equal(value(found.modules[f"{stem}.0.up_proj"]), want[256:])


def test_gpt_oss_blocks_are_cut_into_gate_and_up(tmp_path):
    case = CASES["gpt-oss"]
    stem = "model.layers.0.mlp.experts"
    arrays = {
        f"{stem}.gate_up_proj_blocks": case.arrays["blocks"][None],
        f"{stem}.gate_up_proj_scales": case.arrays["scales"][None],
        f"{stem}.gate_up_proj_bias": weights(1, 64),
    }
    found = contents(tmp_path, arrays, case.config, model_type="gpt_oss")
    want = case.weight.astype(np.float32)
    np.testing.assert_array_equal(value(found.modules[f"{stem}.0.gate_proj"]), want[0::2])
    np.testing.assert_array_equal(value(found.modules[f"{stem}.0.up_proj"]), want[1::2])
    assert len(found.tensors) == 2


STEM = "model.layers.0.mlp.experts"


def packed_stack(sym=True, rows=64):
    """Two experts as compressed-tensors packs a weight of rank 3, and what each is worth."""
    case = ct_packed(4, sym=sym, shape=(rows, 192))
    arrays = {k: np.stack([v, v[::-1]]) for k, v in case.arrays.items() if k != "weight_shape"}
    if not sym:
        # Words of zero points are not rows: their order within a word would change.
        arrays["weight_zero_point"] = np.stack([case.arrays["weight_zero_point"]] * 2)
        arrays["weight_packed"] = np.stack([case.arrays["weight_packed"]] * 2)
        arrays["weight_scale"] = np.stack([case.arrays["weight_scale"]] * 2)
    return case, arrays | {"weight_shape": np.array([2, rows, 192], np.int64)}


@pytest.mark.parametrize("shape", [3, 2, 0])
def test_stacks_of_packed_weights_are_read_one_by_one(shape, tmp_path):
    case, stack = packed_stack()
    stack["weight_shape"] = stack["weight_shape"][-shape:]
    if not shape:
        del stack["weight_shape"]
    parts = ("gate_up_proj", "down_proj")
    arrays = {f"{STEM}.{part}.{suffix}": a for part in parts for suffix, a in stack.items()}
    found = contents(tmp_path, arrays, case.config, num_experts=2)
    want = case.weight.astype(np.float32)
    for path, part in (("0.gate_proj", want[:32]), ("0.up_proj", want[32:]), ("0.down_proj", want)):
        np.testing.assert_array_equal(value(found.modules[f"{STEM}.{path}"]), part)
    np.testing.assert_array_equal(value(found.modules[f"{STEM}.1.gate_proj"]), want[::-1][:32])
    assert len(found.modules) == 6 and not found.tensors


@pytest.mark.parametrize("target", [f"{STEM}.gate_up_proj", r"re:.*\.experts\.gate_up_proj$"])
def test_targets_name_stacks_of_experts(target, tmp_path):
    case, stack = packed_stack()
    group = case.config["config_groups"]["group_0"] | {"targets": [target]}
    arrays = {f"{STEM}.gate_up_proj.{suffix}": a for suffix, a in stack.items()}
    arrays[f"{STEM}.down_proj"] = weights(2, 192, 32)
    config = case.config | {"config_groups": {"group_0": group}}
    found = contents(tmp_path, arrays, config, num_experts=2).modules
    assert found[f"{STEM}.1.up_proj"].layout.code == CODES["int4"]
    # And so do lists of what is ignored.
    config["config_groups"]["group_0"] = group | {"targets": ["Linear"]}
    contents(tmp_path / "ignored", arrays, config | {"ignore": [f"{STEM}.down_proj"]})
    error = refused(tmp_path / "both", arrays, config | {"ignore": [target]})
    assert "gate_proj" in error.where and repr(target) in error.rule


def test_packed_zero_points_of_a_stack(tmp_path):
    case, stack = packed_stack(sym=False)
    arrays = {f"{STEM}.gate_up_proj.{suffix}": a for suffix, a in stack.items()}
    found = contents(tmp_path / "whole", arrays, case.config)
    np.testing.assert_array_equal(
        value(found.modules[f"{STEM}.1.up_proj"]), case.weight[32:].astype(np.float32)
    )
    case, stack = packed_stack(sym=False, rows=24)
    arrays = {f"{STEM}.gate_up_proj.{suffix}": a for suffix, a in stack.items()}
    error = refused(tmp_path / "shared", arrays, case.config)
    assert "weight_zero_point" in error.where and "words of their own" in error.rule


@pytest.mark.parametrize("wrong", [[2, 32, 192], [3, 64, 192], [2, 2, 64, 192]])
def test_a_shape_that_is_not_the_stacks_is_refused(wrong, tmp_path):
    case, stack = packed_stack()
    arrays = {f"{STEM}.gate_up_proj.{suffix}": a for suffix, a in stack.items()}
    arrays[f"{STEM}.gate_up_proj.weight_shape"] = np.array(wrong, np.int64)
    assert "weight_shape" in refused(tmp_path, arrays, case.config).where


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_vl_moe_text", "qwen3_moe"])
def test_block_scales_of_a_stack_lie_as_its_weight(kind, turned, tmp_path):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    up = fp8(config, (64, 64), (4, 1), (256, 64), suffix="weight_scale_inv")
    down = fp8(config, (64, 64), (1, 2), (64, 128), suffix="weight_scale_inv")
    stored = kind != "qwen3_moe"
    arrays = {}
    for part, case in (("gate_up_proj", up), ("down_proj", down)):
        for tail, suffix, turns in (
            ("", "weight", stored),
            # Without doubt about the shape, scales may lie the other way round.
            ("_scale_inv", "weight_scale_inv", stored and turned),
        ):
            stack = np.stack([case.arrays[suffix]] * 2)
            arrays[f"{STEM}.{part}{tail}"] = stack.swapaxes(1, 2).copy() if turns else stack
    found = contents(tmp_path, arrays, config, model_type=kind, num_experts=2).modules
    want = up.weight.astype(np.float32)
    np.testing.assert_array_equal(value(found[f"{STEM}.1.gate_proj"]), want[:128])
    np.testing.assert_array_equal(value(found[f"{STEM}.0.up_proj"]), want[128:])
    want = down.weight.astype(np.float32)
    np.testing.assert_array_equal(value(found[f"{STEM}.1.down_proj"]), want)


@pytest.mark.parametrize("bad_scale", [None, 0.0, np.inf])
def test_cold_experts_take_the_scale_of_the_others(bad_scale, tmp_path):
    arrays, config = experts(3)
    for expert in range(3):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{part}.input_scale"
            arrays[name] = np.float32([0.1 * (expert + 1)])
    cold = "model.layers.0.mlp.experts.1.up_proj"
    if bad_scale is None:
        del arrays[f"{cold}.input_scale"]
    else:
        arrays[f"{cold}.input_scale"] = np.float32([bad_scale])
    config = config | {"activation_scheme": "static"}
    with pytest.warns(FormatWarning, match="1 experts"):
        found = contents(tmp_path, arrays, config)
    assert found.modules[cold].load().act_scale[0, 0] == np.float32(0.3)


def test_an_expert_of_16_bits_is_not_cold(tmp_path):
    arrays, config = experts(3)
    arrays |= {f"{p.removesuffix('.weight')}.input_scale": np.float32([0.1]) for p in [*arrays]}
    dense = "model.layers.0.mlp.experts.1.up_proj"
    arrays = {k: v for k, v in arrays.items() if not k.startswith(dense)}
    arrays[f"{dense}.weight"] = weights(96, 160)
    with pytest.warns(FormatWarning, match="plain 16-bit weights"):
        found = contents(tmp_path, arrays, config | {"activation_scheme": "static"})
    assert found.modules[dense].format.name == "dense"
    claimed = {t.name for module in found.modules.values() for t in module.raw.values()}
    assert not claimed & set(found.tensors)


def test_an_expert_of_a_stack_is_read_alone(tmp_path, monkeypatch):
    stack = weights(3, 1024, 1024)
    advised = []
    monkeypatch.setattr(
        read_safetensors, "advise", lambda octets, advice: advised.append(octets.size)
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = contents(tmp_path, {name: stack}).modules
    for path, rows in (("1.gate_proj", slice(0, 512)), ("2.up_proj", slice(512, None))):
        module = found[f"model.layers.0.mlp.experts.{path}"]
        want = stack[int(path[0]), rows].astype(np.float32)
        np.testing.assert_array_equal(value(module), want)
        module.raw["weight"].release()
    assert advised == [stack[0].nbytes] * 4


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1)])
def test_one_scale_an_expert_is_that_of_gate_and_up(shape, tmp_path):
    """ModelOpt exports them with or without axes of size 1."""
    case, stem = CASES["modelopt-fp8"], "model.layers.0.mlp.experts"
    arrays = {f"{stem}.gate_up_proj": np.stack([case.arrays["weight"]] * 2)}
    for suffix in ("weight_scale", "input_scale"):
        arrays[f"{stem}.gate_up_proj_{suffix}"] = np.float32([0.5, 2]).reshape(shape)
    found = contents(tmp_path, arrays, case.config)
    q = found.modules[f"{stem}.1.up_proj"].load()
    assert (q.scales[0].item(), q.act_scale.item()) == (2, 2)
    assert found.modules[f"{stem}.0.gate_proj"].load().scales[0].item() == 0.5


# ---- KV cache scales

ATTN = "model.layers.0.self_attn"
KV_NAMES = {
    "compressed-tensors": (f"{ATTN}.k_scale", f"{ATTN}.v_scale"),
    "modelopt": (f"{ATTN}.k_proj.k_scale", f"{ATTN}.v_proj.v_scale"),
    "fused": (f"{ATTN}.qkv_proj.k_scale", f"{ATTN}.qkv_proj.v_scale"),
    "quark": (f"{ATTN}.k_proj.output_scale", f"{ATTN}.v_proj.output_scale"),
    "cache modules": (f"{ATTN}.k_cache.scale", f"{ATTN}.v_cache.scale"),
}


@pytest.mark.parametrize("name", KV_NAMES)
def test_kv_scales_are_found_under_every_name(name, tmp_path):
    k, v = KV_NAMES[name]
    arrays = named(TENSOR) | {k: np.float32([0.25]), v: np.asarray(np.float32(0.5))}
    checkpoint = open_checkpoint(write(tmp_path, arrays, TENSOR.config))
    scales = kv_scales(checkpoint)[ATTN]
    assert (scales.k, scales.v, scales.q) == (np.float32(0.25), np.float32(0.5), None)
    assert {k, v} <= set(survey(checkpoint).tensors)


def test_one_kv_scale_serves_both(tmp_path):
    arrays = {f"{ATTN}.kv_scale": np.float32([0.25])}
    scales = kv_scales(open_checkpoint(write(tmp_path / "a", arrays)))[ATTN]
    assert scales.k == scales.v == np.float32(0.25)
    arrays = {f"{ATTN}.v_scale": np.float32([0.25])}
    with pytest.warns(FormatWarning, match="both"):
        assert kv_scales(open_checkpoint(write(tmp_path / "b", arrays)))[ATTN].k == 0.25
    arrays = {f"{ATTN}.kv_scale_quant_orig": np.float16([0.25, 0.5])}
    assert kv_scales(open_checkpoint(write(tmp_path / "c", arrays)))[ATTN].v == 0.5


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e6])
def test_implausible_kv_scales_are_refused(scale, tmp_path):
    arrays = {f"{ATTN}.k_scale": np.float32([scale]), f"{ATTN}.v_scale": np.float32([1])}
    with pytest.raises(FormatError) as caught:
        kv_scales(open_checkpoint(write(tmp_path, arrays)))
    assert f"{ATTN}.k_scale" in caught.value.where


def test_the_kv_cache_scheme_is_kept(tmp_path):
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    for i, (config, want) in enumerate(
        (
            (CT4.config | {"kv_cache_scheme": scheme}, "fp8"),
            (
                {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
                "fp8",
            ),
            (CT4.config, None),
        )
    ):
        folder = write(tmp_path / str(i), {"a": weights(2)}, config)
        assert kv_cache_scheme(open_checkpoint(folder)) == want
    config = CT4.config | {"kv_cache_scheme": scheme | {"num_bits": 2}}
    with pytest.raises(FormatError, match="kv_cache_scheme"):
        kv_cache_scheme(open_checkpoint(write(tmp_path / "bad", {"a": weights(2)}, config)))


SIDE = {"model_type": "llama", "kv_cache": {"dtype": "float8_e4m3fn"}}


def side_scales(folder, factors, **changes):
    """KV scales of two layers, the factors in kv_cache_scales.json."""
    arrays = {f"model.layers.{i}.self_attn.q_proj.weight": weights(2) for i in range(2)}
    write(folder, arrays | changes.pop("arrays", {}))
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    cache = {"dtype": "float8_e4m3fn", "scaling_factor": factors} | changes
    (folder / "kv_cache_scales.json").write_text(json.dumps(SIDE | {"kv_cache": cache}))
    return kv_scales(open_checkpoint(folder))


def test_kv_scales_of_a_side_file(tmp_path):
    scales = side_scales(tmp_path / "one", {"0": {"1": 0.5, "0": 0.25}})
    assert [float(scales[f"model.layers.{i}.self_attn"].k) for i in range(2)] == [0.25, 0.5]
    assert float(scales["model.layers.1.self_attn"].v) == 0.5
    same = side_scales(tmp_path / "same", {str(r): {"0": 0.25, "1": 0.5} for r in range(8)})
    assert same == scales
    # Ranks hold heads in order.
    ranks = side_scales(tmp_path / "two", {"0": {"0": 1, "1": 2}, "1": {"0": 3, "1": 4}})
    assert ranks["model.layers.1.self_attn"].k.shape == (4, 1, 1)
    assert ranks["model.layers.1.self_attn"].v.ravel().tolist() == [2, 2, 4, 4]


@pytest.mark.parametrize(
    "factors,changes,said",
    [
        ({"0": {"0": 0.5}}, {}, "1 layers"),
        ({"0": {"0": 0.5, "1": 0.5, "2": 0.5}}, {}, "3 layers"),
        ({"0": {"0": 0.5, "1": 0}}, {}, "between 0"),
        ({"0": {"0": 0.5, "1": "0.5"}}, {}, "between 0"),
        ({"0": {"0": 0.5, "7": 0.5}}, {}, "keys"),
        ({}, {}, "scaling_factor"),
        ({"0": {"0": 0.5, "1": 0.5}}, {"dtype": "float8_e5m2"}, "float8_e5m2"),
        ({str(r): {"0": 0.5, "1": r + 1.0} for r in range(3)}, {}, "3 ranks"),
        ({"0": {"0": 0.5, "1": 0.5}}, {"arrays": {f"{ATTN}.k_scale": np.float32(1)}}, "tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore::jaxquant.formats.base.FormatWarning")
def test_a_side_file_of_kv_scales_that_does_not_fit_is_refused(factors, changes, said, tmp_path):
    with pytest.raises(FormatError, match=said) as caught:
        side_scales(tmp_path, factors, **changes)
    assert "kv_cache_scales.json" in caught.value.where


def test_mistral_params_describe_the_quantization(tmp_path):
    case = CASES["fp8-mistral"]
    arrays = named(case, "layers.0.attention.wq")
    write(tmp_path, arrays)
    (tmp_path / "params.json").write_text(
        json.dumps({"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}})
    )
    found = modules(open_checkpoint(tmp_path))["layers.0.attention.wq"]
    assert found.spec.act is not None
    assert not found.spec.act.dynamic
    np.testing.assert_array_equal(value(found), case.weight.astype(np.float32))
