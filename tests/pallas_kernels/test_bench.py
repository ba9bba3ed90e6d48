"""bench and tune: tables, ratios and cases; timing itself needs a GPU."""

import json

import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench.cases import CASES
from pallas_kernels.bench.timing import copies
from pallas_kernels.problem import select
from pallas_kernels.tune import TABLE, candidates, merge, write_table


def test_the_tuned_table_is_written_as_it_was_read(tmp_path):
    table = json.loads(TABLE.read_text())
    write_table(tmp_path / "table.json", table)
    again = json.loads((tmp_path / "table.json").read_text())
    assert {op: len(entries) for op, entries in table.items()} == {
        op: len(entries) for op, entries in again.items()
    }
    for op, entries in table.items():
        assert all(entry in again[op] for entry in entries)


def test_merge_replaces_the_entry_of_the_same_problem():
    old = {"kind": "int8", "m": 1, "n": 2, "k": 3, "us": 9.0}
    other = {**old, "m": 16}
    table = {"op": [old, other]}
    merge(table, "op", {**old, "us": 8.0})
    assert sorted(entry["us"] for entry in table["op"]) == [8.0, 9.0] and len(table["op"]) == 2


def test_ratios_are_against_the_best_peer():
    case = next(case for case in CASES if case.name == "fp8")
    row = {"shape": "1x2x3", "us": 10.0}
    peers = {
        case.peers[0]: {"1x2x3": 12.0},
        case.peers[1]: {"1x2x3": 11.0},
        "other": {"1x2x3": 1.0},
    }
    compared = bench.compare(row, case, peers)
    assert compared["best"] == 1.1 and len(compared["ratios"]) == 2
    assert bench.compare(row, case, {}) == row
    assert "1.100" in bench.summary([compared, row]) and bench.summary([row]) == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_kernel_and_candidates(case):
    m, n, k = (16, 256, 512) if case.op != "quantize" else (16, 1, 512)
    problem = case.problem(case.operands(m, n, k, 0))
    kernel, config = select(case.kernels, problem)
    assert kernel.accepts(problem) is None and config.refuses(problem) is None
    assert candidates(case, problem)
    assert case.peers is not None and copies(case.work(m, n, k)[1]) >= 2
