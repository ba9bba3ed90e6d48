"""Wrong arguments of transforms: one error of the package, never one of NumPy's, XLA's or Python's.

Above all nothing comes back where something else was meant.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxquant.arrays.qtensor import dense
from jaxquant.errors import ConfigError, JaxquantError, LayoutError, PlanError
from jaxquant.transforms.experts import bank_experts, expert_weight, plan_experts
from jaxquant.transforms.leading import index_lead, stack, unstack
from jaxquant.transforms.numeric import as_numpy, dequantize, quantize, requantize, weight_only
from jaxquant.transforms.shard import ShardingRules, specs
from jaxquant.transforms.structure import concat, pad_axis, refine, slice_axis, split, to_axes

W = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
INT4 = quantize(W, "w4a16_g128", ("out", "in"))
NARROW = slice_axis(INT4, "in", 0, 128)
PLAN = plan_experts([[INT4, INT4]])
MESH = Mesh(np.array(jax.devices()[:1]), ("tp",))
RULES = ShardingRules((("inner", "tp"),))


def replaced(**fields):
    return dataclasses.replace(INT4, **fields)


CALLS = {
    "transpose an array": lambda: to_axes(W, ("in", "out")),
    "slice an array": lambda: slice_axis(W, "in", 0, 128),
    "slice at a fraction": lambda: slice_axis(INT4, "in", 0.0, 128.0),
    "split an array": lambda: split(W, "in", [128, 128]),
    "split in fractions": lambda: split(INT4, "in", [128.0, 128.0]),
    "split in a negative size": lambda: split(INT4, "in", [384, -128]),
    "join nothing": lambda: concat([], "in"),
    "join arrays": lambda: concat([W, W], "out"),
    "join what is no list": lambda: concat(INT4, "out"),
    "join other widths": lambda: concat([INT4, NARROW], "out"),
    "join a stack": lambda: concat([INT4, stack([INT4])], "out"),
    "refine an array": lambda: refine(W, "in", 1),
    "refine to a fraction": lambda: refine(INT4, "in", 1.5),
    "pad an array": lambda: pad_axis(W, "in", 512),
    "pad to a fraction": lambda: pad_axis(INT4, "in", 512.0),
    "stack nothing": lambda: stack([]),
    "stack None": lambda: stack(None),
    "join what comes one by one": lambda: concat((part for part in [INT4, INT4]), "out"),
    "stack arrays": lambda: stack([W, W]),
    "unstack an array": lambda: unstack(W),
    "index without leading axes": lambda: index_lead(INT4, 0),
    "index past the end": lambda: index_lead(stack([INT4, INT4]), 2),
    "index past the end of one of two": lambda: index_lead(stack([stack([INT4])]), (1, slice(1))),
    "index past the end on the host": lambda: index_lead(as_numpy(stack([INT4, INT4])), -3),
    "dequantize an array": lambda: dequantize(W),
    "dequantize to integers": lambda: dequantize(INT4, jnp.int8),
    "dequantize to no type": lambda: dequantize(INT4, "bfloat61"),
    "dequantize scales of another shape": lambda: dequantize(
        replaced(scales=(INT4.scales[0][:1],))
    ),
    "dequantize codes of another type": lambda: dequantize(
        replaced(data=(INT4.data[0].astype(jnp.int32),))
    ),
    "dequantize without scales": lambda: dequantize(replaced(scales=())),
    "dequantize with fractions as an order": lambda: dequantize(replaced(perm=jnp.zeros(256))),
    "requantize an array": lambda: requantize(W, "fp8"),
    "drop activations of an array": lambda: weight_only(W),
    "quantize by a number": lambda: quantize(W, 4),
    "quantize integers": lambda: quantize(W.astype(np.int8), "fp8"),
    "quantize complex numbers": lambda: quantize(W.astype(np.complex64), "fp8"),
    "quantize a vector": lambda: quantize(W[0], "fp8"),
    "quantize no inputs": lambda: quantize(W[:, :0], "fp8", ("out", "in")),
    "quantize a QTensor": lambda: quantize(INT4, "fp8"),
    "wrap a list": lambda: dense([[1.0]]),
    "wrap a vector": lambda: dense(W[0]),
    "plan for no device": lambda: plan_experts([[INT4]], devices=0),
    "plan arrays": lambda: plan_experts([[W, W]]),
    "bank a projection that is not there": lambda: bank_experts(PLAN, 1, lambda _: INT4),
    "bank arrays": lambda: bank_experts(PLAN, 0, lambda _: W),
    "an expert past the last": lambda: expert_weight(BANK, PLAN, 2),
    "an expert before the first": lambda: expert_weight(BANK, PLAN, -1),
    "shard an array": lambda: specs(W, {"out": "inner"}, RULES, MESH),
    "shard an axis that is not there": lambda: specs(INT4, {"ouut": "inner"}, RULES, MESH),
    "shard more leading axes": lambda: specs(INT4, {}, RULES, MESH, ("inner",)),
    "shard over another mesh": lambda: specs(
        INT4, {"out": "inner"}, ShardingRules((("inner", "ep"),)), MESH
    ),
}
BANK = bank_experts(PLAN, 0, lambda _: INT4)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_errors_of_the_package(name):
    with pytest.raises(JaxquantError) as caught:
        CALLS[name]()
    error = caught.value
    assert isinstance(error, LayoutError | ConfigError | PlanError)
    assert error.where and error.found and (error.rule or isinstance(error, PlanError))


CELLS = {
    "w8a8": (1, 256),
    "w4a16_g128": (1, 128),
    "w4a16_g128_asym": (1, 128),
    "fp8": (1, 256),
    "fp8_b128": (128, 128),
    "mxfp4": (1, 32),
    "mxfp8": (1, 32),
    "nvfp4": (1, 16),
}


@pytest.mark.parametrize("scheme", CELLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_leaves_its_cell_without_any(scheme, value):
    spoiled, zero = W.copy(), W.copy()
    spoiled[3, 5], zero[3, 5] = value, 0
    found, other = (
        np.asarray(dequantize(quantize(w, scheme, ("out", "in")))) for w in (spoiled, zero)
    )
    rows, columns = CELLS[scheme]
    cell = np.zeros(W.shape, bool)
    cell[:, :columns] = np.arange(len(W))[:, None] // rows == 3 // rows
    assert not np.isfinite(found[cell]).any()
    np.testing.assert_array_equal(found[~cell], other[~cell])
