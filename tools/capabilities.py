"""Write docs/capabilities.md from a test run: a row per peer-made checkpoint and per test case.

Usage: pytest --junitxml=report.xml ... && python tools/capabilities.py report.xml

Nothing in the table is written by hand: a cell says "yes" where the test of that name passed, "no"
where it failed and "-" where it did not run.
"""

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path

# Column: (test function, what it proves).
CHECKPOINT_TESTS = {
    "weights": (
        "test_corpus_weights_have_the_peers_checksum",
        "dequantized weights equal the peer's",
    ),
    "logits": (
        "test_logits_match_the_peer",
        (
            "logits of the whole model agree with the peer's; for folders that the test names in "
            "PLAIN_ACTIVATIONS and PER_BATCH_EXPERTS with activation quantization switched off"
        ),
    ),
}
FORMAT_TESTS = {
    "value": ("test_value_is_that_of_the_definition", "values follow the format's definition"),
    "round trip": ("test_encode_is_the_inverse_of_decode", "encode is the inverse of decode"),
    "structure": (
        "test_structure_commutes_with_dequantize",
        "slicing, stacking and joining commute with dequantize; one case of each layout",
    ),
    "damage": ("test_one_changed_bit_is_seen", "a changed bit changes the value"),
}
SCHEME_TESTS = {
    "matmul": ("test_matmul_against_float64", "XLA matmul agrees with a float64 oracle"),
    "control": ("test_a_broken_weight_is_noticed", "a broken weight is noticed"),
    "kernel": ("test_kernels_agree_with_the_xla_path", "the Hopper kernel agrees (interpreter)"),
}
GGUF_TYPE_TESTS = {
    "golden": ("test_golden_block", "a block of the format's golden vectors has its values"),
    "llama.cpp": (
        "test_rows_are_decoded_bit_for_bit",
        "rows that llama.cpp quantized are decoded bit for bit as the gguf package does",
    ),
    "gguf package": (
        "test_dequantize_equals_the_gguf_package",
        "random blocks are decoded as the gguf package does",
    ),
    "packed": ("test_repacking_is_lossless", "stays packed, and its blocks are written again"),
    "kernel": ("test_gguf_weights_stay_packed", "the Hopper kernel agrees (interpreter)"),
}
GGUF_MODEL_TESTS = {
    "logits": (
        "test_logits_are_those_of_llama_cpp",
        (
            "logits are within 1e-4 of those of the dequantized file, and with llama.cpp's 8-bit "
            "activations and float16 attention emulated within 2e-2 of its own, most tokens to 2e-6"
        ),
    ),
}
EXPORT_TESTS = {
    "exact": (
        "test_an_export_reads_back_bit_for_bit",
        "codes and scales read back bit for bit, everything else too",
    ),
    "ignore list": (
        "test_the_ignore_list_covers_what_is_not_quantized",
        "the config's list covers exactly what is not quantized, by that family's own rule",
    ),
    "peer": (
        "test_the_peer_dequantizes_an_export_to_the_same_weights",
        "the package that owns the format dequantizes it to the same float32 weights",
    ),
    "transformers": (
        "test_transformers_loads_an_export_whole",
        "transformers loads the whole model, dequantized to the same weights",
    ),
}
# Test function -> what it proves, of tests without parameters.
NAME_MAPS = {
    "test_a_checkpoint_with_other_names": "safetensors: load, inspect, explain, export",
    "test_unknown_architecture_and_name_map": "GGUF of an unknown architecture, with a config.json",
}


def outcomes(reports: list[Path]) -> dict[tuple[str, str], str]:
    """(test function, parameter or "") -> "yes", "no" or "-"."""
    found: dict[tuple[str, str], str] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            function, _, rest = case.get("name", "").partition("[")
            key = function, rest.removesuffix("]").removesuffix(".weight")
            bad = any(case.find(kind) is not None for kind in ("failure", "error"))
            verdict = "-" if case.find("skipped") is not None else "no" if bad else "yes"
            if found.get(key, "-") == "-":
                found[key] = verdict
    return found


def table(title: str, first: str, tests: dict[str, tuple[str, str]], found: dict) -> list[str]:
    """A Markdown section with a row for every parameter of the section's tests."""
    functions = {function for function, _ in tests.values()}
    rows = sorted({parameter for function, parameter in found if function in functions})
    lines = [f"## {title}", ""]
    lines += [
        f"- {column}: {meaning} (`{function}`)" for column, (function, meaning) in tests.items()
    ]
    lines += ["", "| " + " | ".join([first, *tests]) + " |", "|---" * (1 + len(tests)) + "|"]
    for row in rows:
        cells = [found.get((function, row), "-") for function, _ in tests.values()]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return [*lines, ""]


def facts(title: str, tests: dict[str, str], found: dict) -> list[str]:
    """A Markdown section with a row for every test."""
    lines = [f"## {title}", "", "| what | proven | by |", "|---|---|---|"]
    for function, meaning in tests.items():
        lines.append(f"| {meaning} | {found.get((function, ''), '-')} | `{function}` |")
    return [*lines, ""]


def main() -> None:
    """Read reports, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    default = Path(__file__).parent.parent / "docs" / "capabilities.md"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    found = outcomes(arguments.reports)
    lines = [
        "# Capabilities",
        "",
        "Written by `tools/capabilities.py` from a test run; not edited by hand.",
        "",
        *table("Checkpoints made by the peers' own tools", "checkpoint", CHECKPOINT_TESTS, found),
        *table("Formats", "case", FORMAT_TESTS, found),
        *table("GGUF types", "type", GGUF_TYPE_TESTS, found),
        *table("GGUF models that llama.cpp ran", "file", GGUF_MODEL_TESTS, found),
        *facts("Name maps", NAME_MAPS, found),
        *table("Schemes", "scheme", SCHEME_TESTS, found),
        *table("Exports", "export", EXPORT_TESTS, found),
    ]
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    verdicts = list(found.values())
    print(f"{arguments.out}: {verdicts.count('yes')} proven, {verdicts.count('no')} failed")


if __name__ == "__main__":
    main()
