"""Mixture of experts: routing as each family does it, experts in any mix of formats."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import ops
from jaxquant.arrays.bank import ExpertBank, ExpertPlan
from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.basic import MLP, activation
from jaxquant.nn.linear import Buffer, Linear, QWeight

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a family turns router logits into experts and weights.

    ==============  =======  =========  ===========  ======
    family          scores   normalize  group_score  scale
    ==============  =======  =========  ===========  ======
    Mixtral         softmax  yes        --           1
    Qwen2/3-MoE     softmax  by config  --           1
    DeepSeek-V2     softmax  no         max          config
    DeepSeek-V3     sigmoid  by config  top2         config
    ==============  =======  =========  ===========  ======

    Attributes:
        experts: number of routed experts.
        top_k: experts of a token.
        scores: what makes logits into scores.
        normalize: divide the chosen scores by their sum.
        scale: factor of the weights.
        groups: experts come in so many groups of neighbours ...
        top_groups: ... of which a token may use so many.
        group_score: a group's worth: its best score or the sum of its two best.
    """

    experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid"]
    normalize: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


def route(
    logits: jax.Array, routing: Routing, correction: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Choose experts.

    Args:
        logits: float32 ``[token, expert]``.
        routing: the family's rule.
        correction: ``[expert]`` added to the scores for the choice only, never to the weights.
    Returns:
        Expert ids int32 and weights float32, both ``[token, top_k]``, best first.
    """
    scores = (
        jax.nn.softmax(logits, axis=-1) if routing.scores == "softmax" else jax.nn.sigmoid(logits)
    )
    choice = scores if correction is None else scores + correction.astype(jnp.float32)
    if routing.groups > 1:
        choice = _limit_groups(choice, routing)
    ids = jax.lax.top_k(choice, routing.top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if routing.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return ids, weights * routing.scale


def _limit_groups(choice: jax.Array, routing: Routing) -> jax.Array:
    """Rule out experts outside the best ``top_groups`` groups."""
    grouped = choice.reshape(choice.shape[0], routing.groups, -1)
    best = jax.lax.top_k(grouped, 1 if routing.group_score == "max" else 2)[0]
    allowed = jax.lax.top_k(jnp.sum(best, axis=-1), routing.top_groups)[1]
    rows = jnp.arange(choice.shape[0])[:, None]
    open_groups = jnp.zeros(grouped.shape[:2], bool).at[rows, allowed].set(True)
    return jnp.where(open_groups[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


class Router(nnx.Module):
    """Router logits and the choice of experts, in float32.

    Attributes:
        weight: ``[expert, hidden]``.
        e_score_correction_bias: ``[expert]`` (DeepSeek-V3) or None.
        routing: static rule.
    """

    def __init__(self, weight: QTensor, routing: Routing, correction: Any = None) -> None:
        self.weight = QWeight(weight)
        self.e_score_correction_bias = None if correction is None else Buffer(correction)
        self.routing = routing

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[token, hidden]`` to expert ids and weights ``[token, top_k]``."""
        logits = ops.matmul(x.astype(jnp.float32), self.weight.get_value())
        correction = self.e_score_correction_bias
        return route(logits, self.routing, None if correction is None else correction.get_value())


class Experts(nnx.Module):
    """The routed experts: three banks in one common order.

    Attributes:
        gate_proj, up_proj, down_proj: ExpertBanks.
        plan: static; where each expert id stands in the banks.
        hidden_act: gate activation.
    """

    def __init__(
        self, banks: tuple[ExpertBank, ExpertBank, ExpertBank], plan: ExpertPlan, hidden_act: str
    ) -> None:
        self.gate_proj, self.up_proj, self.down_proj = (QWeight(bank) for bank in banks)
        self.plan = plan
        self.hidden_act = hidden_act

    def __call__(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        """Sum of each token's experts.

        Rows are sorted by bank position once and stay so through all three projections.

        Args:
            x: ``[token, hidden]``.
            ids: int32 ``[token, top_k]`` expert ids.
            weights: float32 ``[token, top_k]``.
        Returns:
            ``[token, hidden]`` in the dtype of ``x``.
        """
        tokens, top_k = ids.shape
        position = jnp.asarray(self.plan.positions)[ids].reshape(-1)
        order = jnp.argsort(position, stable=True)
        sizes = jnp.bincount(position, length=len(self.plan.order)).astype(jnp.int32)
        rows = x[order // top_k]
        gate = ops.grouped_matmul(rows, self.gate_proj.get_value(), sizes)
        up = ops.grouped_matmul(rows, self.up_proj.get_value(), sizes)
        inner = activation(self.hidden_act, gate) * up
        outer = ops.grouped_matmul(inner, self.down_proj.get_value(), sizes)
        # Back in the order of tokens by a gather: unlike a scatter-add, sums have one fixed order.
        back = jnp.argsort(order)
        outer = outer[back].reshape(tokens, top_k, outer.shape[-1]).astype(jnp.float32)
        return jnp.sum(outer * weights[:, :, None], axis=1).astype(x.dtype)


class MoE(nnx.Module):
    """Router, routed experts, and the experts every token shares.

    Attributes:
        gate: the router.
        experts: the routed experts.
        shared_experts: an MLP for every token (DeepSeek), or None.
        shared_expert: same with a learnt gate (Qwen2-MoE), or None.
        shared_expert_gate: ``[1, hidden]``, or None.
    """

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        shared: MLP | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared if shared_gate is None else None
        self.shared_expert = shared if shared_gate is not None else None
        self.shared_expert_gate = shared_gate

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, token, hidden] -> [batch, token, hidden]``."""
        flat = x.reshape(-1, x.shape[-1])
        y = self.experts(flat, *self.gate(flat))
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            opened = jax.nn.sigmoid(self.shared_expert_gate(flat).astype(jnp.float32))
            y = y + self.shared_expert(flat) * opened.astype(x.dtype)
        return y.reshape(x.shape)
