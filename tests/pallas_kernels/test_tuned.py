"""The tuned config of a prepacked weight: its own or a like kind's, adapted to few tokens."""

import dataclasses

import pytest
from a16_cases import (
    MXFP4,
    NVFP4,
    Q8_0,
    QSERVE_CHANNEL,
    QSERVE_GROUP,
    TUNED_TWO_LEVEL,
    TUNED_WHOLE,
    Case,
)

from pallas_kernels import A16_KERNELS, W4A8_KERNELS, a16_problem, matmul_w4a8, w4a8_problem
from pallas_kernels.problem import H200, Problem, select, tuned_table
from pallas_kernels.stream_config import StreamConfig


def problem_of(case: Case) -> Problem:
    return (w4a8_problem if case.narrow else a16_problem)(**case.structs())


def config_of(problem: Problem) -> tuple[str, StreamConfig]:
    """Return the kernel and the config that a problem gets."""
    kernel, config = select((*A16_KERNELS, *W4A8_KERNELS), problem)
    assert isinstance(config, StreamConfig)
    return kernel.name, config


def chosen(case: Case) -> tuple[str, StreamConfig]:
    """Return the kernel and the config that a case gets."""
    return config_of(problem_of(case))


@pytest.mark.parametrize("kind", TUNED_WHOLE)
def test_tuned_configs_of_qserve_are_chosen(lower, kind):
    entries = [entry for entry in tuned_table(H200)["matmul_w4a8"] if entry["kind"] == kind]
    assert entries
    problem = problem_of(dataclasses.replace(TUNED_WHOLE[kind], m=8))
    assert problem.kind == kind
    for entry in entries:
        sizes = {name: entry[name] for name in ("m", "n", "k")}
        name, config = config_of(dataclasses.replace(problem, **sizes))
        assert (name, dataclasses.asdict(config)) == (entry["kernel"], entry["config"])
    largest = max(entries, key=lambda entry: entry["m"])  # with the tile that needs most
    case = dataclasses.replace(TUNED_WHOLE[kind], m=largest["m"], n=largest["n"], k=largest["k"])
    assert "mosaic_gpu" in lower(lambda given: matmul_w4a8(**given), case.structs())


def test_a_build_that_nobody_tuned_uses_the_other_one():
    """Channel scales at 64 tokens: those of groups at 64 are nearer than their own at 16."""
    group, channel = (
        dataclasses.replace(case, m=64, n=28672, k=4096) for case in (QSERVE_GROUP, QSERVE_CHANNEL)
    )
    assert chosen(group) == chosen(channel)


def test_products_scaled_in_floats_take_none_of_them():
    name, _ = chosen(Case(64, n=28672, k=4096, x="int8"))
    assert name == "w4a8"


def test_factors_and_float16_keep_the_configs_of_the_format():
    one = dataclasses.replace(TUNED_TWO_LEVEL[next(iter(TUNED_TWO_LEVEL))], m=16, n=28672, k=4096)
    assert one.code == NVFP4.code
    each = dataclasses.replace(one, factor=4096)
    half = dataclasses.replace(one, x="float16")
    assert problem_of(one).kind != problem_of(each).kind != problem_of(half).kind
    assert chosen(one) == chosen(each) == chosen(half)
    # Control: the commonest format has another config here.
    assert chosen(one) != chosen(Case(16, n=28672, k=4096))


@pytest.mark.parametrize("case", [QSERVE_GROUP, MXFP4, Q8_0, Case(0)], ids=str)
def test_up_to_64_tokens_are_one_tile(case):
    problem = problem_of(dataclasses.replace(case, m=8, n=6144, k=4096))
    for m in (8, 16, 24, 32, 40, 64):
        assert m <= config_of(dataclasses.replace(problem, m=m))[1].bm <= 64


def test_experts_keep_the_height_of_their_tiles():
    config = StreamConfig(bm=16)
    problem = problem_of(Case(24))
    assert config.adapted(problem).bm == 24
    assert config.adapted(dataclasses.replace(problem, experts=8)) == config
    assert config.adapted(dataclasses.replace(problem, m=40)).bm == 64
    assert config.adapted(dataclasses.replace(problem, m=65)) == config
