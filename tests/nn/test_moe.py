"""Expert layers of mixed formats against a loop over tokens that knows nothing of plans."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import ops
from jaxquant.arrays.bank import ExpertPlan, Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import PlanError
from jaxquant.nn.moe import Experts, Routing, route
from jaxquant.transforms.experts import bank_experts, expert_weight, plan_experts
from jaxquant.transforms.numeric import dequantize, quantize

HIDDEN, INNER = 64, 32


@functools.cache
def make(scheme: str, out: int, inn: int, seed: int) -> QTensor:
    """A weight ``[out, in]``; "act-order" is int4 in groups with rows in another order."""
    w = jax.random.normal(jax.random.key(seed), (out, inn)) / inn**0.5
    if scheme != "act-order":
        return quantize(w, scheme, ("out", "in"))
    perm = jax.random.permutation(jax.random.key(seed + 1), inn).astype(jnp.int32)
    q = quantize(w[:, perm], "w4a16_g32", ("out", "in"))
    return dataclasses.replace(q, perm=perm)


def columns_of(formats: list[tuple[str, str, str]]) -> list[list[QTensor]]:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [[make(f[p], *shapes[p], 10 * e + p) for e, f in enumerate(formats)] for p in range(3)]


def experts_of(columns: list[list[QTensor]], devices: int = 1) -> Experts:
    plan = plan_experts(columns, devices)
    gate, up, down = (bank_experts(plan, p, column.__getitem__) for p, column in enumerate(columns))
    return Experts((gate, up, down), plan, "silu")


def dense_of(columns: list[list[QTensor]]) -> list[list[np.ndarray]]:
    return [[np.asarray(dequantize(q), np.float64) for q in column] for column in columns]


def loop(x, ids, weights, dense: list[list[np.ndarray]]) -> np.ndarray:
    """Token by token, float64, original expert ids."""
    gate, up, down = dense
    y = np.zeros(x.shape)
    for t, j in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        e, row = ids[t, j], np.asarray(x[t], np.float64)
        g = gate[e] @ row
        y[t] += weights[t, j] * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ row)))
    return y


MIXED = [
    ("fp8a16", "fp8a16", "w4a16_g32"),
    ("w4a16_g32", "w4a16_g32", "fp8a16"),
    ("bf16", "bf16", "bf16"),
    ("w4a16_g32_asym", "fp8a16", "w8a16"),
    ("fp8a16", "fp8a16", "w4a16_g32"),
    ("act-order", "w4a16_g32", "act-order"),
    ("f32", "w3a16_g32", "f32"),
    ("w4a16_g32", "w4a16_g32", "fp8a16"),
]


@pytest.mark.parametrize(
    "tokens, top_k",
    [(1, 1), (1, 8), (5, 2), (64, 3), (17, 4), (300, 5), (9, 6), (1024, 7), (4096, 8)],
)
@pytest.mark.parametrize("skew", ["even", "one", "half"])
def test_mixed_experts_equal_the_loop(tokens: int, top_k: int, skew: str):
    columns = columns_of(MIXED)
    experts = experts_of(columns)
    rng = np.random.default_rng(tokens + top_k)
    usable = {"even": 8, "one": max(1, top_k), "half": max(4, top_k)}[skew]
    ids = np.stack([rng.permutation(usable)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    y = np.asarray(jax.jit(Experts.__call__)(experts, x, ids, weights))
    dense = dense_of(columns)
    expected = loop(x, ids, weights, dense)
    assert np.abs(y - expected).max() < 2e-5 * np.abs(expected).max() + 1e-6
    # Negative control: one token sent to another expert is seen.
    wrong = ids.copy()
    wrong[0, 0] = (ids[0, 0] + 1) % 8
    assert np.abs(y[0] - loop(x[:1], wrong[:1], weights[:1], dense)[0]).max() > 1e-2


def test_every_pattern_of_empty_experts():
    columns = columns_of(MIXED)
    dense, experts = dense_of(columns), experts_of(columns)
    call = jax.jit(Experts.__call__)
    x = np.random.default_rng(0).standard_normal((11, HIDDEN)).astype(np.float32)
    ones = np.ones((11, 1), np.float32)
    for used in itertools.product([False, True], repeat=8):
        if any(used):
            ids = np.resize(np.flatnonzero(used), (11, 1)).astype(np.int32)
            expected = loop(x, ids, ones, dense)
            assert np.abs(np.asarray(call(experts, x, ids, ones)) - expected).max() < 1e-4, used
    none = call(experts, x[:0], np.zeros((0, 1), np.int32), ones[:0])
    assert none.shape == (0, HIDDEN)


def test_plan_orders_all_projections_alike():
    columns = columns_of(MIXED)
    plan = plan_experts(columns)
    assert sorted(plan.order) == list(range(8)) and plan.ghosts == ()
    assert [plan.order[p] for p in plan.positions] == list(range(8))
    # One run per layout of the first projection: fp8, int4, bf16, asym, act-order, f32.
    assert len(plan.runs[0]) == 6
    assert all(runs[0].start == 0 and runs[-1].stop == 8 for runs in plan.runs)
    assert hash(plan) == hash(plan_experts(columns))
    uniform = plan_experts(columns_of([("fp8a16",) * 3] * 3))
    assert uniform.runs == ((Run(0, 3),),) * 3 and uniform.order == (0, 1, 2)


def test_runs_of_later_projections_continue_over_boundaries():
    a, b, c, d = "fp8a16", "w4a16_g32", "bf16", "f32"
    plan = plan_experts(columns_of([(a, a, c), (a, a, d), (b, b, c), (b, b, d)]))
    assert [len(runs) for runs in plan.runs] == [2, 2, 3]


def test_bank_gives_each_expert_back():
    columns = columns_of(MIXED)
    plan = plan_experts(columns)
    for p, column in enumerate(columns):
        bank = bank_experts(plan, p, column.__getitem__)
        for expert, q in enumerate(column):
            assert jax.tree.all(jax.tree.map(np.array_equal, expert_weight(bank, plan, expert), q))


def test_numpy_and_abstract_experts_bank_alike():
    columns = columns_of(MIXED[:3])
    plan = plan_experts(columns)
    real = bank_experts(plan, 0, columns[0].__getitem__)
    host = bank_experts(plan, 0, lambda e: jax.tree.map(np.asarray, columns[0][e]))
    shapes = bank_experts(plan, 0, lambda e: jax.eval_shape(lambda: columns[0][e]))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    assert jax.tree.all(jax.tree.map(np.array_equal, real, host))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), real
    )


def test_ghosts_fill_devices_and_are_never_reached():
    columns = columns_of(MIXED)
    plan = plan_experts(columns, devices=2)
    assert plan.local * 2 == len(plan.order) == 8 + len(plan.ghosts) and plan.experts == 8
    assert not set(plan.positions.tolist()) & set(plan.ghosts)
    bank = bank_experts(plan, 0, columns[0].__getitem__)
    for expert, q in enumerate(columns[0]):
        assert np.array_equal(expert_weight(bank, plan, expert).data[0], q.data[0])
    # Each device's share of every part has the same layout: that is what one program needs.
    lengths = [2 * (run.stop - run.start) for run in bank.runs]
    assert [part.lead[0] for part in bank.parts] == lengths
    share = jax.tree.map(lambda leaf: leaf[leaf.shape[0] // 2 :], bank)
    x = np.ones((3, HIDDEN), np.float32)
    expert = next(e for e in range(8) if plan.positions[e] >= plan.local)
    sizes = np.zeros(plan.local, np.int32)
    sizes[plan.positions[expert] - plan.local] = 3
    y = ops.grouped_matmul(jnp.asarray(x), share, jnp.asarray(sizes))
    assert np.abs(y - x @ np.asarray(dequantize(columns[0][expert])).T).max() < 1e-4


def test_plan_refuses_experts_of_different_shapes():
    columns = columns_of(MIXED[:2])
    columns[2][1] = make("bf16", HIDDEN, INNER * 2, 0)
    with pytest.raises(PlanError, match="projection 2") as error:
        plan_experts(columns, where="model.layers.0.mlp.experts")
    assert error.value.where == "model.layers.0.mlp.experts"
    with pytest.raises(PlanError):
        plan_experts([columns[0], columns[1][:1]])


def test_bank_refuses_an_expert_that_is_not_as_planned():
    columns = columns_of([("fp8a16",) * 3] * 2)
    plan = plan_experts(columns)
    with pytest.raises(PlanError, match="not like the rest"):
        bank_experts(plan, 0, lambda e: make("fp8a16" if e else "bf16", INNER, HIDDEN, e))


def scores(*rows: list[float]) -> jax.Array:
    return jnp.asarray(rows, jnp.float32)


def test_softmax_routing():
    logits = scores([0.0, 2.0, 1.0, -1.0])
    full = np.exp(logits[0]) / np.exp(logits[0]).sum()
    ids, weights = route(logits, Routing(4, 2, "softmax", normalize=False))
    assert ids.tolist() == [[1, 2]] and np.allclose(weights[0], full[[1, 2]])
    _, weights = route(logits, Routing(4, 2, "softmax", normalize=True))
    assert np.allclose(weights[0], np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum())


def test_correction_chooses_but_does_not_weigh():
    routing = Routing(4, 1, "sigmoid", normalize=False, scale=2.0)
    ids, weights = route(scores([0.0, 1.0, 0.0, 0.0]), routing, jnp.asarray([0.0, 0.0, 0.9, 0.0]))
    assert ids.tolist() == [[2]] and np.allclose(weights, 2 * 0.5)


def test_groups_limit_the_choice():
    # Group 0 holds the single best expert; group 1 the best pair.
    logits = scores([3.0, -3.0, 1.0, 1.0])
    pair = Routing(4, 2, "sigmoid", True, groups=2, top_groups=1, group_score="top2")
    assert sorted(route(logits, pair)[0][0].tolist()) == [2, 3]
    single = dataclasses.replace(pair, scores="softmax", group_score="max")
    assert sorted(route(logits, single)[0][0].tolist()) == [0, 1]
    # Corrected scores below zero still win over experts of closed groups.
    ids, _ = route(scores([0.0, 0.0, 0.0, 0.0]), pair, jnp.asarray([-0.9, -0.9, -0.8, -0.8]))
    assert sorted(ids[0].tolist()) == [2, 3]


def test_plan_is_static():
    plan = ExpertPlan((1, 0), ((Run(0, 2),),))
    assert plan.positions.tolist() == [1, 0] and plan.positions.dtype == np.int32
