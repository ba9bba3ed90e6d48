"""bench and tune: tables, ratios and cases; timing itself needs a GPU."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import bars, measuring, timing
from pallas_kernels.bench.cases import CASES
from pallas_kernels.bench.limits import Limits
from pallas_kernels.bench.timing import Timing, copies, program
from pallas_kernels.bench.workers import in_processes
from pallas_kernels.problem import H200, own_tuned_path, select, tuned_config, tuned_table
from pallas_kernels.tune import candidates, merge, tune, write_table


def test_the_tuned_table_is_written_as_it_was_read(tmp_path):
    table = tuned_table(H200)
    write_table(tmp_path / "table.json", table)
    again = json.loads((tmp_path / "table.json").read_text())
    assert {op: len(entries) for op, entries in table.items()} == {
        op: len(entries) for op, entries in again.items()
    }
    for op, entries in table.items():
        assert all(entry in again[op] for entry in entries)


def test_a_card_of_its_own_replaces_entries_and_keeps_the_rest():
    h100 = dataclasses.replace(H200, name="NVIDIA H100 80GB HBM3")
    paths = own_tuned_path(H200), own_tuned_path(h100)
    common, own = (json.loads(path.read_text()) for path in paths if path)
    table = tuned_table(h100)
    for op, entries in own.items():
        assert entries and all(entry in table[op] for entry in entries)
        assert len(table[op]) == len(common[op]), "each replaces one"
        assert any(entry not in common[op] for entry in entries)


def test_merge_replaces_the_entry_of_the_same_problem():
    old = {"kind": "int8", "m": 1, "n": 2, "k": 3, "us": 9.0}
    table = {"op": [old, {**old, "m": 16}, {**old, "experts": 4}]}
    merge(table, "op", {**old, "us": 8.0})
    assert sorted(entry["us"] for entry in table["op"]) == [8.0, 9.0, 9.0]


PEERS = {
    "torch fp8 tensor": {"1x2x3": {"kernel": 12.0, "graph": 13.0}},
    "vllm cutlass fp8": {"1x2x3": {"kernel": 11.0}},
    "other": {"1x2x3": {"kernel": 1.0}},
    "device": "a card",
}


def test_ratios_are_against_the_best_peer():
    case = next(case for case in CASES if case.name == "fp8")
    row = {"op": "fp8", "shape": "1x2x3", "us": 10.0, "wall_us": 13.0}
    compared = bench.compare(row, case, PEERS)
    assert compared["ratios"]["torch fp8 tensor"] == {"kernel": 1.2, "graph": 1.0}
    assert len(compared["ratios"]) == 2 and bench.compare(row, case, {}) == row
    bar = bars.BARS[0]
    assert bars.value(bar, compared, [], "kernel") == 1.1
    assert bars.value(bar, compared, [], "graph") == 1.0
    assert bars.value(bar, row, [], "kernel") is None


def row_of(op: str, shape: str, us: float, **more) -> dict:
    return {"op": op, "shape": shape, "us": us, "wall_us": us, **more}


def test_a_bar_holds_only_when_mean_and_worst_do_for_every_shape():
    def peer(ratio: float) -> dict:
        return {"ratios": {"p": {"kernel": ratio, "graph": ratio}}}

    def held(*ratios: float | None) -> bool:
        tokens = (1, 16, 64)
        rows = [
            row_of("int8", f"{m}x64x64", 1.0, **({} if ratio is None else peer(ratio)))
            for m, ratio in zip(tokens, ratios, strict=True)
        ]
        kernel, graph = bars.standings(rows)
        assert kernel.held == graph.held
        return kernel.held

    assert held(1.2, 1.2, 0.95)
    assert not held(1.3, 1.3, 0.9), "worst"
    assert not held(1.05, 1.1, 1.1), "mean"
    assert not held(1.2, 1.2, None), "a shape without a peer"


def test_bars_within_a_run():
    rows = [
        row_of("w4a16", "1x28672x4096", 18.0, of_memory=0.7),
        row_of("w4a16_zero", "1x28672x4096", 20.0),
        row_of("fp8a16", "64x28672x4096", 30.0, of_memory=0.9),
        row_of("quantize_token", "16x1x4096", 9.0, of_memory=0.1),
    ]
    by_name = {standing.bar.name: standing for standing in bars.standings(rows)}
    assert by_name["W4A16 with zero points"].worst[0] == 0.9
    assert not by_name["W4A16 with zero points"].held
    assert by_name["W4A16 28672x4096, M <= 8"].worst[0] == pytest.approx(3.262, abs=1e-3)
    assert by_name["W8A16 / FP8A16, M <= 64"].held
    assert "quantization, M >= 1024" not in by_name, "16 tokens are below the bar's range"
    assert all(str(standing) for standing in by_name.values())


def test_floors_follow_the_limits_of_the_card():
    limits = Limits(4e12, {"int8": 1e15})
    assert limits.floors(5e8, 4e6, "int8") == pytest.approx((1.0, 0.5))
    assert limits.floors(4e9, 4e6, "int8") == pytest.approx((1.0, 4.0))
    assert limits.floors(4e9, 4e6, "") == pytest.approx((1.0, 0.0))
    assert limits.raised("int8", 4e9, 2.0).rates["int8"] == 2e15
    assert limits.raised("int8", 4e9, 8.0) == limits and limits.raised("", 9e9, 1.0) == limits


def test_an_h100_uses_the_configs_of_the_h200():
    problem = next(case for case in CASES if case.name == "fp8")
    operands = jax.eval_shape(lambda: problem.operands(16, 8192, 8192, 0))
    found = problem.problem(operands)
    h100 = dataclasses.replace(H200, name="NVIDIA H100 80GB HBM3")
    chosen = select(problem.kernels, found)
    assert tuned_config(problem.kernels, dataclasses.replace(found, device=h100)) == chosen


def test_a_hopper_that_nobody_measured_uses_them_too_and_has_no_file_to_tune():
    for name in ("NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA H100 PCIe"):
        card = dataclasses.replace(H200, name=name)
        assert tuned_table(card) == tuned_table(H200) and own_tuned_path(card) is None
    assert tuned_table(dataclasses.replace(H200, name="NVIDIA B200", capability="10.0")) == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_kernel_and_candidates(case):
    m, n, k = (16, 256, 512) if case.op != "quantize" else (16, 1, 512)
    problem = case.problem(case.operands.eval_shape(m, n, k, 0))
    kernel, config = select(case.kernels, problem)
    assert kernel.accepts(problem) is None and config.refuses(problem) is None
    assert candidates(case, problem)
    assert case.peers is not None and copies(case.work(m, n, k)[1]) >= 2


def test_a_report_becomes_the_tables_of_the_docs(tmp_path, monkeypatch):
    tool = Path(__file__).parents[2] / "tools" / "kernel_tables.py"
    common = {"tflops": 1.0, "tb_s": 2.0, "bytes_us": 6.0, "operations_us": 0.5}
    rows = [
        row_of("fp8", "16x6144x4096", 10.0, of_floor=0.6, of_memory=0.6, **common),
        row_of("fp8", "1x6144x4096", 12.0, of_floor=0.5, of_memory=0.5, **common),
        row_of("w8a16", "1x6144x4096", 14.0, of_floor=0.4, of_memory=0.4, **common),
    ]
    report = {"device": "a card", "jax": "0", "date": "2000-01-01", "memory_tb_s": 2.5}
    report |= {"rates_t": {"int8": 9.0}, "left_out": ["one"], "rows": rows}
    peers = {"torch fp8 tensor": {"16x6144x4096": {"kernel": 12.0, "graph": 13.0}}}
    for name, content in (("bench.json", report), ("peers.json", peers)):
        (tmp_path / name).write_text(json.dumps(content))
    for page in ("kernels.md", "kernels_results.md"):
        (tmp_path / page).write_text(
            "before\n<!-- bench a card -->\nprevious\n<!-- /bench a card -->\nafter\n"
        )
    files = [str(tmp_path / name) for name in ("bench.json", "peers.json")]
    monkeypatch.setattr(sys, "argv", ["tool", *files, "--docs", str(tmp_path)])
    runpy.run_path(str(tool), run_name="__main__")
    summary, tables = ((tmp_path / p).read_text() for p in ("kernels.md", "kernels_results.md"))
    assert summary.startswith("before\n") and summary.endswith("\nafter\n")
    assert "previous" not in summary + tables and "a card, jax 0, 2000-01-01" in summary
    assert (
        "| fp8 token x channel, graph time | 1.05 | 1.30 | 0.92 | 1.30 (fp8 16x6144x4096) "
        in summary
    )
    first = tables.index("| 1x6144x4096 | 12.0 | 2.00 TB/s | 6.0 | 0.5 | 50 % | - | - |")
    assert first < tables.index(
        "| 16x6144x4096 | 10.0 | 2.00 TB/s | 6.0 | 0.5 | 60 % | torch fp8 tensor"
    )
    assert "| 1.30 / 1.20 |" in tables and "| 1x6144x4096 | 14.0 (40 %) |" in tables
    (tmp_path / "kernels.md").write_text("no marks")
    with pytest.raises(ValueError, match="needs <!-- bench a card"):
        runpy.run_path(str(tool), run_name="__main__")


def test_no_problem_is_run_in_two_passes():
    # XLA merges the second pass with the first: half the calls, and half the time.
    loops = [measuring.calls_of(case, size).loops for case in CASES for size in case.sizes]
    assert 2 not in loops and {1, 3} < set(loops)
    with pytest.raises(ValueError, match="two passes"):
        program(lambda x: x + 1, [jax.ShapeDtypeStruct((8,), "float32")], 1, loops=2)


def test_a_host_that_wakes_late_does_not_change_the_wall_time(monkeypatch):
    now, late = [0.0], iter([5.0, 0.0, 0.0, 9.0, 3.0, 1.0])

    def compiled(sets):
        now[0] += 8.0

    def wake(result):
        now[0] += next(late)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.jax, "block_until_ready", wake)
    # Four calls in 8 s, queues of 2 and 4 programs, three times each.
    assert timing.wall_time(compiled, [], calls=4, repeats=3, queued=2) == 2e6


def test_a_time_below_the_floor_is_no_result(monkeypatch):
    case = next(case for case in CASES if case.name == "int8")
    limits = Limits(1e12, {"int8": 1e15})
    nbytes = case.work(16, 256, 256)[1]

    def row(us: float):
        monkeypatch.setattr(measuring, "measure", lambda *_: Timing(us, us))
        make = jax.jit(case.operands, static_argnums=(0, 1, 2))
        return measuring.run(
            case, (16, 256, 256), (lambda seed: make(16, 256, 256, seed), lambda: None), limits, 1
        )

    assert row(nbytes * 1e-6)["of_floor"] == 1
    with pytest.raises(measuring.ImpossibleError, match="removed"):
        row(nbytes * 1e-6 / 2)


def test_the_command_hands_problems_to_processes(tmp_path):
    """As `python -m`: a spawned process does not import the __main__ of a package."""
    shape = "x".join(map(str, next(case for case in CASES if case.name == "int8").sizes[0]))
    report = tmp_path / "report.json"
    command = f"""
import runpy, sys
from pallas_kernels.bench import limits
limits.measure_limits = lambda: limits.Limits(1e12, {{"int8": 1e15}})
sys.argv[1:] = "--op int8 --shape {shape} --seconds -1 --jobs 1 --json {report}".split()
runpy.run_module("pallas_kernels.bench", run_name="__main__", alter_sys=True)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)
    assert json.loads(report.read_text())["left_out"] == [
        f"int8 {shape}: TimeoutError no time left"
    ]


def prepare(problem: str):
    """Problems are letters, or the place of a folder where to say what is going on."""
    if problem == "dies compiling":
        os._exit(3)
    if problem == "does not compile":
        raise ValueError("no such config\nand more")
    if problem.startswith("/"):
        folder = Path(problem)
        (folder / f"compiling {os.getpid()}").touch()
        time.sleep(0.3)
        (folder / f"compiling {os.getpid()}").unlink()

    def run():
        if problem == "dies":
            os._exit(3)
        if problem == "fails":
            raise ValueError("no such config\nand more")
        if problem.startswith("/"):
            others = [path.name for path in Path(problem).iterdir()]
            (Path(problem) / "running").touch()
            time.sleep(0.1)
            (Path(problem) / "running").unlink()
            return others
        return problem.upper()

    return run


ENDED, FAILED = "its process ended", "ValueError no such config"


@pytest.mark.parametrize(
    ("processes", "at_once", "expected"),
    [
        (2, 2, {"a": "", "fails": FAILED, "dies": ENDED, "b": "", "c": ENDED}),
        (4, 2, {"dies compiling": ENDED, "a": "", "does not compile": FAILED, "b": ""}),
    ],
)
def test_problems_are_spread_over_processes_and_outlive_some_of_them(processes, at_once, expected):
    found = in_processes(prepare, list(expected), processes, at_once)
    assert {list(expected)[i]: (result, why) for i, result, why in found} == {
        problem: (None if why else problem.upper(), why) for problem, why in expected.items()
    }


def test_nothing_compiles_while_the_gpu_is_used(tmp_path):
    found = [*in_processes(prepare, [str(tmp_path)] * 6, 3, 3)]
    assert sorted(found) == [(i, [], "") for i in range(6)]


def test_tuning_ranks_the_right_candidates(monkeypatch):
    def call(operands, config):
        # One config of the candidates is wrong, and would be fastest.
        return operands["x_q"].astype(jnp.float32) * (1 + (config == wrong))

    def kernel_time(compiled, sets, calls, repeats):
        order.append(times[compiled])
        return times[compiled]

    case = next(case for case in CASES if case.name == "int8")
    size = (16, 256, 512)
    problem = case.problem(case.operands.eval_shape(*size, 0))
    kernel, in_use = select(case.kernels, problem)
    choices = dict.fromkeys([(kernel, in_use), *candidates(case, problem)])
    wrong = list(choices)[-1][1]
    times, order = {}, []

    def program(function, shapes, calls):
        def compiled(sets):
            return [function(operands) for operands in sets]

        times[compiled] = 50.0 - len(times)  # later candidates are faster
        return compiled

    fake = dataclasses.replace(
        case, call=call, reference=lambda operands: operands["x_q"].astype(jnp.float32)
    )
    monkeypatch.setattr("pallas_kernels.tune.CASES", (fake,))
    monkeypatch.setattr("pallas_kernels.tune.kernel_time", kernel_time)
    monkeypatch.setattr("pallas_kernels.tune.program", program)
    found = tune(time.time() + 60, ("int8", size))()
    assert found.in_use == 50.0 and found.entries[0]["us"] == 50.0 - (len(choices) - 2)
    assert len(found.entries) == len(choices) - 1, "all but the wrong one"
    assert order[-4:] == [50.0, *(52.0 - len(choices) + i for i in range(3))], "again, in turn"
    with pytest.raises(TimeoutError):
        tune(time.time() - 1, ("int8", size))
