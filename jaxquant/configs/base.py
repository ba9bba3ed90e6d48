"""What the configs of all checkpoint families share: Hugging Face keys, and checks of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxquant.errors import ConfigError

_WIDTH_KEYS = {"bits", "w_bit", "wbits", "weight_block_size", "config_groups", "load_in_4bit"}
"""Keys that say how a weight is stored: one that its family does not have contradicts it."""


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
                    for family in QuantizationConfig.__subclasses__()
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
        if not isinstance(config, Mapping):
            raise ConfigError("quantization_config", type(config).__name__, "an object is needed")
        config = cls._relevant(config)
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
    def _relevant(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config without keys that say nothing."""
        return config

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
