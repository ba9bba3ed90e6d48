"""grouped_matmul_dense against float64: interpreted, lowered to CUDA, and on a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import GROUPED_DENSE_KERNELS, KernelError, grouped_matmul_dense
from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.grouped_dense import grouped_dense_problem

UNTOUCHED = 7.0
DECODE = DecodeConfig(bm=16, stages=3, split=1)
PREFILL = PrefillConfig(bn=128, stages=3)
TOLERANCE = 2 * oracle.rounding("bfloat16")


def operands(sizes, n=128, k=192, dtype="bfloat16", spare=0):
    """Rows of each expert (and of none), and the weights."""
    rng = np.random.default_rng(sum(sizes))
    x = rng.standard_normal((sum(sizes) + spare, k))
    w = rng.standard_normal((len(sizes), n, k))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def products(x, w):
    """Every row by every expert, [experts, rows, n] in float64."""
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).transpose(0, 2, 1)


def expected(x, w, sizes):
    owner = np.repeat(np.arange(len(sizes)), np.asarray(sizes))
    return products(x[: len(owner)], w)[owner, np.arange(len(owner))]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ((3, 0, 14, 2), DECODE),
        ((1, 0, 0), DecodeConfig(8, 3, 1, 2, 1)),
        ((3, 0, 140, 2), PREFILL),
    ],
)
def test_each_row_meets_its_expert(interpret, sizes, config):
    given = operands(sizes)
    got = interpret(grouped_matmul_dense, *given, config=config)
    assert oracle.relative_error(got, expected(*given)) < TOLERANCE
    if sum(sizes) > 1:
        x, w, counts = given
        wrong = expected(x, w, counts + jnp.array([-1, 1] + [0] * (len(sizes) - 2)))
        assert oracle.relative_error(got, wrong) > 4 * TOLERANCE


@pytest.mark.interpret
@pytest.mark.parametrize("config", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_rows_of_others_keep_their_values(interpret, config):
    x, w, sizes = operands((5, 29, 4), spare=3)
    into = jnp.full((x.shape[0], 128), UNTOUCHED, x.dtype)
    got = interpret(grouped_matmul_dense, x, w[1:2], sizes, first=1, into=into, config=config)
    assert oracle.relative_error(got[5:34], expected(x, w, sizes)[5:34]) < TOLERANCE
    assert (got[:5] == UNTOUCHED).all() and (got[34:] == UNTOUCHED).all()


@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_every_candidate_lowers_to_cuda(lower, rows):
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows * 8, 2048), (8, 1536, 2048)))
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    problem = grouped_dense_problem(x, w, sizes)
    assert "mosaic_gpu" in lower(grouped_matmul_dense, x, w, sizes)
    for kernel in GROUPED_DENSE_KERNELS:
        if kernel.accepts(problem) is None:
            config = next(iter(kernel.candidates(problem)))
            call = functools.partial(grouped_matmul_dense, config=config)
            assert "mosaic_gpu" in lower(call, x, w, sizes)


def test_operands_that_break_the_contract():
    x, w, sizes = operands((3, 4))
    for wrong in (
        {"x": x.astype(jnp.float16)},
        {"x": x[:, :64]},
        {"w": w[0]},
        {"group_sizes": sizes[:1]},
        {"group_sizes": sizes.astype(jnp.float32)},
        {"first": 1},
        {"into": jnp.zeros((7, 64), x.dtype)},
        {"w": w[:, :100]},
    ):
        with pytest.raises(KernelError):
            grouped_matmul_dense(**({"x": x, "w": w, "group_sizes": sizes} | wrong))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_patterns_on_the_device(dtype):
    """Every pattern of empty experts, by one program for each height of a tile."""
    for mean in (1, 24, 150):
        x, w, _ = operands((mean,) * 8, 256, 512, dtype)
        call, every = jax.jit(grouped_matmul_dense), products(x, w)
        rng = np.random.default_rng(mean)
        for filled in itertools.product([0, 1], repeat=8):
            sizes = rng.multinomial(x.shape[0], np.full(8, 1 / 8)) * np.array(filled)
            owner = np.repeat(np.arange(8), sizes)
            if owner.size:
                got = np.asarray(call(x, w, jnp.asarray(sizes, jnp.int32)))[: owner.size]
                error = oracle.relative_error(got, every[owner, np.arange(owner.size)])
                assert error < 2 * oracle.rounding(dtype), sizes


@pytest.mark.gpu
def test_every_candidate_on_the_device():
    for sizes in ((0, 0, 7, 1), (3, 5, 1, 9, 17, 2, 31, 8), (1, 0, 260, 3, 0, 0, 13, 129)):
        given = operands(sizes, 384, 640)
        want, problem = expected(*given), grouped_dense_problem(*given)
        for kernel in GROUPED_DENSE_KERNELS:
            if kernel.accepts(problem) is None:
                for config in kernel.candidates(problem):
                    got = grouped_matmul_dense(*given, config=config)
                    assert oracle.relative_error(got, want) < TOLERANCE, config
