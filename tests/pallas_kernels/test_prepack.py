"""Prepacking: a bijection, with codes at the places where the kernels look for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from a16_cases import FORMATS, NARROW, TWO_LEVEL, Case

from pallas_kernels import KernelError, Prepacked, drop_zeros, prepack, store_zeros, unpack
from pallas_kernels.record import ZERO_BITS
from pallas_kernels.xla_a16 import dequantize


def bits(array) -> np.ndarray:
    """Return the bytes of an array, for exact comparison of any type."""
    return np.asarray(array).view(np.uint8)


def check_round_trip(case: Case, weight: Prepacked, plain: dict) -> None:
    got = jax.jit(unpack)(weight)
    for name in ("codes", "scales", "zeros"):
        found, want = jax.tree.leaves(getattr(got, name)), jax.tree.leaves(plain[name])
        for ours, theirs in zip(found, want, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_array_equal(bits(ours), bits(theirs))


SIZES = ((64, 64), (192, 320), (128, 512))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", [*FORMATS, *TWO_LEVEL, *NARROW], ids=str)
def test_unpack_inverts_prepack(case, size):
    case = dataclasses.replace(case, n=size[0], k=size[1])
    plain = case.plain()
    weight = case.pack(plain)
    assert weight.records.shape[0] == case.n // 64 * -(-case.k // 128)
    check_round_trip(case, weight, plain)


@pytest.mark.parametrize("group", [256, 384])
def test_groups_wider_than_a_record(group):
    case = Case(1, n=64, k=768, group=group, zero=True)
    plain = case.plain()
    check_round_trip(case, case.pack(plain), plain)


@pytest.mark.parametrize("case", [*FORMATS, *TWO_LEVEL, *NARROW], ids=str)
def test_records_hold_the_weight(case):
    """The values, read back from records, against float64."""
    plain = case.plain()
    np.testing.assert_allclose(
        jax.jit(dequantize)(case.pack(plain)), case.dense(plain), rtol=2e-7, atol=1e-30
    )


def test_a_stack_is_packed_layer_by_layer():
    case = Case(1, zero=True, group=64)
    layers = [case.plain(seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    packed = case.pack(stack)
    check_round_trip(case, packed, stack)
    alone = case.pack(layers[1])
    np.testing.assert_array_equal(packed.records[1], alone.records)


@pytest.mark.parametrize(
    ("channel", "k", "row", "word", "bit"),
    [
        # Thread 32 w + 4 r + t has channels 16 w + r and + 8; its words 0 .. 3 lie in rows 0 .. 15.
        (0, 0, 0, 0, 0),
        (0, 1, 0, 0, 16),
        (8, 0, 0, 0, 4),
        (0, 8, 0, 0, 8),
        (0, 16, 0, 1, 0),
        (0, 2, 0, 4, 0),
        (1, 0, 0, 16, 0),
        (16, 0, 4, 0, 0),
        (0, 64, 16, 0, 0),
        (63, 127, 31, 31, 28),
    ],
)
def test_spot_positions_of_4_bit_codes(channel, k, row, word, bit):
    codes = np.zeros((64, 128), np.uint8)
    codes[channel, k] = 15
    packed = prepack(jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4), jnp.ones((64, 1)))
    words = np.asarray(packed.records).view(np.uint32)[0, :32]
    expected = np.zeros((32, 32), np.uint32)
    expected[row, word] = np.uint32(15) << np.uint32(bit)
    np.testing.assert_array_equal(words, expected)


def test_spot_positions_of_scales_and_zeros():
    scales = jnp.arange(64, dtype=jnp.bfloat16).reshape(64, 1)
    zeros = (np.arange(64, dtype=np.uint8) % 16).reshape(64, 1)
    packed = prepack(jnp.zeros((64, 64), jnp.uint8), scales, jnp.asarray(zeros))
    scale_row, zero_row = np.asarray(packed.records)[0, 32:34].view(np.uint16)
    raw = np.asarray(scales).reshape(-1).view(np.uint16)
    # Channels 16 w + r and 16 w + r + 8 share word 8 w + r.
    assert scale_row[0] == raw[0] and scale_row[1] == raw[8]
    assert scale_row[2 * 9] == raw[17] and scale_row[2 * 9 + 1] == raw[25]
    assert zero_row[1] == ZERO_BITS | 8


@pytest.mark.parametrize("scale", ["bfloat16", "float32"])
def test_implied_zeros_are_stored_and_dropped(scale):
    codes = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    scales = jnp.ones((64, 2), scale)
    implied = prepack(jnp.asarray(codes), scales, group=64)
    stored = prepack(jnp.asarray(codes), scales, jnp.full((64, 2), 8, jnp.uint8), group=64)
    for got, want in ((store_zeros(implied), stored), (drop_zeros(stored), implied)):
        assert got is not None and jax.tree.structure(got) == jax.tree.structure(want)
        np.testing.assert_array_equal(got.records, want.records)
    assert store_zeros(stored) is None
    assert store_zeros(prepack(jnp.zeros((64, 128), jnp.int8), jnp.ones((64, 1)))) is None


def test_bits_outside_the_codes_change_nothing_else():
    """Negative control: one flipped bit in a record changes exactly one code or scale."""
    case = Case(1, zero=True)
    weight = case.pack(case.plain())
    before = unpack(weight)
    for row in (0, 31, 32, 33):
        records = weight.records.at[1, row, 5].set(weight.records[1, row, 5] ^ 1)
        after = unpack(dataclasses.replace(weight, records=records))
        changed = [np.sum(bits(a) != bits(b)) for a, b in zip(before, after, strict=True)]
        assert sum(changed) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros((100, 64), np.uint8)}, "multiples of 64"),
        ({"codes": np.zeros((64, 64), np.int32)}, "int32"),
        ({"scales": np.ones((64, 2), np.float32)}, "scales"),
        ({"scales": np.ones((64, 1), np.int8)}, "int8"),
        ({"group": 48, "scales": np.ones((64, 3), np.float32)}, "group 48"),
        ({"zeros": np.zeros((64, 1), np.int32)}, "zeros"),
        ({"codes": np.zeros((64, 128), np.int8), "zeros": np.zeros((64, 1), np.uint8)}, "zero"),
        ({"codes": np.zeros((64, 128), np.int8), "operand": 8}, "operand"),
    ],
)
def test_refusals(change, message):
    given = {"codes": np.zeros((64, 64), np.uint8), "scales": np.ones((64, 1), np.float32)}
    with pytest.raises(KernelError, match=message):
        prepack(**{**given, **change})
