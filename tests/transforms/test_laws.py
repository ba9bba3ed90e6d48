"""The one law, for every layout of the design's table, on square and ragged shapes.

Every structural transform commutes with dequantize, a transform followed by its inverse is the
identity bit for bit, and an illegal cut names the legal ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, Layout, packed_grids
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import LayoutError
from jaxquant.transforms.leading import index_lead, stack, unstack
from jaxquant.transforms.numeric import dequantize, quantize
from jaxquant.transforms.repack import (
    aligned_copy,
    aligned_empty,
    is_host_memory,
    pack_codes,
    unpack_codes,
)
from jaxquant.transforms.shard import ShardingRules, shardings, specs
from jaxquant.transforms.structure import concat, pad_axis, refine, slice_axis, split, to_axes

SHAPES = [(256, 256), (576, 384)]
OUT_IN = ("out", "in")
# A weight is one program, not one an operation; test_formats compares those with the definition.
_quantize = jax.jit(quantize, static_argnames=("scheme", "axes"))
_dequantize = jax.jit(dequantize, static_argnames="axes")


def two_level(shape, code, inner, group, outer, affine="symmetric"):
    """Two scale leaves (and offsets) with random codes: QServe, NVFP4, K-quants."""
    rng = np.random.default_rng(0)
    out, inn = shape
    grids = packed_grids(CODES[code], OUT_IN, "in", inn)
    patterns = rng.integers(0, 1 << CODES[code].bits, shape).astype(np.uint8)
    fine = rng.integers(1, 60, (out, inn // group)).astype(inner)
    coarse_cells = (out, -(-inn // outer)) if outer else (out, 1)
    coarse = rng.uniform(0.01, 0.1, coarse_cells).astype(np.float16)
    scales = ((1, group), (1, outer or WHOLE))
    zeros = scales if affine == "offset" else ()
    layout = Layout(OUT_IN, CODES[code], grids, scales, zeros, affine)
    leaves = (fine, coarse)
    offsets = (fine[::-1].copy(), coarse[::-1].copy()) if zeros else ()
    return QTensor(pack_codes(patterns, CODES[code], grids), leaves, offsets, layout).check()


def act_order(shape):
    q = random_quantized("w4a16_g64_asym", shape)
    perm = np.random.default_rng(1).permutation(shape[1]).astype(np.int32)
    return dataclasses.replace(q, perm=perm)


@functools.cache
def random_quantized(scheme, shape):
    w = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    return jax.tree.map(np.asarray, _quantize(w, scheme, OUT_IN))


BUILDERS = {
    **{
        name: lambda shape, name=name: random_quantized(name, shape)
        for name in [
            "bf16",
            "fp8_tensor",
            "fp8",
            "fp8_b128",
            "w8a8",
            "w8a8_b128",
            "w4a16_g64",
            "w4a16_g128_asym",
            "w4a16",
            "w2a16_g64",
            "w3a16_g64",
            "w5a16_g128_asym",
            "w6a16_g64",
            "w7a16",
            "nvfp4",
            "mxfp4",
            "mxfp8",
        ]
    },
    "qserve": lambda shape: two_level(shape, "uint4", np.int8, 128, 0, "offset"),
    "q4_k": lambda shape: two_level(shape, "uint4", np.uint8, 32, 128, "offset"),
    "q3_k": lambda shape: two_level(shape, "int3", np.int8, 16, 128),
    "act_order": act_order,
}
CASES = [pytest.param(n, s, id=f"{n}-{s[0]}x{s[1]}") for n in BUILDERS for s in SHAPES]


def assert_same(a: QTensor, b: QTensor) -> None:
    """Bit for bit equality, layouts included."""
    assert a.layout == b.layout and a.act == b.act
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def value(q: QTensor, axes=OUT_IN) -> np.ndarray:
    return np.asarray(_dequantize(q, axes=axes))


@pytest.mark.parametrize("name,shape", CASES)
def test_transpose_commutes_and_inverts(name, shape):
    q = BUILDERS[name](shape)
    turned = to_axes(q, ("in", "out"))
    assert turned.shape == shape[::-1]
    np.testing.assert_array_equal(value(turned), value(q))
    np.testing.assert_array_equal(value(q, ("in", "out")), value(q).T)
    assert_same(to_axes(turned, OUT_IN), q)


@pytest.mark.parametrize("name,shape", CASES)
@pytest.mark.parametrize("axis", OUT_IN)
def test_every_legal_cut_commutes_and_concat_inverts_it(name, shape, axis):
    q = BUILDERS[name](shape)
    extent, span = q.extent(axis), q.layout.span(axis)
    if axis == "in" and q.perm is not None:
        with pytest.raises(LayoutError, match="act-order"):
            slice_axis(q, axis, 0, span)
        return
    cut = extent // 2 // span * span
    if cut == 0:
        pytest.skip("one cell covers the axis")
    left, right = split(q, axis, [cut, extent - cut])
    whole = value(q)
    position = OUT_IN.index(axis)
    np.testing.assert_array_equal(value(left), whole.take(range(cut), position))
    np.testing.assert_array_equal(value(right), whole.take(range(cut, extent), position))
    joined = concat([left, right], axis)
    np.testing.assert_array_equal(value(joined), whole)
    if all(grid[position] != WHOLE for grid in (*q.layout.scales, *q.layout.zeros)):
        assert_same(joined, q)


@pytest.mark.parametrize("name,shape", CASES)
def test_stack_and_index(name, shape):
    q = BUILDERS[name](shape)
    other = jax.tree.map(lambda leaf: leaf[..., ::-1, :].copy() if leaf.ndim > 1 else leaf, q)
    both = stack([q, other])
    assert both.layout == q.layout and both.shape == (2, *shape)
    assert_same(unstack(both)[0], q)
    assert_same(unstack(both)[1], other)
    np.testing.assert_array_equal(value(both)[1], value(other))
    mapped = jax.jit(jax.vmap(lambda part: dequantize(part)))(both)
    np.testing.assert_array_equal(np.asarray(mapped)[0], value(q))
    assert_same(index_lead(both, slice(1, 2)), stack([other]))


@pytest.mark.parametrize("name,shape", CASES)
@pytest.mark.parametrize("axis", OUT_IN)
def test_pad_keeps_values_and_adds_zeros(name, shape, axis):
    q = BUILDERS[name](shape)
    extent = q.extent(axis) + 2 * q.layout.span(axis)
    if q.layout.affine == "offset" or (axis == "in" and q.perm is not None):
        with pytest.raises(LayoutError):
            pad_axis(q, axis, extent)
        return
    padded = pad_axis(q, axis, extent)
    kept = value(padded).take(range(q.extent(axis)), OUT_IN.index(axis))
    np.testing.assert_array_equal(kept, value(q))
    added = value(padded).take(range(q.extent(axis), extent), OUT_IN.index(axis))
    assert added.size and not added.any()
    if q.extent(axis) % q.layout.span(axis) == 0:
        assert_same(slice_axis(padded, axis, 0, q.extent(axis)), q)


@pytest.mark.parametrize("name,shape", CASES)
def test_refine_is_lossless(name, shape):
    q = BUILDERS[name](shape)
    fine = refine(q, "out", 1)
    assert all(grid[0] == 1 for grid in (*fine.layout.scales, *fine.layout.zeros))
    np.testing.assert_array_equal(value(fine), value(q))


@given(st.sampled_from(sorted(BUILDERS)), st.sampled_from(SHAPES), st.data())
@settings(max_examples=60, deadline=None)
def test_any_slice_either_commutes_or_names_the_legal_cuts(name, shape, data):
    q = BUILDERS[name](shape)
    axis = data.draw(st.sampled_from(OUT_IN))
    extent, span = q.extent(axis), q.layout.span(axis)
    start = data.draw(st.integers(0, extent - 1))
    stop = data.draw(st.integers(start + 1, extent))
    legal = start % span == 0 and (stop % span == 0 or stop == extent)
    if legal and not (axis == "in" and q.perm is not None):
        part = slice_axis(q, axis, start, stop)
        expected = value(q).take(range(start, stop), OUT_IN.index(axis))
        np.testing.assert_array_equal(value(part), expected)
        return
    with pytest.raises(LayoutError) as caught:
        slice_axis(q, axis, start, stop)
    if not legal:
        bad = start if start % span else stop
        low = bad // span * span
        assert f"cut at {low} or {min(low + span, extent)}" in caught.value.action


@given(st.integers(2, 7), st.sampled_from(["int", "uint"]), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_packing_is_a_bijection(bits, kind, rows, data):
    code = CODES[f"{kind}{bits}"]
    columns = 8 * data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 1 << 30))
    patterns = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    grids = packed_grids(code, OUT_IN, "in", columns)
    planes = pack_codes(patterns, code, grids)
    assert sum(plane.nbytes for plane in planes) * 8 == patterns.size * bits
    np.testing.assert_array_equal(unpack_codes(planes, code, grids), patterns)


def test_the_first_element_is_in_the_low_nibble():
    code = CODES["uint4"]
    planes = pack_codes(np.array([[1, 2, 3, 4]], np.uint8), code, ((1, 2),))
    assert planes[0].tolist() == [[0x21, 0x43]]


def test_concat_never_requantizes_tensors_of_different_scale():
    parts = [random_quantized("fp8_tensor", (64, 128)), random_quantized("fp8_tensor", (32, 128))]
    parts[1] = jax.tree.map(lambda leaf: leaf * 7 if leaf.dtype == np.float32 else leaf, parts[1])
    joined = concat(parts, "out")
    np.testing.assert_array_equal(value(joined), np.concatenate([value(p) for p in parts]))
    assert joined.scales[0].shape == (3, 1), "one cell per 32 rows, not one per row"


def test_concat_inside_a_block_is_refused():
    parts = [random_quantized("fp8_b128", (576, 128)), random_quantized("fp8_b128", (128, 128))]
    with pytest.raises(LayoutError, match="inside a block of 128"):
        concat(parts, "out")


def test_concat_of_different_static_scales_is_refused():
    q = random_quantized("w8a8", (64, 64))
    parts = [dataclasses.replace(q, act_scale=np.full((1, 1), s, np.float32)) for s in (1, 2)]
    with pytest.raises(LayoutError, match="act_scale"):
        concat(parts, "out")


@pytest.mark.parametrize("name", ["fp8_b128", "w4a16_g64", "w8a8", "q4_k", "bf16"])
@pytest.mark.parametrize("axis", OUT_IN)
def test_sharded_weight_equals_the_whole(name, axis):
    q = jax.tree.map(jnp.asarray, BUILDERS[name]((512, 1024)))
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    rules = ShardingRules((("split", "tp"),))
    placed = jax.device_put(q, shardings(specs(q, {axis: "split"}, rules, mesh), mesh))
    data = placed.data[0]
    assert len(data.sharding.device_set) == 4
    assert data.addressable_shards[0].data.size * 4 == data.size
    np.testing.assert_array_equal(value(placed), value(q))


def test_sharding_checks_extents_not_cells():
    q = random_quantized("fp8_b128", (960, 256))
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    rules = ShardingRules((("ffn", "tp"),))
    assert q.scales[0].shape[0] % 4 == 0, "8 cells would split four ways"
    with pytest.raises(LayoutError, match="multiple of 128") as caught:
        specs(q, {"out": "ffn"}, rules, mesh, where="layers.0.mlp.gate_proj")
    assert "pad_axis('out', 1024)" in caught.value.action
    with pytest.raises(LayoutError, match="act-order"):
        specs(act_order((256, 256)), {"in": "ffn"}, rules, mesh)


def test_whole_scales_are_replicated():
    q = random_quantized("w8a8", (64, 128))
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    partition = specs(q, {"in": "x"}, ShardingRules((("x", "tp"),)), mesh)
    assert partition.data[0] == PartitionSpec(None, "tp")
    assert partition.scales[0] == PartitionSpec(None, None)
    assert isinstance(shardings(partition, mesh).scales[0], NamedSharding)


def test_a_leaf_of_the_wrong_shape_is_refused():
    q = random_quantized("fp8_b128", (576, 384))
    floor_grid = dataclasses.replace(q, scales=(q.scales[0][:4],))
    with pytest.raises(LayoutError, match=r"\(5, 3\)"):
        floor_grid.check("kv_a_proj")


def test_a_key_value_cache_is_a_qtensor_too():
    axes = ("seq", "head", "dim")
    rng = np.random.default_rng(5)
    codes = rng.standard_normal((2, 48, 4, 16)).astype(CODES["e4m3"].storage)
    scale = rng.uniform(0.1, 1, (2, 48, 4, 1)).astype(np.float32)
    layout = Layout(axes, CODES["e4m3"], ((1, 1, 1),), ((1, 1, WHOLE),))
    cache = QTensor((codes,), (scale,), (), layout).check("cache")
    dense = codes.astype(np.float32) * scale
    np.testing.assert_array_equal(np.asarray(dequantize(cache, axes=axes)), dense)
    turned = to_axes(cache, ("head", "seq", "dim"))
    np.testing.assert_array_equal(
        np.asarray(dequantize(turned, axes=("head", "seq", "dim"))), dense.swapaxes(1, 2)
    )
    assert_same(to_axes(turned, axes), cache)
    first, rest = split(cache, "seq", [13, 35])
    np.testing.assert_array_equal(np.asarray(dequantize(rest, axes=axes)), dense[:, 13:])
    assert_same(concat([first, rest], "seq"), cache)
    with pytest.raises(LayoutError, match="axes are"):
        slice_axis(cache, "in", 0, 1)


@pytest.mark.parametrize("rows", [3, 3000])
def test_aligned_memory_is_aligned_and_known_as_our_own(rows, tmp_path):
    array = aligned_empty((rows, 1024), np.dtype(np.float16))
    assert array.ctypes.data % 64 == 0 and array.flags.writeable
    assert is_host_memory(array) and is_host_memory(array[1:].view(np.uint8))
    array[...] = 1.5
    file = tmp_path / "mapped"
    file.write_bytes(array.tobytes())
    mapped = np.memmap(file, np.float16, "r")
    assert not is_host_memory(np.frombuffer(mapped._mmap, np.float16))
    copy = aligned_copy(np.frombuffer(mapped._mmap, np.float16))
    assert is_host_memory(copy) and copy.ctypes.data % 64 == 0 and (copy == 1.5).all()
