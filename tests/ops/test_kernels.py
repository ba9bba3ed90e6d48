"""matmul through the Pallas kernels: the GPU interpreter on the CPU, against the XLA path.

The kernels themselves are tested in tests/pallas_kernels; here it is the connection: operands,
selection with reasons, prepared weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
import pallas_kernels as pk
from jaxquant.arrays.bank import ExpertBank, Run
from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import KernelError, LayoutError
from jaxquant.formats import gguf
from jaxquant.formats.gguf_types import TYPES
from jaxquant.formats.qserve import QSERVE
from jaxquant.nn.prepare import unprepare_model
from jaxquant.ops import select
from jaxquant.ops.fused import rms_norm_quantize, silu_mul_quantize
from jaxquant.ops.prepared import Prepared, prepare, unprepare
from tests.formats.cases import qserve
from tests.ops import oracle

A8 = ["fp8", "fp8_tensor", "fp8_b128", "w8a8", "w8a8_b128"]
PACKED = ["w4a16_g128", "w4a16_g32", "w4a16_g64_asym", "w4a16", "w8a16", "fp8a16"]
GGUF = ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
PACKED += ["w4a8_g128", "w4afp8_g128", "nvfp4a16", "mxfp4a16", "mxfp8a16"]
SHAPE = (128, 512)


def weight(scheme, shape=SHAPE, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jq.quantize(w, scheme, ("out", "in"))


def gguf_weight(name, shape=SHAPE, seed=0):
    """A weight as GGUF files hold it: random codes and sub-scales, moderate float16 scales."""
    kind, fmt = TYPES[name], gguf.BLOCK_FORMATS[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // kind.elements, kind.bytes), np.uint8)
    parts = fmt.split(blocks)

    def tame(leaf):
        narrow = leaf.dtype.itemsize == 1
        return leaf if narrow else (rng.uniform(0.5, 1, leaf.shape) / 64).astype(leaf.dtype)

    parts = parts._replace(
        scales=tuple(map(tame, parts.scales)), zeros=tuple(map(tame, parts.zeros))
    )
    return jax.tree.map(jnp.asarray, gguf.decode(fmt.join(parts).reshape(-1), kind, shape))


def qserve_weight(name):
    """A weight as QServe's files hold it, "group" or "channel", in both of its levels."""
    case = qserve(name == "group", SHAPE)
    spec = QSERVE.spec(case.config, case.module())
    q = QSERVE.decode(case.arrays, spec, SHAPE)
    return jax.tree.map(jnp.asarray, q), case.weight


def activation(rows=5, width=SHAPE[1]):
    x = np.random.default_rng(9).standard_normal((rows, width))
    return jnp.asarray(x, jnp.bfloat16)


def compare(x, q, packed):
    ours = jq.matmul(x, packed, backend="interpret").astype(jnp.float32)
    return oracle.relative(ours, jq.matmul(x, q, backend="xla").astype(jnp.float32))


@pytest.mark.interpret
@pytest.mark.parametrize("scheme", A8 + PACKED)
def test_kernels_agree_with_the_xla_path(scheme):
    q, x = weight(scheme), activation()
    packed = prepare(q)
    assert isinstance(packed, Prepared) == (scheme in PACKED)
    assert compare(x, q, packed) < 4e-3
    other = prepare(weight(scheme, seed=1))
    assert compare(x, q, other) > 0.5, "another weight must not pass"


@pytest.mark.interpret
@pytest.mark.parametrize("name", GGUF)
def test_gguf_weights_stay_packed(name):
    """Integer scales times super-scales are rounded to bfloat16 before the weight is."""
    q, x = gguf_weight(name), activation()
    packed = prepare(q)
    assert isinstance(packed, Prepared) and packed.nbytes <= 1.06 * q.nbytes
    assert compare(x, q, packed) < 6e-3
    assert compare(x, q, prepare(gguf_weight(name, seed=1))) > 0.5, "another weight must not pass"


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["group", "channel"])
def test_qserve_weights_become_int8_operands(name):
    """Both builds are exact but for the rounding of the result."""
    q, dense = qserve_weight(name)
    packed, x = prepare(q), activation()
    assert isinstance(packed, Prepared) and packed.nbytes <= 1.04 * q.nbytes
    y = jq.matmul(x, packed, backend="interpret")
    codes, scale, _ = pk.quantize(x, dtype=jnp.int8, layout="token", interpret=True)
    values = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
    assert oracle.relative(y, values @ dense.T) < 2.5e-3
    wrong = dataclasses.replace(q, zeros=(q.zeros[0] + 1,))
    assert (
        oracle.relative(jq.matmul(x, prepare(wrong), backend="interpret"), values @ dense.T) > 0.1
    )


@pytest.mark.interpret
def test_leading_axes_and_float16():
    q = weight("fp8")
    x = activation(6).astype(jnp.float16).reshape(2, 3, -1)
    y = jq.matmul(x, q, backend="interpret")
    assert y.shape == (2, 3, SHAPE[0]) and y.dtype == jnp.float16
    assert oracle.relative(y, jq.matmul(x, q, backend="xla")) < 4e-3


@pytest.mark.interpret
def test_act_order_and_pre_scale_travel_with_the_prepared_weight():
    rng = np.random.default_rng(3)
    q = dataclasses.replace(
        weight("w4a16_g64_asym"),
        perm=jnp.asarray(rng.permutation(SHAPE[1]), jnp.int32),
        pre_scale=jnp.asarray(rng.uniform(0.5, 2, (1, SHAPE[1])), jnp.float32),
    )
    assert compare(activation(), q, prepare(q)) < 4e-3


@pytest.mark.interpret
@pytest.mark.parametrize("static", [True, False])
def test_asymmetric_activations(static):
    act = ActSpec(CODES["int8"], "tensor" if static else "token", not static, symmetric=False)
    leaves = {"act_scale": jnp.full((1, 1), 0.03, jnp.float32)} if static else {}
    leaves |= {"act_zero": jnp.full((1, 1), -11, jnp.int8)} if static else {}
    q = dataclasses.replace(weight("w8a8"), act=act, **leaves).check()
    assert compare(activation(), q, q) < 4e-3


@pytest.mark.interpret
def test_levels_of_another_producer_are_kept():
    act = ActSpec(CODES["int8"], levels=127.5)
    q = dataclasses.replace(weight("w8a8"), act=act)
    assert compare(activation(), q, q) < 1e-6
    assert compare(activation(), q, weight("w8a8")) > 1e-4, "127 levels are another scale"


def any_weight(scheme):
    if scheme in ("group", "channel"):
        return qserve_weight(scheme)[0]
    return gguf_weight(scheme) if scheme.startswith("Q") else weight(scheme)


OTHER = ["w3a16_g64", "nvfp4", "bf16", "Q4_1", "group", "channel"]


@pytest.mark.parametrize("scheme", A8 + PACKED + GGUF + OTHER)
def test_prepare_is_exactly_invertible(scheme):
    q = any_weight(scheme)
    packed = jax.jit(prepare)(q)
    if not isinstance(packed, Prepared):
        assert prepare(q) is q
        return
    back = jax.jit(unprepare)(packed)
    assert back.layout == q.layout and back.act == q.act
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    np.testing.assert_array_equal(jq.matmul(activation(), packed), jq.matmul(activation(), q))
    assert packed.shape == q.shape and packed.extent("in") == SHAPE[1]


def reasons_of(x, q):
    with pytest.raises(KernelError) as caught:
        jq.matmul(x, q, backend="pallas")
    assert caught.value.action
    return dict(caught.value.reasons)


def test_every_refusal_has_its_reason():
    x = activation()
    assert "int3" in reasons_of(x, weight("w3a16_g64"))["matmul_a16"]
    assert "emulated" in reasons_of(x, weight("nvfp4"))["matmul_w4a8"]
    assert "uint2" in reasons_of(x, gguf_weight("Q2_K"))["matmul_a16"]
    assert "offsets" in reasons_of(x, gguf_weight("Q5_1"))["matmul_a16"]
    q, _ = qserve_weight("group")
    act = dataclasses.replace(q.act, code=CODES["e4m3"], levels=None)
    assert "int8" in reasons_of(x, dataclasses.replace(q, act=act))["matmul_w4a8"]
    half = reasons_of(x.astype(jnp.float16), prepare(weight("mxfp4a16")))["matmul_a16"]
    assert "range of bfloat16" in half
    assert "kernel order" in reasons_of(x, weight("w4a16_g64"))["matmul_a16"]
    turned = jq.quantize(np.ones((512, 128), np.float32), "fp8", ("in", "out"))
    assert "to_axes" in reasons_of(x, turned)["matmul_a8"]
    assert "multiple" in reasons_of(activation(5, 200), weight("fp8", (100, 200)))["matmul_a8"]
    assert (
        "float32" in reasons_of(x.astype(jnp.float32), prepare(weight("w4a16_g64")))["matmul_a16"]
    )
    with pytest.raises(LayoutError):
        jq.matmul(x[:, :64], prepare(weight("w4a16_g64")))


def test_explain_says_why_nothing_faster_runs():
    row = jq.explain(weight("fp8"), batch=16).rows[0]
    if jax.default_backend() == "cpu":
        assert row.kernel == "xla" and row.reasons == (("matmul_a8", "this process has no GPU"),)
    assert "e4m3" in str(jq.explain(weight("fp8")))
    assert jq.explain(weight("bf16")).rows[0].reasons == ()
    assert jq.explain(prepare(weight("w4a16_g64"))).rows[0].layout.startswith("int4")
    row = jq.explain(prepare(qserve_weight("group")[0])).rows[0]
    assert row.reasons == (("matmul_w4a8", "this process has no GPU"),) or row.kernel != "xla"


def kernels_in(function, *arguments):
    """How many kernels of ours a function launches on a GPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu")


def test_weights_on_a_mesh_are_left_to_xla(monkeypatch):
    """XLA cannot split a kernel: it would gather the weight on every device, in every call."""
    monkeypatch.setattr(select, "has_gpu", lambda: True)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    split = NamedSharding(mesh, PartitionSpec("tp"))
    x, q = activation(), weight("fp8")
    spread = jax.device_put(q, jax.tree.map(lambda leaf: split, q))
    here = NamedSharding(mesh, PartitionSpec())

    def column(x, q):
        return jq.matmul(x, q)

    assert kernels_in(column, x, q) == 2, "one that quantizes, one that multiplies"
    assert kernels_in(column, jax.device_put(x, here), spread) == 0
    assert "mesh of 2 devices" in reasons_of(x, spread)["matmul_a8"]
    with pytest.raises(KernelError, match="mesh of 2 devices"):
        jq.matmul(x, spread, backend="pallas")
    norm = jnp.ones(SHAPE[1], jnp.bfloat16)
    one, two = (
        kernels_in(lambda x, q: rms_norm_quantize(x, norm, 1e-6, [q]), x, w) for w in (q, spread)
    )
    assert (one, two) == (1, 0)
    specs = jax.tree.map(lambda leaf: PartitionSpec("tp"), q)
    inside = jax.shard_map(
        column, mesh=mesh, in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec(None, "tp")
    )
    assert kernels_in(inside, jax.device_put(x, here), spread) == 2, "a device's own part"


@pytest.mark.parametrize("scheme", [*A8, *PACKED])
def test_no_rows_have_no_kernel(scheme, monkeypatch):
    """A GPU gets them from XLA; kernels that are asked for by name say why they refuse."""
    x, q = activation()[:0], prepare(weight(scheme))
    taking = [reason for name, reason in reasons_of(x, q).items() if "at least 1" in reason]
    assert taking, "refused for having no rows"
    monkeypatch.setattr(select, "has_gpu", lambda: True)
    assert jq.matmul(x, q).shape == (0, SHAPE[0])
    one = jax.tree.map(lambda leaf: leaf[None], q)
    bank = ExpertBank((one,), (Run(0, 1),))
    assert jq.grouped_matmul(x, bank, jnp.zeros(1, jnp.int32)).shape == (0, SHAPE[0])
    fused = (
        rms_norm_quantize(x, jnp.ones(SHAPE[1]), 1e-5, [q]),
        silu_mul_quantize(jnp.concatenate([x, x], axis=1), [q]),
    )
    assert all(made.shape == x.shape for made in fused)


def test_kernels_refuse_no_rows_by_their_own_error():
    with pytest.raises(pk.KernelError, match="at least 1"):
        pk.quantize(activation()[:0], dtype=jnp.int8, layout="token")


def test_old_gpus_are_told_why(monkeypatch):
    old = pk.Device("NVIDIA A100", "8.0", 108, 163 * 1024)
    for module in ("matmul_a8", "matmul_a16"):
        monkeypatch.setattr(f"pallas_kernels.{module}.current_device", lambda: old, raising=False)
    import sys

    for name, module in list(sys.modules.items()):
        if name.startswith("pallas_kernels.") and hasattr(module, "current_device"):
            monkeypatch.setattr(module, "current_device", lambda: old)
    assert "9.0" in reasons_of(activation(), weight("fp8"))["matmul_a8"]


def test_a_model_is_prepared_and_saved_plain(tmp_path):
    from pathlib import Path

    base = jq.from_pretrained(Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe")
    small = jq.quantize_model(base, {r".*self_attn.*": "w4a16_g32"})
    packed = jq.prepare_model(small)
    ids = jnp.arange(8, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(packed(ids), small(ids))
    # Gate and up projections of experts have become one bank; q, k and v one weight.
    paths = {
        row.path.replace("gate_up_proj", "gate_proj").replace("qkv_proj", "q_proj")
        for row in jq.explain(packed).rows
    }
    gone = (".experts.up_proj", ".k_proj", ".v_proj")
    plain = {row.path for row in jq.explain(small).rows}
    assert paths == {path for path in plain if not any(name in path for name in gone)}
    kinds = {type(v.get_value()) for v in _weights(packed)}
    assert Prepared in kinds and Prepared not in {type(v.get_value()) for v in _weights(small)}
    assert Prepared not in {type(v.get_value()) for v in _weights(unprepare_model(packed))}
    jq.save_pretrained(packed, tmp_path / "saved")
    np.testing.assert_array_equal(jq.from_pretrained(tmp_path / "saved")(ids), small(ids))


def _weights(model):
    from flax import nnx

    return [node for _, node in nnx.iter_graph(model) if isinstance(node, jq.QWeight)]
