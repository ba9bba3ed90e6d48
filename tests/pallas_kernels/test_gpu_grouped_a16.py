"""grouped_matmul_a16 on a Hopper GPU: formats, configs and group sizes against float64."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterable

import jax
import numpy as np
import oracle
import pytest
from a16_cases import NVFP4, Case
from grouped_cases import Groups, patterns
from test_gpu_grouped_a8 import PATTERNS
from test_grouped_a16 import PLAIN

from pallas_kernels.grouped_a16 import GROUPED_A16_KERNELS, grouped_a16_problem, grouped_matmul_a16

pytestmark = pytest.mark.gpu

KINDS = {
    "w4a16": Case(0, n=256, k=512, zero=True),
    "nvfp4": dataclasses.replace(NVFP4, n=256, k=512),
    "w8a16": Case(0, n=256, k=512, code="int8", group=None, scale="float32"),
}
# Rows of the arrays; those beyond the sizes of the groups belong to nobody.
ROWS = 768


class Program:
    """A format's weight of some experts, and one compiled program for every group size."""

    def __init__(self, case: Case, experts: int, config: object = None):
        self.groups = Groups(case, (1,) * experts)
        given = {"weight": self.groups.weight(), **self.groups.operands()}
        self.first = given.pop("first")
        self.given = jax.device_put(given)
        self.dense = [case.dense(case.plain(expert)) for expert in range(experts)]
        self.x = np.asarray(given["x"], np.float64)

        def call(given):
            return grouped_matmul_a16(**given, first=self.first, config=config)

        self.call = jax.jit(call).lower(self.given).compile()

    def error(self, sizes: Iterable[int]) -> float:
        """Return the error of all rows that have an expert, in roundings of the result."""
        sizes = np.asarray(list(sizes), np.int32)
        given = {**self.given, "group_sizes": jax.device_put(sizes)}
        rows = int(sizes.sum())
        got, again = (np.asarray(self.call(given))[:rows] for _ in range(2))
        if not (got == again).all():
            return np.inf
        ends = np.cumsum(sizes)
        parts = [
            self.x[end - size : end] @ w.T
            for end, size, w in zip(ends, sizes, self.dense, strict=True)
        ]
        if not rows:
            return 0.0
        case = self.groups.case
        return float(oracle.relative_error(got, np.concatenate(parts))) / oracle.rounding(case.out)


def programs(jobs: list[tuple[Case, int, object]]) -> list[Program]:
    """Compile (case, experts, config) on all cores."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda job: Program(*job), jobs))


def check(program: Program, all_sizes: Iterable[Iterable[int]], name: str = "") -> None:
    """Fail with all sizes that are off, by as much as `test_a16_gpu` allows of many tokens."""
    errors = {tuple(map(int, sizes)): program.error(sizes) for sizes in all_sizes}
    print(f"{name} {len(errors)} problems, worst {max(errors.values()):.2f} of the rounding error")
    wrong = {sizes: error for sizes, error in errors.items() if not error < 2.5}
    assert not wrong, name


@pytest.mark.parametrize("rows", [48, ROWS])
def test_every_format(rows):
    """Each with every pattern of group sizes that fits the rows."""
    fitting = [sizes for sizes in PATTERNS.values() if sum(sizes) <= rows]
    experts = max(map(len, fitting))
    cases = [dataclasses.replace(case, m=rows) for case in PLAIN]
    made = programs([(case, experts, None) for case in cases])
    for case, program in zip(cases, made, strict=True):
        check(program, [(*sizes, *[0] * (experts - len(sizes))) for sizes in fitting], str(case))


@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern_of_empty_experts(kind):
    (program,) = programs([(dataclasses.replace(KINDS[kind], m=80), 8, None)])
    check(program, patterns(8, (1, 2, 7, 10)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [48, ROWS])
def test_every_number_of_rows(kind, rows):
    """Of one expert, between two others, for tiles of few rows and of many."""
    (program,) = programs([(dataclasses.replace(KINDS[kind], m=rows), 4, None)])
    check(program, [(3, m, 0, 5) for m in range(min(rows - 8, 300) + 1)])


@pytest.mark.parametrize("rows", [48, ROWS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate(kind, rows):
    case = dataclasses.replace(KINDS[kind], m=rows)
    groups = Groups(case, (1,) * 4)
    problem = grouped_a16_problem(weight=groups.weight(), **groups.operands())
    configs = [
        config
        for kernel in GROUPED_A16_KERNELS
        if kernel.accepts(problem) is None
        for config in kernel.candidates(problem)
    ]
    sizes = [(0, rows // 2 + 1, 1, rows // 3), (rows, 0, 0, 0)]
    made = programs([(case, 4, config) for config in configs])
    for config, program in zip(configs, made, strict=True):
        check(program, sizes, str(config))


def test_random_problems():
    rng = np.random.default_rng(0)
    jobs = []
    for case in itertools.islice(itertools.cycle(PLAIN), 48):
        n, k = (int(64 * rng.integers(1, 17)) for _ in range(2))
        rows = int(2 ** rng.uniform(0, 9.5))
        jobs.append((dataclasses.replace(case, m=rows, n=n, k=k), int(rng.integers(1, 17)), None))
    for (case, experts, _), program in zip(jobs, programs(jobs), strict=True):
        shares = (rng.dirichlet(np.full(experts, 0.5)) for _ in range(8))
        check(program, [rng.multinomial(case.m, share) for share in shares], str(case))


def test_a_row_of_a_neighbour_is_noticed():
    """Negative control: the sizes that the device got are not those judged by."""
    (program,) = programs([(dataclasses.replace(KINDS["w4a16"], m=48), 2, None)])
    assert program.error((20, 28)) < 2
    call, moved = program.call, np.array([-1, 1], np.int32)
    program.call = lambda given: call({**given, "group_sizes": given["group_sizes"] + moved})
    assert program.error((20, 28)) > 20
