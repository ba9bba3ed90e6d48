"""The checkpoint families: fields, their Hugging Face keys and values allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxquant.configs.base import QuantizationConfig
from jaxquant.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Fp8Config(QuantizationConfig):
    """FP8 weights, one scale a tensor or a block.

    Attributes:
        is_checkpoint_fp8_serialized: weights are stored as FP8.
        activation_scheme: "dynamic" or "static".
        ignored_layers: modules that are not quantized.
        weight_block_size: (out, in) elements to a scale; None for one scale a tensor.
    """

    methods = ("fp8",)
    keys: ClassVar = {
        "activation_scheme": ("activation_scheme",),
        "ignored_layers": ("ignored_layers", "modules_to_not_convert"),
        "weight_block_size": ("weight_block_size",),
    }
    is_checkpoint_fp8_serialized: bool = False
    activation_scheme: str = "dynamic"
    ignored_layers: list[str] | None = None
    weight_block_size: list[int] | None = None

    def __post_init__(self) -> None:
        self._flags("is_checkpoint_fp8_serialized")
        self._lists("ignored_layers")
        self._choice("activation_scheme", ("dynamic", "static"))
        self._block("is_checkpoint_fp8_serialized", required=False)

    @classmethod
    def _implied(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"is_checkpoint_fp8_serialized": "fp8" in str(config.get("quant_method", "fp8"))}


@dataclasses.dataclass(frozen=True)
class BlockInt8Config(QuantizationConfig):
    """INT8 weights, one scale a block.

    Attributes:
        is_checkpoint_int8_serialized: weights are stored as INT8.
        activation_scheme: "dynamic".
        ignored_layers: modules that are not quantized.
        weight_block_size: (out, in) elements to a scale, required.
    """

    methods = ("blockwise_int8",)
    keys: ClassVar = {
        "activation_scheme": ("activation_scheme",),
        "ignored_layers": ("ignored_layers",),
        "weight_block_size": ("weight_block_size",),
    }
    is_checkpoint_int8_serialized: bool = False
    activation_scheme: str = "dynamic"
    ignored_layers: list[str] | None = None
    weight_block_size: list[int] | None = None

    def __post_init__(self) -> None:
        self._flags("is_checkpoint_int8_serialized")
        self._lists("ignored_layers")
        self._choice("activation_scheme", ("dynamic",))
        self._block("is_checkpoint_int8_serialized", required=True)

    @classmethod
    def _implied(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"is_checkpoint_int8_serialized": True}


@dataclasses.dataclass(frozen=True)
class GPTQConfig(QuantizationConfig):
    """GPTQ codes along the inputs, in groups.

    Attributes:
        weight_bits: 2, 3, 4 or 8.
        group_size: inputs to a scale; -1 for all.
        desc_act: inputs were quantized in order of importance (act-order).
        lm_head_quantized: the output layer is quantized too.
        dynamic: pattern -> overrides of single modules, first match wins.
        sym: zero points are constant, in the middle of the codes.
        checkpoint_format: "gptq" stores zero points less one, "gptq_v2" as they are; also
            "gptq_p", "marlin" and "bitblas", other arrangements of the words.
    """

    methods = ("gptq", "gptq_marlin")
    keys: ClassVar = {
        "weight_bits": ("bits", "weight_bits"),
        "group_size": ("group_size",),
        "desc_act": ("desc_act",),
        "lm_head_quantized": ("lm_head",),
        "dynamic": ("dynamic",),
        "sym": ("sym",),
        "checkpoint_format": ("checkpoint_format", "format"),
    }
    weight_bits: int
    group_size: int
    desc_act: bool
    lm_head_quantized: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    sym: bool = True
    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        self._choice("weight_bits", (2, 3, 4, 8))
        self._group()
        self._flags("desc_act", "lm_head_quantized", "sym")
        self._choice("checkpoint_format", ("gptq", "gptq_v2", "gptq_p", "marlin", "bitblas"))
        rules = {} if self.dynamic is None else self.dynamic
        if not isinstance(rules, Mapping) or not all(
            isinstance(v, Mapping) for v in rules.values()
        ):
            raise ConfigError("dynamic", repr(rules)[:80], "pattern -> overrides")
        object.__setattr__(self, "dynamic", {key: dict(value) for key, value in rules.items()})

    @classmethod
    def _relevant(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        # Tools write null and "" for what they leave at its default.
        optional = ("sym", "lm_head", "checkpoint_format", "format")
        unset = {key for key in optional if config.get(key) in (None, "")}
        return {key: value for key, value in config.items() if key not in unset}


@dataclasses.dataclass(frozen=True)
class AWQConfig(QuantizationConfig):
    """AWQ 4-bit codes with zero points, in groups.

    Attributes:
        weight_bits: 4.
        group_size: inputs to a scale; -1 for all.
        zero_point: whether groups have zero points.
        modules_to_not_convert: parts of names of modules that are not quantized.
    """

    methods = ("awq", "awq_marlin")
    keys: ClassVar = {
        "weight_bits": ("bits", "w_bit", "weight_bits"),
        "group_size": ("group_size", "q_group_size"),
        "zero_point": ("zero_point",),
        "modules_to_not_convert": ("modules_to_not_convert",),
    }
    weight_bits: int
    group_size: int
    zero_point: bool
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self._choice("weight_bits", (4,))
        self._group()
        self._flags("zero_point")
        self._lists("modules_to_not_convert")


@dataclasses.dataclass(frozen=True)
class FbgemmFp8Config(QuantizationConfig):
    """FP8 weights, one scale an output channel, bounded dynamic activations.

    Attributes:
        activation_scale_ub: largest activation magnitude that a scale may represent.
        modules_to_not_convert: modules that are not quantized.
    """

    methods = ("fbgemm_fp8",)
    keys: ClassVar = {
        "activation_scale_ub": ("activation_scale_ub",),
        "modules_to_not_convert": ("modules_to_not_convert",),
    }
    activation_scale_ub: float = 1200.0
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.activation_scale_ub, int | float) or self.activation_scale_ub <= 0:
            raise ConfigError("activation_scale_ub", repr(self.activation_scale_ub), "positive")
        self._lists("modules_to_not_convert")


@dataclasses.dataclass(frozen=True)
class W8A8Int8Config(QuantizationConfig):
    """INT8 weights, one scale an output channel.

    Attributes:
        is_dynamic: activations are quantized at run time.
        ignore: modules that are not quantized.
    """

    methods = ("w8a8_int8",)
    keys: ClassVar = {"is_dynamic": ("is_dynamic",), "ignore": ("ignore",)}
    is_dynamic: bool = True
    ignore: list[str] | None = None

    def __post_init__(self) -> None:
        self._flags("is_dynamic")
        self._lists("ignore")


@dataclasses.dataclass(frozen=True)
class CompressedTensorsConfig(QuantizationConfig):
    """Groups of modules, each with its own weight and activation arguments.

    Attributes:
        config_groups: name -> targets, weights, input_activations, format; or preset -> targets.
        format: the arrangement of tensors, or "mixed-precision".
        ignore: names and ``re:`` patterns of modules that are not quantized.
        kv_cache_scheme: arguments of a quantized KV cache.
        quantization_status: "compressed" in a saved checkpoint.
        version: version of the library that wrote it.
    """

    methods = ("compressed_tensors",)
    keys: ClassVar = {
        name: (name,)
        for name in (
            "config_groups",
            "format",
            "ignore",
            "kv_cache_scheme",
            "quantization_status",
            "version",
        )
    }
    config_groups: dict[str, Any]
    format: str = "pack-quantized"
    ignore: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    quantization_status: str = "compressed"
    version: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.config_groups, Mapping) or not self.config_groups:
            raise ConfigError("config_groups", repr(self.config_groups)[:80], "at least one group")
        self._lists("ignore")

    def to_hf(self) -> dict[str, Any]:
        """The ``quantization_config`` in the library's spelling."""
        return super().to_hf() | {"quant_method": "compressed-tensors"}


@dataclasses.dataclass(frozen=True)
class ModelOptConfig(QuantizationConfig):
    """NVIDIA ModelOpt: one algorithm for all modules, or one a module.

    Attributes:
        quant_algo: "FP8", "NVFP4", "W4A16_AWQ", "MIXED_PRECISION" ...
        group_size: inputs to a scale, None where the algorithm fixes it.
        ignore: globs of modules that are not quantized.
        kv_cache_quant_algo: "FP8", "NVFP4" or None.
        quantized_layers: module -> algorithm, for "MIXED_PRECISION".
    """

    methods = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
    keys: ClassVar = {
        "quant_algo": ("quant_algo",),
        "group_size": ("group_size",),
        "ignore": ("ignore", "exclude_modules"),
        "kv_cache_quant_algo": ("kv_cache_quant_algo",),
        "quantized_layers": ("quantized_layers",),
    }
    quant_algo: str
    group_size: int | None = None
    ignore: list[str] | None = None
    kv_cache_quant_algo: str | None = None
    quantized_layers: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.quant_algo, str):
            raise ConfigError("quant_algo", repr(self.quant_algo), "the algorithm's name")
        self._lists("ignore")

    @classmethod
    def _relevant(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        # ``config_groups`` repeats the algorithm.
        return {key: value for key, value in config.items() if key != "config_groups"}
