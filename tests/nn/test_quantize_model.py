"""quantize_model: a stranger's network, and our own models expert by expert."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from jaxquant import from_pretrained
from jaxquant.errors import ConfigError
from jaxquant.nn import quantize_model
from jaxquant.nn.linear import Linear, QWeight
from jaxquant.nn.prepare import is_prepared, prepare_model, unprepare_model
from tests.small_models import small_model

BUNDLED = Path(jaxquant.__file__).parent / "bundled" / "tiny-qwen3-moe"


class Mixer(nnx.Module):
    """A small network that is no transformer: residual blocks over a time axis."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inward = nnx.Linear(16, 64, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.tail = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu)
        self.heads = nnx.LinearGeneral(32, (2, 8), rngs=rngs)
        self.again = self.blocks[0]
        self.out = nnx.Linear(32, 4, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.inward(x)
        for block in self.blocks:
            x = x + nnx.relu(block(self.norm(x)))
        return self.out(self.tail(self.again(x)))


@pytest.fixture
def model() -> Mixer:
    return Mixer(nnx.Rngs(0))


X = jax.random.normal(jax.random.key(1), (3, 5, 16))


def test_rules_choose_the_first_match(model: Mixer):
    before = model(X)
    rules = {r"^heads": None, r"blocks\.1": "w4a16_g32", "blocks|tail": "w8a8", "inward": "fp8"}
    new = quantize_model(model, rules)
    codes = {
        name: layer.weight.get_value().layout.code.name
        for name, layer in (
            ("inward", new.inward),
            ("block 0", new.blocks[0]),
            ("block 1", new.blocks[1]),
            ("tail", new.tail.layers[0]),
        )
    }
    assert codes == {"inward": "e4m3", "block 0": "int8", "block 1": "int4", "tail": "int8"}
    assert type(new.out) is nnx.Linear and new.again is new.blocks[0]
    error = float(jnp.linalg.norm(new(X) - before) / jnp.linalg.norm(before))
    assert 1e-4 < error < 0.2
    # The input model is as it was, and the copy composes with jit.
    assert type(model.inward) is nnx.Linear and np.array_equal(model(X), before)
    assert np.allclose(nnx.jit(lambda m, x: m(x))(new, X), new(X), atol=1e-4)


def test_eight_bit_weights_are_near_and_gradients_skip_them(model: Mixer):
    new = quantize_model(model, {r"^(inward|blocks|tail|out)": "w8a16"})
    assert np.abs(new(X) - model(X)).max() < 0.02 * np.abs(model(X)).max()
    gradients = nnx.grad(lambda m: jnp.sum(m(X)))(new)
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(gradients)}
    assert "weight" not in names and {"bias", "scale"} <= names
    assert nnx.to_flat_state(nnx.state(new, QWeight))


def test_result_dtype_follows_nnx(model: Mixer):
    new = quantize_model(model, {"inward": "w8a16"})
    half = X.astype(jnp.bfloat16)
    assert new.inward(half).dtype == model.inward(half).dtype == jnp.float32
    mixed = nnx.Linear(16, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    holder = quantize_model(nnx.Dict(a=mixed), {"a": "w8a16"})
    assert holder.a(X).dtype == mixed(X).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "rules, where, words",
    [
        ({"inwards": "fp8"}, "rule 'inwards'", "matches no linear"),
        ({"norm": "fp8"}, "rule 'norm'", "matches no linear"),
        ({"(": "fp8"}, "rule '('", "regular expression"),
        ({"out": "w4a16_g128"}, "out", "groups of 128"),
        ({"out": "w5a5"}, "scheme", "no such scheme"),
        ({".*": "fp8"}, "heads", "LinearGeneral"),
    ],
)
def test_bad_rules(model: Mixer, rules: dict[str, str], where: str, words: str):
    with pytest.raises(ConfigError, match=words) as error:
        quantize_model(model, rules)
    assert error.value.where == where


def test_a_subclass_is_refused_only_when_matched():
    class Scaled(nnx.Linear):
        def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
            return 2 * super().__call__(inputs)

    holder = nnx.Dict(a=nnx.Linear(16, 8, rngs=nnx.Rngs(0)), b=Scaled(16, 8, rngs=nnx.Rngs(0)))
    quantize_model(holder, {"a": "fp8"})
    with pytest.raises(ConfigError, match="subclass"):
        quantize_model(holder, {"b": "fp8"})


@pytest.mark.parametrize(
    "own",
    [
        {"dot_general": lambda *operands, **options: 2 * jax.lax.dot_general(*operands, **options)},
        {"promote_dtype": lambda arrays, dtype: arrays},
        {"preferred_element_type": jnp.float32},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_computation_of_its_own_is_refused_only_when_matched(own):
    holder = nnx.Dict(
        a=nnx.Linear(16, 8, rngs=nnx.Rngs(0)), b=nnx.Linear(16, 8, rngs=nnx.Rngs(0), **own)
    )
    quantize_model(holder, {"a": "fp8"})
    with pytest.raises(ConfigError, match=next(iter(own))) as error:
        quantize_model(holder, {"b": "fp8"})
    assert error.value.where == "b"


def test_own_model_with_experts_in_their_own_precision():
    model = small_model("qwen3-moe")
    ids = np.arange(12, dtype=np.int32)[None]
    before = np.asarray(model(ids))
    rules = {
        r"layers\.0\.mlp\.experts\.(0|3)\.": "fp8a16",
        r"layers\.1\.mlp\.experts\.\d+\.down_proj": "w8a16",
        r"q_proj": "w8a16",
    }
    new = quantize_model(model, rules)
    first, second = (layer.mlp.experts for layer in new.model.layers)
    assert [len(runs) for runs in first.plan.runs] == [2, 2, 2]
    assert [len(runs) for runs in second.plan.runs] == [1, 1, 1]
    codes = [part.layout.code.name for part in first.gate_proj.get_value().parts]
    assert sorted(codes) == ["e4m3", "f32"]
    error = np.linalg.norm(np.asarray(new(ids)) - before) / np.linalg.norm(before)
    assert 1e-5 < error < 0.1
    assert np.array_equal(model(ids), before)
    with pytest.raises(ConfigError, match="quantized weight again"):
        quantize_model(new, {"q_proj": "w4a16_g8"})


def test_a_model_in_kernel_order_stays_in_kernel_order():
    """What from_pretrained returns on a GPU is quantized like the same model on a CPU."""
    model = from_pretrained(BUNDLED)
    experts, attention = {"experts": "w4a16_g32"}, {"self_attn": "w8a16"}
    given = prepare_model(quantize_model(model, experts))
    assert is_prepared(given) and not is_prepared(model)
    got = quantize_model(given, attention)
    assert is_prepared(got)
    want = nnx.state(quantize_model(quantize_model(model, experts), attention))
    assert not is_same(nnx.state(quantize_model(model, experts)), want)
    assert is_same(nnx.state(unprepare_model(got)), want)
    with pytest.raises(ConfigError, match="loses what it is"):
        quantize_model(given, experts)


def is_same(a: nnx.State, b: nnx.State) -> bool:
    same = jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    return same and all(np.array_equal(x, y) for x, y in pairs)


def test_all_linears_of_a_decoder():
    new = quantize_model(small_model("deepseek-v3"), {r"\.": "w8a16", "lm_head": "w8a16"})
    linears = [m for _, m in nnx.iter_modules(new) if isinstance(m, Linear)]
    assert linears and all(not m.weight.get_value().layout.dense for m in linears)
    ids = np.arange(9, dtype=np.int32)[None]
    before = np.asarray(small_model("deepseek-v3")(ids))
    assert np.linalg.norm(new(ids) - before) / np.linalg.norm(before) < 0.05
