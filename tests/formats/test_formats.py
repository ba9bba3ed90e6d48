"""Every format by itself: values, round trip, declared layout, errors, laws, negative controls."""

import functools

import jax
import numpy as np
import pytest

from jaxquant.arrays.layout import WHOLE
from jaxquant.convert.read import build_module
from jaxquant.errors import FormatError
from jaxquant.formats import FORMATS, detect
from jaxquant.formats.checks import verify
from jaxquant.formats.dense import DENSE
from jaxquant.transforms.leading import stack, unstack
from jaxquant.transforms.numeric import dequantize
from jaxquant.transforms.structure import concat, refine, slice_axis, split, to_axes
from tests.formats.cases import CASES

NAMES = sorted(CASES)
WEIGHTS = ("qweight", "weight_packed", "weight", "blocks", "W_q", "_weight_qdata", "B")
ACTIVATION_SCALES = (
    "input_scale",
    "activation_scale",
    "input_global_scale",
    "pre_quant_scale",
    "qscale_act",
)
OPTIONAL = {"g_idx", "weight_shape", "weight_format", "workspace", "pre_quant_scale"}
# Without the tensor the rest is another arrangement of its family, which lacks something else.
SEEN_AS_OTHER = {
    ("bnb-int8", "SCB"): "0 quantization states",
    ("qserve-group", "s2_scales"): "s1_szeros: missing",
}
# Without the static scale these are read as what they then are: dynamic.
DYNAMIC_WITHOUT = {("modelopt-w4a8_nvfp4_fp8", "input_scale"), ("fp8-mistral", "qscale_act")}


def is_scale(suffix):
    """Whether a suffix is that of a weight scale."""
    return suffix in ("s", "SCB") or ("scale" in suffix and suffix not in ACTIVATION_SCALES)


def build(case, **changes):
    """The module as the reader builds it."""
    module = case.module(**changes)
    fmt = detect(case.config) if case.config else DENSE
    assert fmt.name == case.format
    return build_module(fmt, fmt.spec(case.config, module), module)


def load(case, **changes):
    return build(case, **changes).load()


def value(q, axes=("out", "in")):
    return np.asarray(dequantize(q, axes=axes))


@functools.partial(jax.jit, static_argnames="axes")
def _fused(q, axes):
    return dequantize(q, axes=axes)


def fused(q, axes=("out", "in")):
    """The value by one program, for laws that hold whatever the value is."""
    return np.asarray(_fused(q, axes))


def leaves(q):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(q)]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.tobytes() == y.tobytes()


def test_every_format_has_a_case():
    covered = {case.format for case in CASES.values()}
    assert covered >= {fmt.name for fmt in FORMATS}


@pytest.mark.parametrize("name", NAMES)
def test_value_is_that_of_the_definition(name):
    case = CASES[name]
    got = value(load(case))
    assert got.shape == case.weight.shape
    if case.exact:
        np.testing.assert_array_equal(got, case.weight.astype(np.float32))
    else:
        np.testing.assert_allclose(
            got, case.weight, rtol=3e-7, atol=1e-7 * np.abs(case.weight).max()
        )


@pytest.mark.parametrize("name", NAMES)
def test_encode_is_the_inverse_of_decode(name):
    case = CASES[name]
    module = build(case)
    q = module.load()
    arrays = module.format.encode(q, module.spec)
    same(module.format.decode(arrays, module.spec, module.shape), q)
    if case.reversible:
        for suffix, array in case.arrays.items():
            got = arrays[suffix]
            assert (got.shape, got.dtype) == (array.shape, array.dtype), suffix
            assert np.ascontiguousarray(got).tobytes() == array.tobytes(), suffix


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_known_before_reading(name):
    module = build(CASES[name])
    abstract, q = module.abstract(), module.load()
    assert module.layout == q.layout
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    for promised, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(q), strict=True):
        assert (promised.shape, promised.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_slot_is_named(name):
    case = CASES[name]
    module = build(case)
    optional = OPTIONAL | ({"qzeros"} if module.spec.affine == "symmetric" else set())
    required = [s.suffix for s in module.format.slots(module.spec, module.shape) if s.required]
    required = [suffix for suffix in required if suffix not in optional]
    assert required
    for suffix in required:
        if (name, suffix) in DYNAMIC_WITHOUT:
            continue
        with pytest.raises(FormatError) as caught:
            build(case, **{suffix: None})
        assert case.path in caught.value.where
        assert SEEN_AS_OTHER.get((name, suffix), suffix) in str(caught.value), suffix


def one_of_each_layout():
    """One case for every layout; how the tensors lie on disk is nothing to a transform."""
    first = {}
    for name in NAMES:
        module = build(CASES[name])
        first.setdefault((module.layout, module.spec.perm, module.spec.act_scale), name)
    return sorted(first.values())


@pytest.mark.parametrize("name", one_of_each_layout())
def test_structure_commutes_with_dequantize(name):
    q = load(CASES[name])
    whole = fused(q)
    np.testing.assert_array_equal(fused(to_axes(q, ("in", "out")), ("in", "out")), whole.T)
    same(to_axes(to_axes(q, ("in", "out")), ("out", "in")), q)
    span = q.layout.span("out")
    if span < q.shape[0]:
        np.testing.assert_array_equal(fused(slice_axis(q, "out", 0, span)), whole[:span])
        parts = split(q, "out", [span, q.shape[0] - span])
        joined = concat(parts, "out")
        np.testing.assert_array_equal(fused(joined), whole)
    span = q.layout.span("in")
    if span < q.shape[1] and q.perm is None:
        part = slice_axis(q, "in", span, q.shape[1])
        np.testing.assert_array_equal(fused(part), whole[:, span:])
    stacked = stack([q, q])
    np.testing.assert_array_equal(fused(stacked), np.stack([whole, whole]))
    same(unstack(stacked)[1], q)
    if q.scales and all(grid[0] != WHOLE for grid in q.layout.scales):
        np.testing.assert_array_equal(fused(refine(q, "out", 1)), whole)


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_bit_is_seen(name):
    """Negative control: the comparison above would notice a wrong code or a wrong scale."""
    case = CASES[name]
    whole = value(load(case))
    main = next(s for s in WEIGHTS if s in case.arrays)
    scale = next((s for s in case.arrays if is_scale(s)), None)
    for suffix in filter(None, (main, scale)):
        changed = case.arrays[suffix].copy()
        octets = changed.reshape(-1).view(np.uint8)
        octets[0] ^= np.uint8(0x02)
        assert not np.array_equal(value(load(case, **{suffix: changed})), whole), suffix


def float_scale(case):
    """The suffix of the case's floating point weight scale, if it has one."""
    return next((s for s in case.arrays if is_scale(s) and case.arrays[s].dtype.itemsize > 1), None)


@pytest.mark.parametrize("name", [name for name in NAMES if float_scale(CASES[name])])
def test_bad_scales_are_refused(name):
    case = CASES[name]
    scale = float_scale(case)
    for bad in (np.nan, np.inf):
        changed = case.arrays[scale].copy()
        changed.reshape(-1)[0] = bad
        with pytest.raises(FormatError) as caught:
            load(case, **{scale: changed})
        assert case.path in caught.value.where


def test_verify_sees_a_leaf_of_the_wrong_shape():
    module = build(CASES["fp8-block-square"])
    q = module.load()
    wrong = jax.tree.map(lambda leaf: leaf, q)
    object.__setattr__(wrong, "scales", (q.scales[0][:1],))
    with pytest.raises(ValueError, match="needs"):
        verify(wrong, module.spec)
