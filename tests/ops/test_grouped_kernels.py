"""grouped_matmul through the Pallas kernels: banks whose runs have a kernel each, or none.

The kernels are tested in tests/pallas_kernels; here it is what joins them to a bank.
"""

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
from jaxquant.arrays.bank import StackedBank
from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import KernelError
from jaxquant.nn.moe import PROJECTIONS, Experts, sort_by_expert
from jaxquant.nn.prepare import prepare_model, unprepare_model
from jaxquant.ops import select
from jaxquant.ops.prepared import Prepared
from jaxquant.ops.prepared_bank import join_banks, prepare_bank, split_bank, unprepare_bank
from jaxquant.transforms.experts import bank_experts, plan_experts
from tests.ops import oracle

OUT, IN = 128, 256
SHAPES = ((OUT, IN), (OUT, IN), (IN, OUT))
STATIC = ActSpec(CODES["e4m3"], "tensor", dynamic=False)


def weight(kind, seed, shape=(OUT, IN)):
    """One expert's weight, of a scheme's name or with what only checkpoints have."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    if kind == "act-order":
        perm = jnp.asarray(rng.permutation(shape[1]), jnp.int32)
        return dataclasses.replace(jq.quantize(w, "w4a16_g64_asym", ("out", "in")), perm=perm)
    if kind == "pre-scale":
        scale = jnp.asarray(rng.uniform(0.5, 2, (1, shape[1])), jnp.float32)
        return dataclasses.replace(jq.quantize(w, "w4a16_g128", ("out", "in")), pre_scale=scale)
    if kind == "static":
        scale = jnp.full((1, 1), 0.01 * (seed + 1), jnp.float32)
        q = jq.quantize(w, "fp8_tensor", ("out", "in"))
        return dataclasses.replace(q, act=STATIC, act_scale=scale)
    return jq.quantize(w, kind, ("out", "in"))


def bank_of(kinds, shape=(OUT, IN), seed=0):
    column = [weight(kind, seed + i, shape) for i, kind in enumerate(kinds)]
    plan = plan_experts([column])
    return bank_experts(plan, 0, column.__getitem__)


def rows(count, width=IN):
    x = np.random.default_rng(9).standard_normal((count, width))
    return jnp.asarray(x, jnp.bfloat16)


MIXED = ("w4a16_g128", "fp8", "bf16", "w4a16_g128", "fp8_b128", "act-order", "static", "pre-scale")


@pytest.mark.interpret
def test_each_run_of_a_mixed_bank_takes_its_own_way():
    bank = bank_of(MIXED)
    packed = prepare_bank(bank)
    assert sum(isinstance(part, Prepared) for part in packed.parts) == 3
    sizes = jnp.asarray((3, 0, 4, 2, 1, 5, 2, 6), jnp.int32)
    # Rows that are gathered and gated on the way.
    tokens = jnp.concatenate([rows(9), rows(9)[::-1]], 1)
    source = jnp.asarray(np.arange(23) * 5 % 9, jnp.int32)
    by_xla = functools.partial(jq.grouped_matmul, backend="xla")
    expected = by_xla(tokens, bank, sizes, source=source, gated=True).astype(jnp.float32)
    gated = (jax.nn.silu(tokens[:, :IN]) * tokens[:, IN:])[source]
    np.testing.assert_array_equal(by_xla(gated, bank, sizes).astype(jnp.float32), expected)
    got = jq.grouped_matmul(
        tokens, packed, sizes, source=source, gated=True, backend="interpret"
    ).astype(jnp.float32)
    assert oracle.relative(got, expected) < 8e-3
    for start in range(0, 23, 4):  # no run is small beside the others' sum
        part = slice(start, start + 4)
        assert oracle.relative(got[part], expected[part]) < 1.2e-2
    # Negative controls: a row of one run given to the next, and the rows of other tokens.
    wrong = jnp.asarray((2, 1, 4, 2, 1, 5, 2, 6), jnp.int32)
    assert oracle.relative(by_xla(gated, bank, wrong), expected) > 0.05
    assert oracle.relative(by_xla(gated[::-1], bank, sizes), expected) > 0.05


def both_forms(x, bank, sizes, source, gated):
    return jq.grouped_matmul(x, bank, sizes, source=source, gated=gated)


@pytest.mark.parametrize(("count", "kernels"), [(9, 3), (1100, 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_one_kernel_makes_both_forms_of_few_rows(monkeypatch, gated, count, kernels):
    """For more, those of each form have their own: rows of other runs are left out."""
    monkeypatch.setattr(select, "has_gpu", lambda: True)
    source, sizes = jnp.zeros(count, jnp.int32), jnp.array([count, 0], jnp.int32)
    for kinds in (("w4a16_g128", "fp8_b128"), ("fp8_b128", "w4a16_g128")):
        bank = prepare_bank(bank_of(kinds, (OUT, 512)))
        traced = jax.jit(both_forms, static_argnums=4).trace(
            rows(5, 512 * (1 + gated)), bank, sizes, source, gated
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == kernels


@pytest.mark.interpret
def test_both_forms_of_one_kernel_are_those_of_the_rows():
    bank = bank_of(("w4a16_g128", "fp8_b128"), (OUT, 512))
    sizes, source = jnp.asarray((5, 4), jnp.int32), jnp.asarray(np.arange(9) * 2 % 5, jnp.int32)
    x = rows(5, 1024)
    want = jq.grouped_matmul(x, bank, sizes, source=source, gated=True, backend="xla")
    packed = prepare_bank(bank)
    for order in (source, source[::-1]):
        got = jq.grouped_matmul(x, packed, sizes, source=order, gated=True, backend="interpret")
        parts = [
            oracle.relative(got[part].astype(jnp.float32), want[part].astype(jnp.float32))
            for part in (slice(0, 5), slice(5, 9))
        ]
        # XLA rounds the gated rows before it quantizes them.  Negative control: other tokens.
        assert max(parts) < 2e-2 if order is source else min(parts) > 0.1


@pytest.mark.interpret
def test_a_layer_of_a_stack_is_read_where_it_lies():
    kinds = ("w4a16_g128", "fp8", "act-order", "bf16")
    banks = [prepare_bank(bank_of(kinds, seed=seed)) for seed in (0, 50)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks)
    sizes, x = jnp.asarray((2, 0, 3, 4), jnp.int32), rows(9)
    expected = [jq.grouped_matmul(x, bank, sizes, backend="xla") for bank in banks]
    stacked = StackedBank(stack, jnp.int32(1))
    got = jq.grouped_matmul(x, stacked, sizes, backend="interpret").astype(jnp.float32)
    assert oracle.relative(got, expected[1].astype(jnp.float32)) < 4e-3
    assert oracle.relative(got, expected[0].astype(jnp.float32)) > 0.5, "another layer's"


def test_prepared_banks_compute_the_same_and_come_back():
    bank = bank_of(
        ("w4a16_g64_asym", "act-order", "w8a16", "fp8", "w3a16_g32", "bf16", "w4a8_g128")
    )
    packed = prepare_bank(bank)
    sizes = jnp.asarray((2, 0, 3, 1, 5, 1, 1), jnp.int32)
    x = rows(13)
    np.testing.assert_array_equal(
        jq.grouped_matmul(x, packed, sizes), jq.grouped_matmul(x, bank, sizes)
    )
    same(unprepare_bank(packed), bank)
    assert packed.nbytes >= bank.nbytes and "int4" in repr(packed)


def test_a_model_is_prepared_under_trace():
    class Layer(nnx.Module):
        def __init__(self):
            kinds = [("fp8", "fp8", "w4a16_g128")] * 2
            columns = [
                [weight(kind, i, shape) for i, kind in enumerate(column)]
                for column, shape in zip((kinds[0], *kinds), SHAPES, strict=True)
            ]
            plan = plan_experts(columns)
            banks = [bank_experts(plan, j, column.__getitem__) for j, column in enumerate(columns)]
            self.experts = Experts((banks[0], banks[1], banks[2]), plan, "silu")
            self.linear = jq.nn.Linear(weight("fp8", 7))

    def shapes(model):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(model))

    traced = nnx.eval_shape(lambda: prepare_model(Layer()))
    assert shapes(traced) == shapes(prepare_model(Layer()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": jnp.ones((4, 64))}, r"x of shape \(4, 64\)"),
        ({"gated": True}, r"\[rows, 256\] is needed"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, r"int32 \[2\] is needed"),
        ({"source": jnp.zeros(4, jnp.float32)}, "source float32"),
        ({"source": jnp.zeros((4, 1), jnp.int32)}, r"of shape \(4, 1\)"),
    ],
    ids=["x", "gated", "sizes", "float source", "2-D source"],
)
def test_wrong_operands_are_named(changes, words):
    given = {"x": jnp.ones((4, 128)), "bank": bank_of(("fp8",) * 2, (64, 128))}
    given |= {"group_sizes": jnp.array([1, 3], jnp.int32)} | changes
    with pytest.raises(jq.errors.LayoutError, match=words):
        jq.grouped_matmul(**given)


KIN = ("w4a16_g128", "fp8", "w4a16_g128_asym", "w4a16_g128")


def test_runs_that_differ_in_zero_points_alone_are_one():
    bank = bank_of(KIN, (64, 128))
    assert [run.stop for run in bank.runs] == [2, 3, 4]
    packed = prepare_bank(bank)
    assert [run.stop for run in packed.runs] == [3, 4]
    # Layers in a stack, and gate and up in one bank, keep what the run was made of.
    back = jax.jit(unprepare_bank)
    same(back(packed), bank)
    stacks = [jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one) for one in (packed, bank)]
    same(back(stacks[0]), stacks[1])
    both = join_banks(packed, packed)
    assert both is not None
    same(split_bank(both)[1], packed)
    sizes, x = jnp.asarray((2, 1, 3, 1), jnp.int32), rows(7, 128)
    by_xla = jax.jit(jq.grouped_matmul)
    expected = by_xla(x, bank, sizes)
    np.testing.assert_array_equal(by_xla(x, packed, sizes), expected)
    # Negative control: another zero point than the one that symmetric codes imply.
    kin, other = packed.parts
    record = kin.packed.record
    nine = kin.packed.records.at[:2, :, record.code_rows + record.scale_rows :].add(0x00010001)
    wrong = dataclasses.replace(kin, packed=dataclasses.replace(kin.packed, records=nine))
    got = by_xla(x, dataclasses.replace(packed, parts=(wrong, other)), sizes)
    np.testing.assert_array_equal(got[3:], expected[3:])
    assert oracle.relative(got[:3].astype(jnp.float32), expected[:3].astype(jnp.float32)) > 0.1


@pytest.mark.parametrize(
    "kinds",
    [
        ("w4a16_g128", "w4a16_g64_asym"),
        ("w4a16_g64", "act-order"),
        ("pre-scale", "w4a16_g128_asym"),
        ("w4a8_g128", "w4a16_g128_asym"),
        ("w8a16", "w4a16_g128_asym"),
    ],
    ids=str,
)
def test_runs_that_differ_in_more_stay_apart(kinds):
    bank = bank_of(kinds)
    assert len(bank.runs) == 2 and jax.eval_shape(prepare_bank, bank).runs == bank.runs


def test_explain_says_which_runs_are_one():
    columns = [[weight(kind, i, shape) for i, kind in enumerate(KIN)] for shape in SHAPES]
    plan = plan_experts(columns)
    gate, up, down = (bank_experts(plan, p, column.__getitem__) for p, column in enumerate(columns))
    experts = Experts((gate, up, down), plan, "silu")
    prepared = str(jq.explain(nnx.eval_shape(lambda: prepare_model(experts))))
    assert "2 of int4[out,in] scale 1x128 and 1 of uint4[out,in]" in prepared
    assert "as one run" in prepared and "as one run" not in str(jq.explain(experts))


@pytest.mark.interpret
def test_kernels_read_runs_that_are_one():
    bank = bank_of(("w4a16_g128", "w4a16_g128_asym"), (64, 128))
    packed = prepare_bank(bank)
    assert len(packed.parts) == 1
    sizes, x = jnp.asarray((2, 5), jnp.int32), rows(7, 128)
    expected = jq.grouped_matmul(x, bank, sizes, backend="xla").astype(jnp.float32)
    got = jq.grouped_matmul(x, packed, sizes, backend="interpret").astype(jnp.float32)
    assert oracle.relative(got, expected) < 4e-3
    wrong = jq.grouped_matmul(x, packed, sizes[::-1], backend="interpret").astype(jnp.float32)
    assert oracle.relative(wrong, expected) > 0.1


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_gate_and_up_join_where_a_cut_gives_them_back():
    kinds = ("w4a16_g128", "fp8", "fp8_b128", "w8a16", "bf16")
    gate, up = prepare_bank(bank_of(kinds)), prepare_bank(bank_of(kinds, seed=50))
    both = join_banks(gate, up)
    assert both is not None and both.parts[0].extent("out") == 2 * OUT
    for part, bank in zip(split_bank(both), (gate, up), strict=True):
        same(part, bank)
    sizes, x = jnp.asarray((2, 1, 3, 1, 5), jnp.int32), rows(12)
    separate = [jq.grouped_matmul(x, bank, sizes) for bank in (gate, up)]
    joined = jq.grouped_matmul(x, both, sizes)
    np.testing.assert_array_equal(joined, jnp.concatenate(separate, 1))


@pytest.mark.parametrize(
    ("one", "other"), [("act-order", "act-order"), ("fp8_tensor", "fp8_tensor"), ("fp8", "bf16")]
)
def test_what_only_values_could_tell_is_not_joined(one, other):
    assert join_banks(bank_of((one,)), bank_of((other,), seed=5)) is None


def test_every_run_gives_its_reasons():
    bank = bank_of(("w4a16_g128", "w3a16_g32", "fp8", "w4a8_g128", "bf16"))
    with pytest.raises(KernelError) as caught:
        jq.grouped_matmul(rows(5), bank, jnp.ones(5, jnp.int32), backend="pallas")
    reasons = dict(caught.value.reasons)
    assert len(reasons) == 3 and caught.value.action
    texts = " ".join(reasons.values())
    assert "prepare_model" in texts and "int3" in texts and "int8 x int4" in texts
    with pytest.raises(KernelError, match="float32"):
        x = rows(5).astype(jnp.float32)
        bank = prepare_bank(bank_of(("w4a16_g128",) * 5))
        jq.grouped_matmul(x, bank, jnp.ones(5, jnp.int32), backend="pallas")


def test_banks_on_a_mesh_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(select, "has_gpu", lambda: True)
    bank = bank_of(("fp8",) * 4)
    mesh = Mesh(np.array(jax.devices()[:2]), ("ep",))
    spread = jax.device_put(bank, NamedSharding(mesh, PartitionSpec("ep")))
    sizes = jnp.full(4, 2, jnp.int32)
    with pytest.raises(KernelError, match="mesh of 2 devices"):
        jq.grouped_matmul(rows(8), spread, sizes, backend="pallas")
    for stacked in (False, True):
        one = StackedBank(jax.tree.map(lambda leaf: leaf[None], spread), 0) if stacked else spread
        traced = jax.jit(lambda x, b: jq.grouped_matmul(x, b, sizes)).trace(rows(8), one)
        assert "custom_call @mosaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mesh of 2 devices" in select.explain_grouped(spread.parts[0], 8).reasons[0][1]


def test_a_layer_lowers_to_kernels_alone(monkeypatch):
    """Under jit for a GPU: a kernel for each run, no host call, no loop of the XLA path."""
    monkeypatch.setattr(select, "has_gpu", lambda: True)
    kinds = ("w4a16_g128", "fp8", "w8a16")
    banks = [bank_of(kinds, shape, i) for i, shape in enumerate(SHAPES)]
    plan = plan_experts([[weight(kind, i) for i, kind in enumerate(kinds)]] * 3)
    experts = prepare_model(Experts((banks[0], banks[1], banks[2]), plan, "silu"))
    assert experts.gate_proj is None and experts.gate_up_proj is not None

    def layer(experts, x, ids, weights):
        return experts(x, ids, weights)

    ids, weights = jnp.zeros((16, 2), jnp.int32), jnp.ones((16, 2))
    traced = jax.jit(layer).trace(experts, rows(16), ids, weights)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(\w+)", text)
    assert calls == ["mosaic_gpu_v2"] * 7, "a gather, and two projections of three runs"
    assert "stablehlo.while" not in text
    plain = unprepare_model(experts)
    for name, bank in zip(PROJECTIONS, banks, strict=True):
        same(getattr(plain, name).get_value(), bank)


def test_sorting_by_expert():
    for count in (7, 1300):
        position = np.random.default_rng(count).integers(0, 16, count).astype(np.int32)
        place, order, sizes = map(np.asarray, sort_by_expert(jnp.asarray(position), 16))
        np.testing.assert_array_equal(order, np.argsort(position, kind="stable"))
        np.testing.assert_array_equal(place, np.argsort(order))
        np.testing.assert_array_equal(sizes, np.bincount(position, minlength=16))
