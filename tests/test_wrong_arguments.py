"""Wrong arguments of the functions that take a model, a checkpoint or tokens."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.arguments import real
from jaxquant.errors import ConfigError, FormatError, JaxquantError
from jaxquant.models import CausalLM
from jaxquant.nn.prepare import unprepare_model
from jaxquant.tokenize import Tokenizer
from tests.small_models import small_model

BUNDLED = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
TOKENS = np.arange(64) % 60


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return small_model("llama")


class Own(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(64, 64, rngs=nnx.Rngs(0))


IDS = {
    "floats": jnp.ones((1, 3)),
    "one axis": jnp.ones(3, jnp.int32),
    "past the vocabulary": [[64]],
    "negative": [[-1]],
    "no tokens": jnp.ones((1, 0), jnp.int32),
    "no rows": jnp.ones((0, 3), jnp.int32),
    "text": "abc",
    "ragged": [[1, 2, 3], [1]],
    "flags": np.ones((1, 3), bool),
}


@pytest.mark.parametrize("name", IDS)
def test_token_ids_of_a_pass(model, name):
    with pytest.raises(ConfigError, match="input_ids"):
        model(IDS[name])


def test_token_ids_stay_where_they_are(model):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    where = NamedSharding(mesh, PartitionSpec("data"))
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    split = model(jax.device_put(ids, where))
    assert split.sharding.is_equivalent_to(where, 3)
    np.testing.assert_allclose(split, model(ids), rtol=0, atol=1e-5)


PROMPTS = {
    "one text": "hello",
    "nothing": None,
    "a number": 5,
    "numbers": [1, 2],
    "a number in an array": np.array(5),
    "one axis": np.ones(3, np.int32),
    "fractions": [[1.5]],
    "texts in a list": [["a"]],
    "None inside": [None],
    "negative": [[-1]],
    "no tokens": [[]],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(model, name):
    with pytest.raises(ConfigError, match="prompt"):
        jq.generate(model, PROMPTS[name], max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "2"),
        ("max_new_tokens", None),
        ("max_new_tokens", True),
        ("max_new_tokens", 10**12),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-300),  # 0 in float32, so every quotient would be infinite
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", "x"),
        ("seed", "x"),
        ("seed", 1.5),
        ("seed", 2**63),
        ("eos", "</s>"),
        ("eos", 64),
        ("eos", -5),
        ("eos", 2.7),
        ("eos", [[1, 2], [3, 4]]),
    ],
)
def test_numbers_of_generate(model, name, value):
    given = {"max_new_tokens": 2, name: value}
    with pytest.raises(ConfigError, match=name):
        jq.generate(model, [[1]], **given)


def test_a_rank_past_the_vocabulary_keeps_all_tokens(model):
    one, other = (
        jq.generate(model, [[1]], max_new_tokens=4, temperature=1.0, top_k=k) for k in (64, 10**9)
    )
    assert one == other


def test_what_is_wrong_is_shown_in_short(model):
    with pytest.raises(ConfigError) as caught:
        jq.export_pretrained(model, "nowhere", format="gptq")
    assert caught.value.found == "CausalLM"
    with pytest.raises(ConfigError, match="from -9223372036854775808 to 9223372036854775807"):
        jq.generate(model, [[1]], max_new_tokens=1, seed=2**64)


def test_a_number_is_no_flag():
    assert real("x", np.float32(0.5)) == 0.5
    with pytest.raises(ConfigError):
        real("x", True)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tokens", {"tokens": TOKENS + 0.5}),
        ("tokens", {"tokens": TOKENS > 3}),
        ("tokens", {"tokens": "hello"}),
        ("tokens", {"tokens": None}),
        ("tokens", {"tokens": TOKENS + 10}),
        ("tokens", {"tokens": TOKENS[:3]}),
        ("window", {"window": 1}),
        ("window", {"window": 2.5}),
        ("windows", {"windows": 0}),
        ("windows", {"windows": 1.5}),
        ("batch", {"batch": 1.5}),
        ("batch", {"batch": 0}),
    ],
)
def test_perplexity(model, name, given):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        jq.perplexity(model, **({"tokens": TOKENS, "window": 16} | given))


def fail():
    """A weight is explained."""
    raise ConfigError("explain", "a weight")


@pytest.mark.parametrize(
    "call",
    [
        jq.prepare_model,
        unprepare_model,
        jq.stack_layers,
        jq.unstack_layers,
        lambda model: jq.quantize_model(model, {"up": "fp8"}),
        lambda model: jq.generate(model, [[1]], max_new_tokens=1),
        lambda model: jq.perplexity(model, TOKENS, window=16),
        lambda model: jq.save_pretrained(model, "nowhere"),
        lambda model: jq.explain(model) if not isinstance(model, jq.QTensor) else fail(),
    ],
)
def test_what_is_no_model(call):
    weight = jq.quantize(np.ones((64, 64), np.float32), "fp8")
    for value in (None, "Qwen3-8B", {}, weight, np.ones(3)):
        with pytest.raises(ConfigError):
            call(value)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: jq.generate(model, [[1]], max_new_tokens=1),
        lambda model: jq.perplexity(model, TOKENS, window=16),
        lambda model: jq.save_pretrained(model, "nowhere"),
    ],
)
def test_a_model_that_is_no_language_model(call):
    with pytest.raises(ConfigError, match="CausalLM"):
        call(Own())


@pytest.mark.parametrize("rules", [None, ["fp8"], "fp8", [("up", "fp8")], {1: "fp8"}, {"up": 8}])
def test_rules_of_quantize_model(rules):
    with pytest.raises(ConfigError):
        jq.quantize_model(Own(), rules)


@pytest.mark.parametrize("batch", [0, -1, "4", 1.5])
def test_rows_of_explain(batch):
    with pytest.raises(ConfigError, match="batch"):
        jq.explain(jq.quantize(np.ones((64, 64), np.float32), "fp8"), batch)


@pytest.mark.parametrize(
    "call",
    [
        jq.from_pretrained,
        jq.read_quantized,
        lambda path: jq.export_pretrained(path, "nowhere", format="gptq"),
        lambda path: jq.from_pretrained(BUNDLED, plan=path or 5),
        lambda path: jq.from_pretrained(BUNDLED, names=path or 5),
    ],
)
def test_paths(model, call):
    for path in (None, 3, "", model):
        with pytest.raises(ConfigError):
            call(path)


@pytest.mark.parametrize(
    "given",
    [{"dtype": "bfloat61"}, {"dtype": jnp.int8}, {"mesh": "tp"}, {"mesh": 2}],
)
def test_options_of_from_pretrained(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        jq.from_pretrained(BUNDLED, **given)


@pytest.mark.parametrize("given", [{"format": ["gptq"]}, {"format": "gptq", "scheme": 4}])
def test_options_of_export(given, tmp_path):
    with pytest.raises(ConfigError):
        jq.export_pretrained(BUNDLED, tmp_path / "out", **given)


def test_a_place_that_cannot_be_written(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FormatError, match="cannot be made"):
        jq.save_pretrained(model, file / "model")
    with pytest.raises(FormatError, match="no such directory"):
        Tokenizer.from_directory(BUNDLED).save(file)


def test_tokenizer():
    tokenizer = Tokenizer.from_directory(BUNDLED)
    for text in (None, 3, b"abc", ["a"]):
        with pytest.raises(ConfigError, match="text"):
            tokenizer.encode(text)
    for ids in (None, "abc", [-1], [2**40], [1.5], [[1]]):
        with pytest.raises(ConfigError, match="ids"):
            tokenizer.decode(ids)
    assert tokenizer.decode(jnp.array([1, 2])) == tokenizer.decode([1, 2])


@pytest.mark.parametrize(
    "config", [jq.ModelConfig, jq.GPTQConfig, jq.AWQConfig, jq.Fp8Config, jq.BlockInt8Config]
)
def test_configs_are_objects(config):
    with pytest.raises(JaxquantError):
        config.from_hf(None)
