"""One frozen config per checkpoint family, with exactly that family's fields.

Each reads Hugging Face's ``quantization_config`` with :meth:`from_hf` and writes it with
:meth:`to_hf`.  A field of another family is a ``TypeError`` that names the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxquant.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Base of all families.

    Attributes:
        methods: ``quant_method`` strings of the family, the one that is written first.
        keys: field -> its Hugging Face keys, the one that is written first.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        own = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in own:
                owners = [
                    family.__name__
                    for family in FAMILIES
                    if name in {field.name for field in dataclasses.fields(family)}
                ]
                hint = f"; it is a field of {', '.join(owners)}" if owners else ""
                raise TypeError(f"{cls.__name__} has no field {name!r}{hint}; its fields: {own}")
        return super().__new__(cls)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``quantization_config`` of this family.

        Keys that only describe how the file was made are left out.

        Raises:
            ConfigError: another family's config, or a key or value that is not valid here.
        """
        method = str(config.get("quant_method") or cls.methods[0]).lower().replace("-", "_")
        if method not in cls.methods:
            raise ConfigError(
                "quant_method", repr(config["quant_method"]), f"{cls.__name__} reads {cls.methods}"
            )
        known = {key for names in cls.keys.values() for key in names}
        foreign = sorted((set(config) & _WIDTH_KEYS) - known)
        if foreign:
            raise ConfigError(
                f"quantization_config: {foreign[0]}", "not a key of this family", str(sorted(known))
            )
        fields: dict[str, Any] = {}
        for field, names in cls.keys.items():
            present = [name for name in names if name in config]
            if not present:
                continue
            values = [config[name] for name in present if config[name] is not None]
            lists = values and all(isinstance(value, list | tuple) for value in values)
            if lists and len(values) > 1:
                fields[field] = list(dict.fromkeys(entry for value in values for entry in value))
            else:
                fields[field] = values[0] if values else None
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(fields))
        if missing:
            raise ConfigError(
                f"quantization_config: {cls.keys[missing[0]][0]}",
                "absent",
                "the checkpoint says it",
            )
        return cls(**fields, **cls._implied(config))

    @classmethod
    def _implied(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that follow from the config as a whole."""
        return {}

    def to_hf(self) -> dict[str, Any]:
        """The ``quantization_config`` that :meth:`from_hf` reads back to an equal config."""
        written = {names[0]: getattr(self, field) for field, names in self.keys.items()}
        return {"quant_method": self.methods[0], **written}

    def _lists(self, *names: str) -> None:
        """None becomes an empty list; anything but a list of strings is refused."""
        for name in names:
            value = getattr(self, name)
            value = [] if value is None else value
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise ConfigError(name, repr(value)[:80], "a list of module names")
            object.__setattr__(self, name, list(value))

    def _choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or value not in allowed:
            raise ConfigError(name, repr(value), f"one of {', '.join(map(repr, allowed))}")

    def _flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, repr(getattr(self, name)), "True or False")

    def _group(self) -> None:
        size = getattr(self, "group_size", None)
        if type(size) is not int or (size != -1 and (size < 8 or size % 8)):
            raise ConfigError("group_size", repr(size), "-1 or a positive multiple of 8")

    def _block(self, serialized: str, required: bool) -> None:
        block = getattr(self, "weight_block_size", None)
        if block is None and not required:
            return
        if (
            not isinstance(block, list | tuple)
            or len(block) != 2
            or any(type(n) is not int or n < 1 for n in block)
        ):
            raise ConfigError("weight_block_size", repr(block)[:80], "two positive integers")
        if not getattr(self, serialized):
            raise ConfigError(
                "weight_block_size",
                f"{list(block)} with {serialized}=False",
                "weights in blocks come from a serialized checkpoint",
                f"set {serialized}=True",
            )
        if getattr(self, "activation_scheme", "dynamic") != "dynamic":
            raise ConfigError(
                "activation_scheme",
                repr(getattr(self, "activation_scheme", None)),
                "weights in blocks have dynamic activations",
            )
        object.__setattr__(self, "weight_block_size", list(block))


_WIDTH_KEYS = {"bits", "w_bit", "wbits", "weight_block_size", "config_groups", "load_in_4bit"}
"""Keys that say how a weight is stored: one that its family does not have contradicts it."""


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
    """

    methods = ("gptq", "gptq_marlin")
    keys: ClassVar = {
        "weight_bits": ("bits", "weight_bits"),
        "group_size": ("group_size",),
        "desc_act": ("desc_act",),
        "lm_head_quantized": ("lm_head",),
        "dynamic": ("dynamic",),
    }
    weight_bits: int
    group_size: int
    desc_act: bool
    lm_head_quantized: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self._choice("weight_bits", (2, 3, 4, 8))
        self._group()
        self._flags("desc_act", "lm_head_quantized")
        rules = {} if self.dynamic is None else self.dynamic
        if not isinstance(rules, Mapping) or not all(
            isinstance(v, Mapping) for v in rules.values()
        ):
            raise ConfigError("dynamic", repr(rules)[:80], "pattern -> overrides")
        object.__setattr__(self, "dynamic", {key: dict(value) for key, value in rules.items()})


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

    methods = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed")
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
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read the ``quantization_config``, whose ``config_groups`` repeat the algorithm."""
        return super().from_hf({k: v for k, v in config.items() if k != "config_groups"})


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
