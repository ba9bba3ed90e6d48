"""gather_rows and what quantize gathers: under the interpreter, lowered to CUDA, and on a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, gather_rows, quantize, quantize_and_keep

SOURCE = np.array([3, 1, -1, 0, 6, 3, -1, 2], np.int32)


def rows(count, width, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, width))
    return jnp.asarray(x, jnp.bfloat16)


def check_gathered(got, x, source, gated):
    """The rows asked for, exactly; a gate to the rounding of the result."""
    live, wide = source >= 0, np.asarray(x, np.float64)[source]
    got = np.asarray(got, np.float64)
    if not gated:
        np.testing.assert_array_equal(got[live], wide[live])
        return
    first, second = np.split(wide, 2, axis=1)
    expected = first / (1 + np.exp(-first)) * second
    np.testing.assert_allclose(got[live], expected[live], rtol=2**-8 * 1.1, atol=1e-6)


def check_quantized(run, gated, layout, source=SOURCE, tokens=7, k=512):
    """What a row is made of, not where, decides its codes and scale."""
    x = rows(tokens, k * (1 + gated))
    options = {"dtype": jnp.float8_e4m3fn, "layout": layout, "gated": gated}
    got = run(quantize, x, **options, source=jnp.asarray(source))
    plain = run(quantize, x, **options)
    live, axis = source >= 0, 1 if layout == "1x128" else 0
    codes = (np.asarray(a.codes).view(np.uint8) for a in (got, plain))
    scales = (np.asarray(a.scale) for a in (got, plain))
    for one, other, along in ((*codes, 0), (*scales, axis)):
        picked = one.take(np.flatnonzero(live), along)
        np.testing.assert_array_equal(picked, other.take(source[live], along))
        assert (picked != other.take((source[live] + 1) % tokens, along)).any(), "control"


def check_kept(run, gated, layout, source=SOURCE, tokens=7, k=512):
    """One kernel makes what two make, bit for bit."""
    x = rows(tokens, k * (1 + gated))
    options = {"dtype": jnp.float8_e4m3fn, "layout": layout, "gated": gated}
    kept, made = run(quantize_and_keep, x, **options, source=jnp.asarray(source))
    check_gathered(kept, x, source, gated)
    live = source >= 0
    plain = np.asarray(run(gather_rows, x, jnp.asarray(source), gated=gated))
    np.testing.assert_array_equal(np.asarray(kept)[live], plain[live])
    assert (np.asarray(kept)[live] != plain[np.roll(live, 1)][: live.sum()]).any(), "control"
    alone, axis = run(quantize, x, **options, source=source), 1 if layout == "1x128" else 0
    picked = np.flatnonzero(live)
    for one, other, along in ((made.codes, alone.codes, 0), (made.scale, alone.scale, axis)):
        one, other = (np.asarray(a).take(picked, along) for a in (one, other))
        np.testing.assert_array_equal(one, other)


@pytest.mark.interpret
@pytest.mark.parametrize("width", [1536, 256])
@pytest.mark.parametrize("gated", [False, True])
def test_gathered_under_the_interpreter(interpret, width, gated):
    x = rows(7, width)
    check_gathered(interpret(gather_rows, x, SOURCE, gated=gated), x, SOURCE, gated)
    with pytest.raises(AssertionError):
        wrong = np.roll(SOURCE, 1)
        check_gathered(interpret(gather_rows, x, SOURCE, gated=gated), x, wrong, gated)


@pytest.mark.interpret
@pytest.mark.parametrize(("gated", "layout"), [(False, "1x128"), (True, "token")])
def test_quantized_under_the_interpreter(interpret, gated, layout):
    check_quantized(interpret, gated, layout)


@pytest.mark.interpret
@pytest.mark.parametrize(("gated", "layout"), [(False, "1x128"), (True, "1x128"), (True, "token")])
def test_kept_under_the_interpreter(interpret, gated, layout):
    check_kept(interpret, gated, layout)


def test_kept_rows_lower_to_cuda(lower):
    for width, layout, gated in itertools.product((1536, 4096), ("token", "1x128"), (False, True)):
        options = {"dtype": jnp.float8_e4m3fn, "layout": layout, "gated": gated}
        x = jax.ShapeDtypeStruct((9, width * (1 + gated)), jnp.bfloat16)
        source = jnp.zeros(16, jnp.int32)
        call = functools.partial(quantize_and_keep, **options)
        assert "mosaic_gpu" in lower(lambda x, s, call=call: call(x, source=s), x, source)


@pytest.mark.parametrize("width", [768, 4096, 7168, 20480])
def test_rows_of_models_lower_to_cuda(lower, width):
    x, index = jax.ShapeDtypeStruct((9, width), jnp.bfloat16), jnp.zeros(16, jnp.int32)
    for gated in (False, True):
        call = functools.partial(gather_rows, gated=gated)
        assert "mosaic_gpu" in lower(call, x, index)


def test_operands_that_break_the_contract():
    for x, index in (
        (rows(3, 100), np.zeros(2, np.int32)),
        (rows(3, 128).astype(jnp.float32), np.zeros(2, np.int32)),
        (rows(3, 128), np.zeros((2, 1), np.int32)),
        (rows(3, 128), np.zeros(2, np.int16)),
    ):
        with pytest.raises(KernelError, match="gather_rows"):
            gather_rows(x, index)
    with pytest.raises(KernelError, match="source"):
        quantize(rows(3, 512), dtype=jnp.int8, layout="token", source=np.zeros(2, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 1536, 4096, 7168])
def test_gathered_on_the_device(width):
    rng = np.random.default_rng(width)
    x, source = rows(300, width), rng.integers(-20, 300, 5000).astype(np.int32)
    for gated in (False, True):
        check_gathered(gather_rows(x, source, gated=gated), x, source, gated)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", ["token", "1x128"])
def test_quantized_on_the_device(gated, layout):
    def run(function, *args, **kwargs):
        return function(*args, **kwargs)

    source = np.random.default_rng(1).integers(-20, 300, 5000).astype(np.int32)
    for k in (512, 1536, 4096):
        check_quantized(run, gated, layout, source, 300, k)
        check_kept(run, gated, layout, source, 300, k)
