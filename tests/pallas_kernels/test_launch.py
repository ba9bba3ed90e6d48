"""launch and selection: sharding types, refusals, choice among kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import KernelError, Problem, matmul_a8
from pallas_kernels.a8_decode_configs import DecodeConfig
from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.launch import can_interpret
from pallas_kernels.matmul_a8 import A8_KERNELS
from pallas_kernels.problem import H200, select, tuned_config

PROBLEM = Problem(
    op="matmul_a8",
    m=16,
    n=4096,
    k=4096,
    x_dtype="int8",
    w_dtype="int8",
    out_dtype="bfloat16",
    x_scale="token",
    w_scale="channel",
)


def test_results_vary_over_the_mesh_inside_shard_map(lower):
    """With check_vma on, a result that is not marked as varying cannot be returned sharded."""
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=axis_types, devices=jax.devices()[:1])
    sharded, whole = PartitionSpec("data"), PartitionSpec()
    function = jax.shard_map(
        matmul_a8, mesh=mesh, in_specs=(sharded, sharded, whole, whole), out_specs=sharded
    )
    operands = (
        jax.ShapeDtypeStruct((16, 256), jnp.int8),
        jax.ShapeDtypeStruct((16, 1), jnp.float32),
        jax.ShapeDtypeStruct((128, 256), jnp.int8),
        jax.ShapeDtypeStruct((128, 1), jnp.float32),
    )
    assert "mosaic_gpu" in lower(function, *operands)


@pytest.mark.skipif(can_interpret(), reason="this jax has the GPU interpreter")
def test_old_jax_says_that_it_cannot_interpret():
    x, w = jnp.ones((8, 128), jnp.int8), jnp.ones((64, 128), jnp.int8)
    with pytest.raises(KernelError, match=r"0\.11"):
        matmul_a8(x, jnp.ones((8, 1)), w, jnp.ones((64, 1)), interpret=True)


def test_other_gpus_are_refused_by_name():
    ada = dataclasses.replace(H200, name="NVIDIA L40S", capability="8.9")
    with pytest.raises(KernelError, match=r"L40S has 8\.9") as error:
        select(A8_KERNELS, dataclasses.replace(PROBLEM, device=ada))
    assert set(error.value.reasons) == {"a8_decode", "a8_prefill"}
    assert error.value.problem is not None


def test_what_nobody_tuned_gets_defaults_for_any_number_of_multiprocessors():
    for sms in (78, 114, 132):
        device = dataclasses.replace(H200, sms=sms)
        for m in (1, 13, 64, 200, 4096):
            # No table has fp8 scales of 1x128 with weights scaled per channel.
            problem = dataclasses.replace(PROBLEM, m=m, device=device, x_scale="1x128")
            assert tuned_config(A8_KERNELS, problem) is None
            _, config = select(A8_KERNELS, problem)
            assert config.refuses(problem) is None


def test_a_given_config_chooses_its_kernel():
    problem = dataclasses.replace(PROBLEM, m=128)
    for config, name in ((DecodeConfig(), "a8_decode"), (PrefillConfig(), "a8_prefill")):
        kernel, chosen = select(A8_KERNELS, problem, config)
        assert (kernel.name, chosen) == (name, config)


def test_a_config_that_does_not_fit_is_refused_with_its_size():
    with pytest.raises(KernelError, match="shared memory"):
        select(A8_KERNELS, dataclasses.replace(PROBLEM, m=512), PrefillConfig(stages=6))


@pytest.mark.parametrize("m", [1, 3, 8, 20, 32, 50])
def test_borrowed_decode_configs_read_the_weights_once(m):
    chosen = tuned_config(A8_KERNELS, dataclasses.replace(PROBLEM, m=m))
    assert chosen is not None
    kernel, config = chosen
    assert isinstance(config, DecodeConfig) and kernel.name == "a8_decode"
    assert config.bm >= min(m, 64)
