"""Prefill and decode tokens per second on the CPU, against transformers on the same model.

Usage: python benchmarks/cpu_generation.py MODEL [--peer-python PY] [--json FILE]

transformers and torch may live in another environment, whose interpreter ``--peer-python`` names.
Both sides run float32, greedy, without an end token, and report the median of five runs after one
that warms up.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW, REPEATS = 128, 64, 5


def median_seconds(call) -> float:
    """Median wall time of ``call()`` after one warm-up."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def rates(generate, batch: int) -> dict[str, float]:
    """Tokens per second of prefill and of decode, given ``generate(new_tokens)``."""
    first = median_seconds(lambda: generate(1))
    whole = median_seconds(lambda: generate(NEW))
    return {
        "prefill_tokens_per_s": batch * PROMPT / first,
        "decode_tokens_per_s": batch * (NEW - 1) / (whole - first),
    }


def prompts_of(batch: int, vocabulary: int) -> list[list[int]]:
    """The same random prompts for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT)).tolist()


def run_jaxquant(model_path: str, batch: int, scheme: str | None) -> dict[str, float]:
    """Our side."""
    import jax.numpy as jnp

    import jaxquant as jq

    model = jq.from_pretrained(model_path, dtype=jnp.float32)
    if scheme:
        model = jq.quantize_model(model, {r"model\.layers\..*": scheme})
    prompts = prompts_of(batch, model.config.vocab_size)
    return rates(lambda new: jq.generate(model, prompts, max_new_tokens=new, eos=()), batch)


def run_transformers(model_path: str, batch: int) -> dict[str, float]:
    """The peer."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.tensor(prompts_of(batch, model.config.vocab_size))

    def generate(new: int) -> None:
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )

    return rates(generate, batch)


def main() -> None:
    """Run both sides in turn, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json")
    parser.add_argument("--side", choices=["jaxquant", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--scheme", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "jaxquant":
        print(json.dumps(run_jaxquant(arguments.model, arguments.batch[0], arguments.scheme)))
        return
    if arguments.side == "transformers":
        print(json.dumps(run_transformers(arguments.model, arguments.batch[0])))
        return
    report = {}
    for batch in arguments.batch:
        row = {}
        for label, python, extra in (
            ("jaxquant f32", sys.executable, ["--side", "jaxquant"]),
            ("jaxquant fp8", sys.executable, ["--side", "jaxquant", "--scheme", "fp8"]),
            (
                "jaxquant w4a16_g32",
                sys.executable,
                ["--side", "jaxquant", "--scheme", "w4a16_g32"],
            ),
            ("transformers f32", arguments.peer_python, ["--side", "transformers"]),
        ):
            command = [python, __file__, arguments.model, "--batch", str(batch), *extra]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row[label] = json.loads(done.stdout.splitlines()[-1])
        ours, peer = row["jaxquant f32"], row["transformers f32"]
        row["ratio"] = {key: ours[key] / peer[key] for key in ours}
        report[f"batch {batch}"] = row
    print(json.dumps(report, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
