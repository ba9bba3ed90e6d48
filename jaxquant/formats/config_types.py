"""Types of the keys of a ``quantization_config``, whichever family it is of.

A text where a flag should be would otherwise be taken for true by one reader and for false by
another.  null is as good as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.errors import FormatError

_FLAGS = (
    "desc_act",
    "is_dynamic",
    "is_marlin_format",
    "load_in_4bit",
    "load_in_8bit",
    "static_groups",
    "sym",
    "symmetric",
    "zero_point",
)
_TEXTS = (
    "_type",
    "activation_scheme",
    "checkpoint_format",
    "dtype",
    "fmt",
    "format",
    "kv_cache_quant_algo",
    "pack_dtype",
    "packing_format",
    "quant_algo",
    "quant_method",
    "quantization_status",
    "scale_dtype",
    "scale_fmt",
    "strategy",
    "type",
    "version",
)
_WHOLE = ("bits", "num_bits", "w_bit", "wbits", "group_size", "q_group_size", "weight_bits")
_OBJECTS = ("input_activations", "input_tensors", "output_activations", "weights")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_FLAGS, ((bool,), "true or false")),
    **dict.fromkeys(_TEXTS, ((str,), "a text")),
    **dict.fromkeys(_WHOLE, ((int, float), "an integer")),
    **dict.fromkeys(_OBJECTS, ((dict,), "an object")),
    "actorder": ((bool, str), "a text, true or false"),
    "quant_type": ((str, dict), "a text or an object"),
}
# Objects whose keys are those of the format, not names of modules.
_INNER = ("default", "global_quant_config", "quant_type", "quantization", "weight", *_OBJECTS)


def check_types(config: Mapping[str, Any], where: str = "quantization_config") -> None:
    """Refuse a value of another type than its key has in every family.

    Raises:
        FormatError: names the key.
    """
    for key, value in config.items():
        allowed, rule = _KINDS.get(key, ((), ""))
        # bool is an int to Python, but not here.
        if allowed and value is not None and type(value) not in allowed:
            raise FormatError(f"{where}: {key}", repr(value)[:80], rule)
        if key in _INNER and isinstance(value, Mapping):
            check_types(value, f"{where}: {key}")
        if key == "config_groups" and isinstance(value, Mapping):
            for name, group in value.items():
                if isinstance(group, Mapping):
                    check_types(group, f"{where}: {key}.{name[:80]}")
