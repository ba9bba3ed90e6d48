"""The demo: import the bundled model, quantize it in several ways, compare.

Versions are loaded through the same door as any checkpoint, a plan file for the mixed one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxquant as jq

MODEL = Path(__file__).parent / "bundled" / "tiny-qwen3-moe"
LAYERS = r"model\.layers\..*"
# Perplexity hears attention and the last layers first: they stay at 8 bits in the mixed version.
VERSIONS: dict[str, dict[str, str]] = {
    "bf16": {},
    "fp8": {LAYERS: "fp8"},
    "fp8 128x128 blocks": {LAYERS: "fp8_b128"},
    "int8": {LAYERS: "w8a8"},
    "W4A16 g32": {LAYERS: "w4a16_g32"},
    "mixed": {
        r".*self_attn.*": "fp8",
        r".*experts.*down_proj": "w8a16",
        LAYERS: "w4a16_g32",
    },
}
PROMPT = "It was the best of times, "
COLUMNS = ["version", "MiB", "bits/weight", "perplexity", "tokens/s", "sample"]


def run(out: Path) -> tuple[list[str], list[list[str]]]:
    """Make and measure every version.

    Args:
        out: directory for ``demo.json``, ``demo.md`` and ``demo.png``; created.
    Returns:
        Column titles and rows of the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokens = np.load(MODEL / "eval_tokens.npy")
    base = jq.from_pretrained(MODEL, dtype=jnp.float32)
    results = []
    for name, rules in VERSIONS.items():
        model = jq.quantize_model(base, rules) if rules else base
        sample = jq.generate(model, [PROMPT], max_new_tokens=24)[0]
        results.append(
            {
                "version": name,
                "bytes": model.nbytes,
                "bits_per_weight": 8 * model.nbytes / model.num_weights,
                "perplexity": jq.perplexity(model, tokens, window=256),
                "tokens_per_second": _rate(model),
                "sample": PROMPT + sample,
            }
        )
    rows = [
        [
            r["version"],
            f"{r['bytes'] / 2**20:.2f}",
            f"{r['bits_per_weight']:.2f}",
            f"{r['perplexity']:.3f}",
            f"{r['tokens_per_second']:.0f}",
            " ".join(r["sample"].split()),
        ]
        for r in results
    ]
    (out / "demo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (out / "demo.md").write_text(text + "\n", encoding="utf-8")
    _plot(results, out / "demo.png")
    return COLUMNS, rows


def _rate(model: jq.CausalLM, batch: int = 8, new: int = 32) -> float:
    """Generated tokens per second at ``batch`` rows, compilation left out."""
    prompts = [[1 + i] * 16 for i in range(batch)]
    jq.generate(model, prompts, max_new_tokens=new, eos=())
    start = time.perf_counter()
    jq.generate(model, prompts, max_new_tokens=new, eos=())
    return batch * new / (time.perf_counter() - start)


def _plot(results: list[dict], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot (pip install 'jaxquant[notebooks]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for r in results:
        axes.scatter(r["bytes"] / 2**20, r["perplexity"], color="tab:blue", zorder=2)
        axes.annotate(
            r["version"],
            (r["bytes"] / 2**20, r["perplexity"]),
            textcoords="offset points",
            xytext=(6, 4),
        )
    axes.set_xlabel("size of the model (MiB)")
    axes.set_ylabel("perplexity")
    axes.set_title("tiny-qwen3-moe: bytes against perplexity")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
