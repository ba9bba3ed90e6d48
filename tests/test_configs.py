"""Each family's config: its own fields, checked at once, read from and written to HF dicts."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from jaxquant.configs import (
    FAMILIES,
    AWQConfig,
    BlockInt8Config,
    CompressedTensorsConfig,
    FbgemmFp8Config,
    Fp8Config,
    GPTQConfig,
    ModelOptConfig,
    W8A8Int8Config,
    config_from_hf,
)
from jaxquant.convert.read import open_checkpoint, survey
from jaxquant.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
CORPUS = os.environ.get("JAXQUANT_CORPUS")
BLOCK = [128, 128]
EXAMPLES = [
    Fp8Config(True, "static", ["lm_head"]),
    Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[64, 128]),
    BlockInt8Config(True, weight_block_size=BLOCK),
    GPTQConfig(4, 128, True),
    GPTQConfig(8, -1, False, True, {"-:.*gate": {}}),
    GPTQConfig(4, 32, False, sym=False, checkpoint_format="gptq_v2"),
    AWQConfig(4, 64, True, ["gate"]),
    FbgemmFp8Config(600.0, ["lm_head"]),
    W8A8Int8Config(True, ["lm_head"]),
    CompressedTensorsConfig({"W4A16": ["Linear"]}, ignore=["re:.*gate"]),
    ModelOptConfig("NVFP4", 16, ["*lm_head*"]),
]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: type(c).__name__)
def test_hf_dicts_round_trip(config):
    written = config.to_hf()
    assert type(config).from_hf(written) == config
    assert config_from_hf(written) == config


def test_every_family_has_an_example():
    assert {type(config) for config in EXAMPLES} == set(FAMILIES)


@pytest.mark.parametrize(
    "family,field,owner",
    [
        (Fp8Config, "weight_bits", "GPTQConfig"),
        (Fp8Config, "is_checkpoint_int8_serialized", "BlockInt8Config"),
        (AWQConfig, "desc_act", "GPTQConfig"),
        (GPTQConfig, "zero_point", "AWQConfig"),
        (GPTQConfig, "weight_block_size", "Fp8Config"),
        (BlockInt8Config, "group_size", "AWQConfig"),
    ],
)
def test_a_foreign_field_names_its_family(family, field, owner):
    with pytest.raises(TypeError, match=f"{field}.*{owner}"):
        family(**{field: 4})


def test_an_unknown_field_lists_the_known_ones():
    with pytest.raises(TypeError, match="weight_block_size") as caught:
        Fp8Config(blocksize=128)
    assert "is a field of" not in str(caught.value)


def test_defaults():
    config = Fp8Config()
    assert dataclasses.asdict(config) == {
        "is_checkpoint_fp8_serialized": False,
        "activation_scheme": "dynamic",
        "ignored_layers": [],
        "weight_block_size": None,
    }
    assert AWQConfig(4, 128, True).modules_to_not_convert == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.activation_scheme = "static"


@pytest.mark.parametrize(
    "build",
    [
        lambda: Fp8Config(weight_block_size=BLOCK),
        lambda: Fp8Config(True, "static", weight_block_size=BLOCK),
        lambda: Fp8Config(True, weight_block_size=[128]),
        lambda: Fp8Config(True, weight_block_size=[128, 0]),
        lambda: Fp8Config(True, weight_block_size=[128, 128.0]),
        lambda: Fp8Config(activation_scheme="sometimes"),
        lambda: Fp8Config(ignored_layers="lm_head"),
        lambda: Fp8Config(is_checkpoint_fp8_serialized=1),
        lambda: BlockInt8Config(True),
        lambda: BlockInt8Config(weight_block_size=BLOCK),
        lambda: BlockInt8Config(True, "static", weight_block_size=BLOCK),
        lambda: GPTQConfig(5, 128, False),
        lambda: GPTQConfig(True, 128, False),
        lambda: GPTQConfig(4, 0, False),
        lambda: GPTQConfig(4, 12, False),
        lambda: GPTQConfig(4, -2, False),
        lambda: GPTQConfig(4, 128, "yes"),
        lambda: GPTQConfig(4, 128, False, dynamic={"a": 4}),
        lambda: GPTQConfig(4, 128, False, sym="no"),
        lambda: GPTQConfig(4, 128, False, checkpoint_format="gptq_v3"),
        lambda: AWQConfig(8, 128, True),
        lambda: AWQConfig(4, 128, None),
        lambda: FbgemmFp8Config(-1.0),
        lambda: CompressedTensorsConfig({}),
        lambda: ModelOptConfig(None),
    ],
)
def test_bad_values_are_refused_at_construction(build):
    with pytest.raises(ConfigError):
        build()


def test_reading_real_dicts():
    config = GPTQConfig.from_hf(
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    )
    assert config == GPTQConfig(4, 128, False)
    # What the tools write for a default.
    unset = {"sym": None, "lm_head": None, "checkpoint_format": "", "format": None, "dynamic": None}
    assert GPTQConfig.from_hf({"bits": 4, "group_size": 128, "desc_act": False} | unset) == config
    second = dataclasses.replace(config, sym=False, checkpoint_format="gptq_v2")
    written = {"bits": 4, "group_size": 128, "desc_act": False, "sym": False}
    for key in ("checkpoint_format", "format"):
        assert GPTQConfig.from_hf(written | {key: "gptq_v2"}) == second
    assert second.to_hf().items() >= (written | {"checkpoint_format": "gptq_v2"}).items()
    config = Fp8Config.from_hf(
        {
            "quant_method": "fp8",
            "ignored_layers": ["a"],
            "modules_to_not_convert": ["b", "a"],
            "weight_block_size": BLOCK,
        }
    )
    assert config == Fp8Config(True, "dynamic", ["a", "b"], BLOCK)
    assert AWQConfig.from_hf(
        {"w_bit": 4, "q_group_size": 128, "zero_point": True, "modules_to_not_convert": None}
    ) == AWQConfig(4, 128, True)


@pytest.mark.parametrize(
    "family,config,said",
    [
        (Fp8Config, {"quant_method": "gptq"}, "quant_method"),
        (Fp8Config, {"quant_method": "fp8", "bits": 4}, "bits"),
        (GPTQConfig, {"quant_method": "gptq", "group_size": 128, "desc_act": False}, "bits"),
        (GPTQConfig, {"bits": 4, "group_size": 64, "desc_act": True, "w_bit": 4}, "w_bit"),
        (BlockInt8Config, {"quant_method": "blockwise_int8"}, "weight_block_size"),
    ],
)
def test_bad_dicts_are_named(family, config, said):
    with pytest.raises(ConfigError) as caught:
        family.from_hf(config)
    assert said in caught.value.where


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_dict_is_refused(family):
    with pytest.raises(ConfigError, match="an object is needed"):
        family.from_hf(["gptq"])


def real_configs(root):
    """The folders whose quantization one of the families describes."""
    methods = {method for family in FAMILIES for method in family.methods}
    for folder in sorted(Path(root).glob("*/config.json")) if root else ():
        config = json.loads(folder.read_text()).get("quantization_config") or {}
        if str(config.get("quant_method")).replace("-", "_") in methods:
            yield folder.parent


def check_config(folder):
    checkpoint = open_checkpoint(folder)
    read = config_from_hf(checkpoint.quant_config)
    written = read.to_hf()
    assert config_from_hf(written) == read
    own, again = (
        survey(c).modules
        for c in (checkpoint, dataclasses.replace(checkpoint, quant_config=written))
    )
    assert {name: m.spec for name, m in again.items()} == {name: m.spec for name, m in own.items()}


@pytest.mark.parametrize("folder", [*real_configs(GOLDEN)], ids=lambda p: p.name)
def test_a_written_config_describes_the_same_weights(folder):
    check_config(folder)


@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS, reason="JAXQUANT_CORPUS is not set")
@pytest.mark.parametrize("folder", [*real_configs(CORPUS)], ids=lambda p: p.name)
def test_a_written_config_describes_the_corpus(folder):
    check_config(folder)


def test_an_unknown_method_is_named():
    with pytest.raises(ConfigError, match="aqlm"):
        config_from_hf({"quant_method": "aqlm"})
