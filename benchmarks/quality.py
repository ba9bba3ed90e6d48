"""Perplexity after our own round-to-nearest quantization.

Usage: python benchmarks/quality.py FOLDER [--models NAME ...] [--json FILE]

FOLDER holds model directories and ``eval_tokens.npy``.  Prints a Markdown table.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxquant as jq

SCHEMES = [
    "bf16",
    "fp8",
    "fp8_b128",
    "w8a8",
    "w4a16_g32",
    "w4a16_g32_asym",
    "w4a16_g128",
    "nvfp4a16",
]


def main() -> None:
    """Measure every scheme on every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["llama-11m", "qwen3-moe-9m"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    tokens = np.load(arguments.folder / "eval_tokens.npy")[:16384]
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name in arguments.models:
        base = jq.from_pretrained(arguments.folder / name, dtype=jnp.float32)
        report[name] = {}
        for scheme in SCHEMES:
            model = jq.quantize_model(base, {r"model\.layers\..*": scheme})
            value = jq.perplexity(model, tokens, window=256)
            report[name][scheme] = {"perplexity": value, "mib": model.nbytes / 2**20}
    print(
        "| scheme | " + " | ".join(f"{n}: MiB | perplexity | against bf16" for n in report) + " |"
    )
    print("|---" * (1 + 3 * len(report)) + "|")
    for scheme in SCHEMES:
        cells = []
        for rows in report.values():
            row, base = rows[scheme], rows["bf16"]["perplexity"]
            change = 100 * (row["perplexity"] / base - 1)
            cells.append(f"{row['mib']:.2f} | {row['perplexity']:.3f} | {change:+.2f} %")
        print(f"| {scheme} | " + " | ".join(cells) + " |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
