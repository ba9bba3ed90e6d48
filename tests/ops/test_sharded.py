"""Weights on a mesh: each part in kernel order, against the whole weight on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.convert import load
from jaxquant.convert.placement import sharding_of
from jaxquant.errors import LayoutError
from jaxquant.nn.moe import PROJECTIONS, Experts
from jaxquant.nn.prepare import is_prepared, prepare_model, unprepare_model
from jaxquant.ops import sharded
from jaxquant.ops.activations import QActivation, as_rows, quantize_activation
from jaxquant.ops.prepared import Prepared, prepare
from jaxquant.ops.sharded import Sharded, shard, unshard
from jaxquant.ops.sharded_bank import local_positions, run_shapes, shard_bank, unshard_bank
from jaxquant.transforms.experts import bank_experts, plan_experts
from jaxquant.transforms.structure import split
from tests.models.test_reference_models import BUNDLED
from tests.ops.test_grouped_kernels import weight

OUT, IN = 256, 512
WEIGHT_ONLY = ("w4a16_g128", "w4a16_g32_asym", "w8a16", "nvfp4_a16")
EIGHT_BIT = ("fp8", "fp8_b128", "w8a8")
SPLITS = {"out": "mlp.up_proj", "in": "mlp.down_proj", "none": "mlp.other"}


def mesh_of(**axes: int) -> Mesh:
    count = int(np.prod([*axes.values()]))
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes))


def placed(value, path: str, mesh: Mesh):
    return jax.device_put(value, sharding_of(path, value, mesh))


def rows(count: int, width: int = IN, dtype=jnp.float32) -> jax.Array:
    x = np.random.default_rng(9).standard_normal((count, width))
    return jnp.asarray(x, dtype)


def same(a, b) -> None:
    """Leaves, structure and where they lie, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def error(got, want) -> float:
    got, want = (np.asarray(y, np.float64) for y in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def kind(scheme: str, shape=(OUT, IN), seed: int = 0):
    if scheme == "nvfp4_a16":
        return dataclasses.replace(weight("nvfp4", seed, shape), act=None)
    return weight(scheme, seed, shape)


@pytest.mark.parametrize("axis", SPLITS)
@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, *EIGHT_BIT])
def test_every_device_multiplies_with_its_part(scheme, axis):
    mesh, q, x = mesh_of(dp=2, tp=2), kind(scheme), rows(6)
    whole = placed(q, SPLITS[axis], mesh)
    made = shard(whole)
    assert isinstance(made, Sharded) and made.shape == q.shape and made.extent("in") == IN
    assert isinstance(made.part, Prepared) == (scheme in WEIGHT_ONLY)
    local = {"out": (OUT // 2, IN), "in": (OUT, IN // 2), "none": (OUT, IN)}[axis]
    assert made.part.shape == local
    same(unshard(made), whole)
    want = jq.matmul(x, q)
    if axis == "in":
        # Each device quantizes its inputs by itself: the sum over pieces is the result.
        pieces = zip(jnp.split(x, 2, -1), split(q, "in", [IN // 2] * 2), strict=True)
        want = sum(jq.matmul(part, piece) for part, piece in pieces)
    multiply = jax.jit(jq.matmul)
    # Out of jit every operation on a mesh is a program that is lowered anew at each call.
    for got in (jq.matmul(x, made), multiply(x, made)):
        assert got.shape == want.shape and error(got, want) < 2e-6
    # So other rows go there with the two schemes that have the fewest operations.
    for run in (multiply, jq.matmul) if scheme in ("w8a16", "w8a8") else (multiply,):
        assert error(run(x[0], made), want[0]) < 2e-6, "one row without a batch"
        assert error(run(x[:5], made), want[:5]) < 2e-6, "rows that the mesh does not divide"
    # The control: another part in the place of the first.
    if axis != "none":
        wrong = dataclasses.replace(made, parts=jax.tree.map(lambda leaf: leaf[::-1], made.parts))
        assert error(multiply(x, wrong), want) > 0.5


def test_equal_layers_are_compiled_once(monkeypatch):
    traced = []

    def counted(q):
        traced.append(q.shape)
        return prepare(q)

    monkeypatch.setattr(sharded, "prepare", counted)
    # A shape of its own: others may be compiled already.
    layers = [
        placed(kind("w4a16_g128", (256, 384), seed), "mlp.up_proj", mesh_of(tp=2))
        for seed in range(3)
    ]
    made = [shard(q) for q in layers]
    assert traced == [(128, 384)]
    assert error(jq.matmul(rows(2, 384), made[2]), jq.matmul(rows(2, 384), layers[2])) < 2e-6


@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_the_sum_over_devices_is_rounded_once(scheme):
    q, x = kind(scheme), rows(64).astype(jnp.bfloat16)
    made = shard(placed(q, SPLITS["in"], mesh_of(tp=4)))
    pieces = zip(
        jnp.split(x.astype(jnp.float32), 4, -1), split(q, "in", [IN // 4] * 4), strict=True
    )
    want = sum(jq.matmul(part, piece) for part, piece in pieces).astype(jnp.bfloat16)
    # Sums of another order may round to the other side.
    assert np.mean(np.asarray(jq.matmul(x, made)) != np.asarray(want)) < 0.01


def test_a_bias_is_added_once():
    q, x = kind("w4a16_g128"), rows(4)
    bias = jnp.arange(OUT, dtype=jnp.float32) * 100
    want = jq.Linear(q, bias)(x)
    for path in ("mlp.up_proj", "mlp.down_proj"):
        made = jq.Linear(shard(placed(q, path, mesh_of(dp=2, tp=2))), bias)
        assert error(made(x), want) < 2e-6
        assert error(nnx.jit(made)(x), want) < 2e-6


def test_what_is_not_cut_for_kernels_stays_as_it_is():
    mesh = mesh_of(tp=2)
    for q in (kind("w4a16_g128"), kind("fp8")):
        assert shard(q) is q, "on one device"
    dense = placed(kind("bf16"), "mlp.up_proj", mesh)
    assert shard(dense) is dense
    # Half of 640 inputs are two and a half blocks: the weight is whole on every device.
    odd = shard(placed(kind("fp8_b128", (256, 640)), "mlp.down_proj", mesh))
    assert isinstance(odd, Sharded) and odd.cuts == () and odd.part.shape == (256, 640)
    # 96 outputs a device have no kernel; XLA splits the weight by itself.
    narrow = placed(kind("w4a16_g128", (192, 256)), "mlp.up_proj", mesh)
    assert shard(narrow) is narrow


def test_act_order_is_whole_along_the_input_it_permutes():
    mesh, q, x = mesh_of(tp=2), kind("act-order"), rows(4)
    for path, axes in (("mlp.up_proj", ("tp",)), ("mlp.down_proj", ())):
        made = shard(placed(q, path, mesh))
        assert isinstance(made, Sharded) and made.cuts == axes
        assert error(jq.matmul(x, made), jq.matmul(x, q)) < 2e-6


def test_two_projections_need_one_sum_over_devices():
    mesh = mesh_of(tp=4)
    up = shard(placed(kind("w4a16_g128", (512, 256)), "mlp.up_proj", mesh))
    down = shard(placed(kind("w4a16_g128", (256, 512), 1), "mlp.down_proj", mesh))

    def both(x, up, down):
        return jq.matmul(jax.nn.silu(jq.matmul(x, up)), down)

    text = jax.jit(both).lower(rows(4, 256), up, down).compile().as_text()
    collectives = re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    assert collectives == ["all-reduce"]


def test_quantized_activations_do_not_reach_a_mesh():
    mesh = mesh_of(tp=2)
    q = kind("fp8")
    made = shard(placed(q, "mlp.up_proj", mesh))
    x = jq.ops.rms_norm_quantize(rows(4), jnp.ones(IN), 1e-5, [made])
    assert isinstance(x, jax.Array), "each device quantizes what it multiplies"
    with pytest.raises(LayoutError, match="every device"):
        codes = as_rows(quantize_activation(rows(4), q), q.act)
        jq.matmul(QActivation.of(codes, rows(4), q.act), made)


FORMATS = {
    "one format": ("w4a16_g128",) * 8,
    "GPTQ and AWQ as one run": ("w4a16_g128",) * 4 + ("w4a16_g128_asym",) * 4,
    # Runs of three, two and three experts: some are whole on every device, and dealt out.
    "mixed": ("w4a16_g128", "fp8", "w8a16") * 2 + ("w4a16_g128", "w8a16"),
    "fp8": ("fp8_b128",) * 8,
}


class Layer(nnx.Module):
    """Experts by themselves, under the name that says how a mesh splits them."""

    def __init__(self, experts: Experts):
        self.experts = experts

    def __call__(self, x, ids, weights):
        return self.experts(x, ids, weights)


@functools.cache
def layer_of(formats: tuple[str, ...], widths: tuple[int, int] = (256, 128)) -> Layer:
    inner, hidden = widths
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    columns = [
        [kind(name, shape, 10 * e + p) for e, name in enumerate(formats)]
        for p, shape in enumerate(shapes)
    ]
    plan = plan_experts(columns)
    banks = [bank_experts(plan, p, column.__getitem__) for p, column in enumerate(columns)]
    return Layer(Experts(tuple(banks), plan, "silu"))


def on_mesh(layer: Layer, mesh: Mesh) -> Layer:
    spread = nnx.clone(layer)
    for name in PROJECTIONS:
        variable = getattr(spread.experts, name)
        variable.set_value(placed(variable.get_value(), f"mlp.experts.{name}", mesh))
    return spread


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("one format", {"ep": 4}),
        ("one format", {"dp": 2, "ep": 2}),
        ("GPTQ and AWQ as one run", {"tp": 2}),
        ("mixed", {"ep": 2, "tp": 2}),
        ("fp8", {"ep": 2}),
    ],
    ids=str,
)
def test_experts_over_devices(name, axes):
    mesh, layer = mesh_of(**axes), layer_of(FORMATS[name])
    spread = on_mesh(layer, mesh)
    prepared = prepare_model(spread)
    experts = prepared.experts
    assert is_prepared(prepared) and isinstance(experts.down_proj.get_value(), Sharded)
    assert experts.gate_up_proj is not None, "gate and up in one launch on every device"
    both, down = experts.gate_up_proj.get_value(), experts.down_proj.get_value()
    parts = [part.shape for part in layer.experts.down_proj.get_value().parts]
    assert run_shapes(down) == parts
    assert run_shapes(both) == [(count, 2 * inn, out) for count, out, inn in parts]
    back = unprepare_model(prepared)
    assert not is_prepared(back)
    for projection in PROJECTIONS:
        same(*(getattr(m.experts, projection).get_value() for m in (back, spread)))
    x = rows(12, 128)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 8, (12, 2)), jnp.int32)
    weights = jnp.asarray(np.random.default_rng(2).random((12, 2)), jnp.float32)
    want = layer(x, ids, weights)
    # Inputs of down that are cut have scales of their own on each device.
    limit = 4e-2 if "tp" in axes and any("fp8" in one for one in FORMATS[name]) else 2e-6
    run = nnx.jit(prepared)
    for got in (prepared(x, ids, weights), run(x, ids, weights)):
        assert got.dtype == x.dtype and error(got, want) < limit
    for few in (run, prepared) if name == "fp8" else (run,):
        assert error(few(x[:5], ids[:5], weights[:5]), want[:5]) < limit, "an odd number of tokens"
    assert error(run(x, (ids + 1) % 8, weights), want) > 0.5, "other experts"
    rows_ = jq.explain(prepared, batch=4).rows
    assert all(f"on each of {mesh.size} devices" in row.kernel for row in rows_)


def test_every_expert_is_on_one_device():
    mesh = mesh_of(ep=2, tp=2)
    bank = on_mesh(layer_of(FORMATS["mixed"]), mesh).experts.down_proj.get_value()
    made = shard_bank(bank)
    assert made is not None and {place.expert for place in made.placements} == {None, "ep"}
    table = local_positions(bank.runs, made.placements, mesh)
    local = made.part.experts
    assert table.shape == (2, 8) and local < 8
    for position in range(8):
        assert np.sum(table[:, position] < local) == 1
    for device in range(2):
        mine = table[device][table[device] < local]
        assert len(set(mine)) == len(mine)
    same(unshard_bank(made), bank)


def test_experts_whose_projections_are_cut_differently_stay_with_xla():
    mesh, layer = mesh_of(ep=2), layer_of(FORMATS["one format"])
    spread = on_mesh(layer, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    down = spread.experts.down_proj
    down.set_value(
        jax.device_put(down.get_value(), jax.tree.map(lambda _: whole, down.get_value()))
    )
    prepared = prepare_model(spread)
    assert not is_prepared(prepared)
    x, ids = rows(4, 128), jnp.zeros((4, 2), jnp.int32)
    weights = jnp.ones((4, 2), jnp.float32)
    assert error(prepared(x, ids, weights), layer(x, ids, weights)) < 2e-6


@pytest.mark.parametrize("scheme", ["fp8", "w4a16_g32"])
def test_a_model_on_a_mesh(tmp_path, monkeypatch, scheme):
    base = jq.from_pretrained(BUNDLED, dtype=jnp.float32)
    small = jq.quantize_model(base, {r"model\.layers\..*": scheme})
    jq.save_pretrained(small, tmp_path / "saved")
    monkeypatch.setattr(load, "has_kernels", lambda: True)
    mesh = mesh_of(ep=2, tp=2)
    model = jq.from_pretrained(tmp_path / "saved", mesh=mesh)
    with pytest.raises(LayoutError, match="unprepare_model"):
        jq.stack_layers(model)
    assert is_prepared(model) and model.num_weights == small.num_weights
    ids = jnp.asarray([[5, 6, 7, 8], [9, 10, 11, 12]], jnp.int32)
    limit = 5e-2 if scheme == "fp8" else 1e-5
    assert error(model(ids), small(ids)) < limit
    if scheme != "fp8":
        prompts = [[5, 6, 7], [9, 10, 11, 12]]
        got = jq.generate(model, prompts, max_new_tokens=4)
        assert got == jq.generate(small, prompts, max_new_tokens=4)
    # And back: saved from one mesh, loaded onto none.
    jq.save_pretrained(model, tmp_path / "again")
    monkeypatch.setattr(load, "has_kernels", lambda: False)
    again = jq.from_pretrained(tmp_path / "again")
    for a, b in zip(
        jax.tree.leaves(nnx.state(small)), jax.tree.leaves(nnx.state(again)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    stacked = jq.from_pretrained(tmp_path / "saved", mesh=mesh, scan_layers=True)
    assert not is_prepared(stacked) and error(stacked(ids), small(ids)) < 1e-5
