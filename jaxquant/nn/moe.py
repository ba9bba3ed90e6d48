"""Mixture of experts: routing as each family does it, experts in any mix of formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxquant import ops
from jaxquant.arrays.bank import ExpertBank, ExpertPlan
from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.basic import MLP, activation
from jaxquant.nn.linear import Buffer, Linear, QWeight
from jaxquant.ops.sharded import Sharded, on_parts
from jaxquant.ops.sharded_bank import local_positions

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Rows that are compared with each other when sorting by expert.
CHUNK = 512


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


def sort_by_expert(position: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort rows by expert, keeping their order within each.

    A counting sort of comparisons and sums only: a few small GPU kernels, where a general sort is
    many and takes longer than a matmul of few tokens.

    Args:
        position: int32 ``[row]``, the bank position of each row's expert.
        experts: positions of the bank.
    Returns:
        int32: the place of each row in sorted order ``[row]``, the row at each place ``[row]``, and
        the number of rows of each expert ``[expert]``.
    """
    rows = position.shape[0]
    chunk = max(1, min(rows, CHUNK))
    chunks = jnp.pad(position, (0, -rows % chunk), constant_values=experts).reshape(-1, chunk)
    expert, index = jnp.arange(experts), jnp.arange(chunk)
    counts = jnp.sum(chunks[:, :, None] == expert, axis=1, dtype=jnp.int32)
    sizes = jnp.sum(counts, axis=0, dtype=jnp.int32)
    before = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    starts = before + jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
    earlier = (chunks[:, None, :] == chunks[:, :, None]) & (index[None, :] < index[:, None])
    rank = jnp.sum(earlier, axis=2, dtype=jnp.int32)
    place = jnp.take_along_axis(starts, jnp.minimum(chunks, experts - 1), axis=1) + rank
    place = place.reshape(-1)[:rows]
    order = (
        jnp.zeros_like(place).at[place].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    )
    # Else XLA computes the comparisons again for every element that is gathered by the result.
    return lax.optimization_barrier((place, order, sizes))


def _logits(x: jax.Array, weight: QTensor) -> jax.Array:
    """``x`` times the router's weight in float32."""

    def exact(x: jax.Array, weight: QTensor) -> jax.Array:
        return ops.matmul(x.astype(jnp.float32), weight)

    def tensor_cores(x: jax.Array, weight: QTensor) -> jax.Array:
        return jnp.einsum("ti,oi->to", x, weight.data[0], preferred_element_type=jnp.float32)

    plain = weight.layout.dense and weight.axes == ("out", "in")
    if not plain or x.dtype.itemsize != 2 or weight.data[0].dtype != x.dtype:
        return exact(x, weight)
    # Products of 16-bit numbers are exact in float32, in which tensor cores add them.
    return lax.platform_dependent(x, weight, cuda=tensor_cores, default=exact)


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
        logits = _logits(x, self.weight.get_value())
        correction = self.e_score_correction_bias
        return route(logits, self.routing, None if correction is None else correction.get_value())


class Experts(nnx.Module):
    """The routed experts: banks in one common order.

    Attributes:
        gate_proj, up_proj, down_proj: ExpertBanks.
        gate_up_proj: gate and up in one bank, which a prepared model may have in place of the two.
        plan: static; where each expert id stands in the banks.
        hidden_act: gate activation.
    """

    def __init__(
        self, banks: tuple[ExpertBank, ExpertBank, ExpertBank], plan: ExpertPlan, hidden_act: str
    ) -> None:
        gate, up, down = (QWeight(bank) for bank in banks)
        self.gate_proj: QWeight | None = gate
        self.up_proj: QWeight | None = up
        self.gate_up_proj: QWeight | None = None
        self.down_proj = down
        self.plan = plan
        self.hidden_act = hidden_act

    def _rows(
        self, banks: Sequence[Any], x: jax.Array, source: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        """``[row, hidden]``: of each row its token's output of its expert, not yet weighted."""
        *first, down = banks
        outer = [ops.grouped_matmul(x, bank, sizes, source=source) for bank in first]
        if len(outer) == 1:
            if self.hidden_act in ("silu", "swish"):
                return ops.grouped_matmul(outer[0], down, sizes, gated=True)
            outer = jnp.split(outer[0], 2, axis=1)
        gate, up = outer
        return ops.grouped_matmul(activation(self.hidden_act, gate) * up, down, sizes)

    def _banks(self) -> list[Any]:
        """Gate and up, apart or as one, then down."""
        variables = (self.gate_proj, self.up_proj, self.gate_up_proj, self.down_proj)
        return [variable.get_value() for variable in variables if variable is not None]

    def _sum(
        self,
        banks: Sequence[Any],
        position: jax.Array,
        experts: int,
        x: jax.Array,
        weights: jax.Array,
        elsewhere: bool = False,
    ) -> jax.Array:
        """Float32 ``[token, hidden]``: sum of each token's experts among those of the banks.

        Args:
            banks: gate and up, apart or as one, then down.
            position: int32 ``[token, top_k]``, where the experts stand.
            experts: positions of the banks.
            x: ``[token, hidden]``.
            weights: float32 ``[token, top_k]``.
            elsewhere: whether other devices have experts, whose position is ``experts`` here.
        """
        tokens, top_k = position.shape
        # Rows of other devices' experts come last, in no group.
        place, order, sizes = sort_by_expert(position.reshape(-1), experts + elsewhere)
        outer = self._rows(banks, x, order // top_k, sizes[:experts])
        # Back in the order of tokens by a gather: unlike a scatter-add, sums have one fixed order.
        outer = outer[place].reshape(tokens, top_k, outer.shape[-1]).astype(jnp.float32)
        weighted = outer * weights[:, :, None]
        if elsewhere:
            weighted = jnp.where((position < experts)[:, :, None], weighted, 0)
        return jnp.sum(weighted, axis=1)

    def _on_devices(
        self, banks: Sequence[Sharded], x: jax.Array, ids: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """Every device computes what its experts, or its parts of them, add to the tokens."""
        down = banks[-1]
        table = local_positions(self.plan.runs[-1], down.placements, down.mesh)
        of_id = jnp.asarray(table[:, self.plan.positions])
        expert_axis = next((p.expert for p in down.placements if p.expert is not None), None)
        inner = down.placement.inner

        def local(parts: Sequence[Any], x: jax.Array, ids: jax.Array, weights: jax.Array):
            device = 0 if expert_axis is None else lax.axis_index(expert_axis)
            position, elsewhere = of_id[device][ids], expert_axis is not None
            y = self._sum(parts, position, parts[-1].experts, x, weights, elsewhere)
            summed = tuple(axis for axis in (expert_axis, inner) if axis is not None)
            return lax.psum(y, summed) if summed else y

        return on_parts(local, banks, x, ids, weights)

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
        banks = self._banks()
        if isinstance(banks[-1], Sharded):
            return self._on_devices(banks, x, ids, weights).astype(x.dtype)
        position = jnp.asarray(self.plan.positions)[ids]
        return self._sum(banks, position, len(self.plan.order), x, weights).astype(x.dtype)


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
