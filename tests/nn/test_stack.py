"""Stacked layers: same values, exact inverse, a program that does not grow, no whole copies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.arrays.bank import Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.models import CausalLM, ModelConfig, build_model
from jaxquant.models.source import abstract
from jaxquant.nn.prepare import prepare_model, unprepare_model
from jaxquant.nn.stack import Layers, layer_runs, scan_run, stack_layers, unstack_layers
from jaxquant.ops.prepared import Prepared
from jaxquant.transforms.leading import take_lead
from tests.small_models import CONFIGS, random_tensors, split_tensors

IDS = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
MIXED = {
    r"experts\.[03]\.(gate|up)_proj": "fp8",
    r"experts\.\d+\.down_proj": "w4a16_g8",
}


def model_of(name: str, layers: int, **changes: Any) -> CausalLM:
    config = ModelConfig.from_hf({**CONFIGS[name], "num_hidden_layers": layers, **changes})
    return build_model(config, *split_tensors(random_tensors(config)), dtype=jnp.float32)


def with_cache(model: CausalLM) -> list[jax.Array]:
    """Logits of a prefill and of a decode step."""
    graph, state = model.split()

    @jax.jit
    def steps(state: nnx.State) -> list[jax.Array]:
        model = nnx.merge(graph, state)
        cache = model.empty_cache(2, 8)
        position = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4))
        logits, cache = model.step(jnp.asarray(IDS), position, cache)
        new = jnp.asarray(IDS[:, :1])
        return [logits, model.step(new, jnp.full((2, 1), 4), cache)[0]]

    return steps(state)


@pytest.mark.parametrize(
    "name, layers, runs",
    [
        ("qwen3-moe", 3, [(0, 3)]),
        ("deepseek-v3", 4, [(0, 1), (1, 4)]),
    ],
)
def test_stacked_layers_give_the_same_logits(name: str, layers: int, runs: list[tuple[int, int]]):
    model = model_of(name, layers)
    if name == "qwen3-moe":
        model = jq.quantize_model(model, MIXED)
    stacked = stack_layers(model)
    assert stacked.model.runs == tuple(Run(*run) for run in runs)
    for ours, expected in zip(with_cache(stacked), with_cache(model), strict=True):
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_order_in_a_stack_matters():
    stacked = stack_layers(model_of("llama", 2))
    graph, state = stacked.split()
    state["model"]["layers"] = jax.tree.map(lambda leaf: leaf[::-1], state["model"]["layers"])
    assert np.abs(nnx.merge(graph, state)(IDS) - stacked(IDS)).max() > 1e-2


def test_an_fp8_cache_stays_in_place_in_the_stack():
    config = ModelConfig.from_hf({**CONFIGS["llama"], "num_hidden_layers": 3})
    weights, arrays = split_tensors(random_tensors(config))
    for i in range(3):
        for name in "kv":
            arrays[f"model.layers.{i}.self_attn.{name}_scale"] = np.full((2,), 0.02 + i, np.float32)
    model = build_model(config, weights, arrays, dtype=jnp.float32)
    stacked = stack_layers(model)
    assert stacked.empty_cache(2, 8).layers[0][0].data[0].dtype == jnp.float8_e4m3fn
    assert stacked.empty_cache(2, 8).layers[0][0].scales[0].shape == (3, 2, 1, 2, 1)
    for ours, expected in zip(with_cache(stacked), with_cache(model), strict=True):
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


def test_unstacking_is_the_exact_inverse():
    model = jq.quantize_model(model_of("qwen3-moe", 3), MIXED | {r"layers\.2\..*o_proj": "fp8"})
    stacked = stack_layers(model)
    assert stacked.model.runs == (Run(0, 2), Run(2, 3)) and not model.model.stacked
    back = unstack_layers(stacked)
    assert nnx.split(back)[0] == nnx.split(model)[0] and unstack_layers(model) is model
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(back), nnx.state(model)))
    abstract = nnx.eval_shape(lambda: nnx.clone(model))
    for other in (stacked, abstract):
        assert other.nbytes == model.nbytes and other.num_weights == model.num_weights
    assert str(jq.explain(stacked, 4)) == str(jq.explain(model, 4))


def test_layers_are_equal_only_with_all_static_facts():
    model = model_of("llama", 2)
    first, second = model.model.layers
    assert len(layer_runs([first, second])) == 1
    second.self_attn.heads = dataclasses.replace(second.self_attn.heads, window=3)
    assert len(layer_runs([first, second])) == 2


def test_quantizing_a_stacked_model_stacks_what_is_equal_then():
    model = model_of("llama", 3)
    rules = {r"layers\.0\.mlp": "fp8", r"layers\.[12]\.mlp": "w4a16_g8"}
    stacked = jq.quantize_model(stack_layers(model), rules)
    assert stacked.model.runs == (Run(0, 1), Run(1, 3))
    expected = jq.quantize_model(model, rules)(IDS)
    assert np.abs(stacked(IDS) - expected).max() < 1e-5 * np.abs(expected).max()


def test_generation_is_the_same():
    model = model_of("llama", 2)
    prompts = [[1, 2, 3], [4]]
    new = jq.generate(model, prompts, max_new_tokens=5, eos=())
    assert jq.generate(stack_layers(model), prompts, max_new_tokens=5, eos=()) == new


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_building_stacked_equals_stacking(name: str):
    config = ModelConfig.from_hf({**CONFIGS[name], "num_hidden_layers": 3})
    weights, arrays = split_tensors(random_tensors(config))
    everything = {**weights, **arrays}
    alive: list[int] = []
    finished = 0

    def finish(layer: Any) -> Any:
        nonlocal finished
        finished += 1
        # Of unstacked layer leaves, no more than those of this layer and the one before exist.
        shape = (48, 32) if name == "llama" else (6, 16, 32)
        alive.append(sum(x.shape == shape for x in jax.live_arrays()))
        return layer

    built = build_model(
        config,
        abstract(weights),
        abstract(arrays),
        dtype=jnp.float32,
        load=everything.__getitem__,
        scan_layers=True,
        finish=finish,
    )
    expected = stack_layers(build_model(config, weights, arrays, dtype=jnp.float32))
    assert nnx.split(built)[0] == nnx.split(expected)[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(built), nnx.state(expected)))
    assert finished == 3 and alive[-1] - alive[0] <= 2
    shapes = build_model(
        config, abstract(weights), abstract(arrays), dtype=jnp.float32, scan_layers=True
    )
    assert nnx.split(shapes)[0] == nnx.split(built)[0]


class Tower(Layers):
    """A user's own sequence of layers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for run, layer in zip(self.runs, self.layers, strict=True):
            if run.stop - run.start > 1:
                x = scan_run(lambda graph, state, _, x: nnx.merge(graph, state)(x), layer, x)
            else:
                x = layer(x)
        return x


def test_prepared_weights_stack_in_any_module():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [
        jq.quantize(jax.random.normal(k, (128, 128)), "w4a16_g64", ("out", "in")) for k in keys
    ]
    tower = Tower([jq.Linear(weight) for weight in weights])
    stacked = stack_layers(prepare_model(tower))
    weight = stacked.layers[0].weight.get_value()
    assert isinstance(weight, Prepared) and weight.lead == (3,)
    back = nnx.state(unstack_layers(unprepare_model(stacked)))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, nnx.state(tower)))
    x = jax.random.normal(keys[0], (4, 128))
    assert np.allclose(nnx.jit(stacked)(x), tower(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", ["w4a16_g64", "w4a8_g64", "fp8"])
def test_a_stacked_model_takes_kernel_order(scheme: str):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    model = jq.quantize_model(model_of("qwen3-moe", 3, **sizes), {r"layers\..*": scheme})
    stacked = stack_layers(model)
    prepared, expected = prepare_model(stacked), stack_layers(prepare_model(model))
    assert nnx.split(prepared)[0] == nnx.split(expected)[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(prepared), nnx.state(expected))
    attention = prepared.model.layers[0].self_attn
    assert attention.qkv_proj is not None and attention.q_proj is None
    kind = QTensor if scheme == "fp8" else Prepared
    assert isinstance(attention.o_proj.weight.get_value(), kind)
    back = unprepare_model(prepared)
    assert nnx.split(back)[0] == nnx.split(stacked)[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(stacked))
    again = prepare_model(prepared)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(prepared))
    for ours, theirs in zip(with_cache(prepared), with_cache(model), strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def lowered(layers: int, stacked: bool) -> Any:
    """A decode step of an abstract model in three formats."""
    config = ModelConfig.from_hf({**CONFIGS["qwen3-moe"], "num_hidden_layers": layers})
    weights, arrays = split_tensors(random_tensors(config))
    schemes = ("fp8a16", "w4a16_g8", "bf16")
    for path in weights:
        if ".experts." in path:
            weights[path] = jq.quantize(
                weights[path].data[0], schemes[int(path.split(".")[5]) % 3], ("out", "in")
            )
    model = build_model(config, abstract(weights), abstract(arrays), scan_layers=stacked)
    graph, state = model.split()
    cache = jax.eval_shape(lambda state: nnx.merge(graph, state).empty_cache(1, 16), state)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(state: nnx.State, ids: jax.Array, cache: Any) -> Any:
        return nnx.merge(graph, state).step(ids, ids, cache)

    return jax.jit(step, donate_argnums=2).lower(state, token, cache)


def test_the_program_does_not_grow_with_depth():
    def lines(layers: int, stacked: bool) -> int:
        return lowered(layers, stacked).as_text().count("\n")

    assert lines(4, True) == lines(8, True)
    assert lines(4, False) < lines(8, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "uint8"])
def test_a_loop_reads_entries_without_converting_the_array(dtype: str):
    """Bytes of temporaries stay below those of the array, which the plain spelling exceeds."""
    many = jax.ShapeDtypeStruct((3, 16, 64, 64), jnp.dtype(dtype))

    def temporaries(take: Any) -> int:
        def total(many: jax.Array, n: jax.Array) -> jax.Array:
            def layer(carry: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
                def body(i: jax.Array, acc: jax.Array) -> jax.Array:
                    return acc @ take(many, (index, i)).astype(jnp.float32)

                return jax.lax.fori_loop(0, n, body, carry), None

            return jax.lax.scan(layer, jnp.ones((8, 64)), jnp.arange(3))[0]

        compiled = jax.jit(total).lower(many, jax.ShapeDtypeStruct((), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = 3 * 16 * 64 * 64 * many.dtype.itemsize
    assert temporaries(take_lead) < size
    converted = (
        ("float8_e4m3fn", "bfloat16") if jax.__version_info__ < (0, 11) else ("float8_e4m3fn",)
    )
    if dtype in converted:  # XLA of jax 0.11 takes entries of bfloat16 as they are
        assert temporaries(lambda leaf, index: leaf[index]) > size
