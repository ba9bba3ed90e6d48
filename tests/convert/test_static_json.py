"""Static descriptions as JSON: whatever a format or a GGUF type decodes to comes back equal."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.arrays.codes import CODES, Code
from jaxquant.convert.static_json import from_json, to_json
from jaxquant.errors import FormatError
from jaxquant.formats import detect, gguf
from jaxquant.formats.dense import DENSE
from jaxquant.formats.gguf_types import TYPES
from tests.convert.test_corpus import GOLDEN
from tests.formats.cases import CASES


def restored(value):
    return from_json(json.loads(json.dumps(to_json(value))), "layouts.json")


@pytest.mark.parametrize("name", CASES)
def test_layouts_of_every_format(name):
    case = CASES[name]
    fmt, module = detect(case.config) if case.config else DENSE, case.module()
    spec = fmt.spec(case.config, module)
    layout = spec.layout(fmt.shape(spec, module))
    assert restored(layout) == layout
    assert restored(spec.act) == spec.act


@pytest.mark.parametrize("name", TYPES)
def test_layouts_of_every_gguf_type(name):
    if not name.startswith("I") or name.startswith("IQ4"):
        layout = gguf.abstract(TYPES[name], (64, 512)).layout
        assert restored(layout) == layout


def test_a_codebook_of_a_checkpoint_is_saved(tmp_path):
    model = jq.from_pretrained(GOLDEN / "bnb-nf4-dq-llama")
    jq.save_pretrained(model, tmp_path / "saved")
    ids = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(jq.from_pretrained(tmp_path / "saved")(ids), model(ids))


NF4 = to_json(Code("nf4", 4, "table", "uint8", tuple(map(float, range(16)))))


@pytest.mark.parametrize(
    "change",
    [
        {"table": [0.0] * 15},
        {"table": [0.0] * 15 + [float("nan")]},
        {"table": ["0"] * 16},
        {"table": 3},
        {"bits": 5},
        {"bits": "4"},
        {"kind": "float"},
        {"kind": "float", "bits": 8, "dtype": "complex64", "table": []},
        {"dtype": "float32"},
        {"name": None},
        {"more": 1},
    ],
)
def test_damaged_codes_are_refused(change):
    assert isinstance(from_json(NF4, "x"), Code)
    with pytest.raises(FormatError, match="Code"):
        from_json(NF4 | change, "x")


def test_known_codes_are_names():
    assert all(to_json(code) == {"@": "Code", "name": name} for name, code in CODES.items())
