"""Any nonsense in a config or in a tensor's header ends in one of our errors, never in a traceback.

A deterministic sample of all replacements: config values by values of other types, tensors by some
of another dtype and shape.
"""

import copy
import itertools
import random
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxquant.convert.read import Checkpoint, survey
from jaxquant.errors import JaxquantError
from tests.formats.cases import CASES, raw

VALUES = [None, -1, 0, 1.5, "x", "4", True, [], {}, [1], [None], {"a": None}, 1 << 70, float("nan")]
KEYS = ["ignore", "modules_to_not_convert", "dynamic", "fmt", "extra_config", "quantized_layers"]
DTYPES = [np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu]
SHAPES = [(), (0,), (1,), (2,), (3,), (1, 1), (64,), (64, 3), (3, 64), (0, 5), (5, 0), (2, 2, 2)]


def places(config, path=()):
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def read_all(case, arrays, config):
    tensors = {f"{case.path}.{k}": raw(f"{case.path}.{k}", v) for k, v in arrays.items()}
    checkpoint = Checkpoint(Path("x"), case.model, config or None, tensors, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for module in survey(checkpoint).modules.values():
                module.load()
        except JaxquantError:
            return False
    return True


@pytest.mark.parametrize("name", sorted(CASES))
def test_nonsense_is_refused_by_name(name):
    case = CASES[name]
    assert read_all(case, case.arrays, case.config), "the case itself is good"
    sample = random.Random(name)
    spots = [*places(case.config), *((key,) for key in KEYS)] if case.config else []
    for spot, value in sample.sample(
        list(itertools.product(spots, VALUES)), min(60, 14 * len(spots))
    ):
        config = copy.deepcopy(case.config)
        inner = config
        for key in spot[:-1]:
            inner = inner[key]
        inner[spot[-1]] = copy.deepcopy(value)
        read_all(case, case.arrays, config)
    refused = 0
    for suffix in case.arrays:
        for dtype, shape in sample.sample(list(itertools.product(DTYPES, SHAPES)), 12):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            octets = np.frombuffer(sample.randbytes(size), np.uint8)
            array = (octets & 1).astype(bool) if dtype is np.bool_ else octets.view(dtype)
            refused += not read_all(case, case.arrays | {suffix: array.reshape(shape)}, case.config)
    assert refused or name.startswith("dense")
