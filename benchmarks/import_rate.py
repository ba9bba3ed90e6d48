"""Import rate of a GPTQ checkpoint against safetensors reading the same files into NumPy.

Makes the checkpoint on the spot.  Usage: python benchmarks/import_rate.py [--gib 2] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, GROUP = 4096, 14336, 128


def write_checkpoint(folder: Path, gib: float) -> int:
    """A Llama-shaped 4-bit GPTQ checkpoint of about ``gib`` GiB in shards; returns its bytes."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (1024, HIDDEN),
        "self_attn.v_proj": (1024, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    per_layer = sum(out * inn for out, inn in shapes.values()) / 2
    layers = max(1, round(gib * 2**30 / per_layer))
    words = rng.integers(0, 2**31, (INNER // 8) * HIDDEN, dtype=np.int64).astype(np.int32)
    weight_map, total = {}, 0
    for layer in range(layers):
        tensors: dict[str, np.ndarray] = {}
        for name, (out, inn) in shapes.items():
            prefix = f"model.layers.{layer}.{name}"
            groups = inn // GROUP
            tensors[f"{prefix}.qweight"] = words[: inn // 8 * out].reshape(inn // 8, out)
            tensors[f"{prefix}.qzeros"] = np.full((groups, out // 8), 0x77777777, np.int32)
            tensors[f"{prefix}.scales"] = np.full((groups, out), 0.01, np.float16)
            tensors[f"{prefix}.g_idx"] = (np.arange(inn) // GROUP).astype(np.int32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float16)
        if layer == 0:
            tensors["model.embed_tokens.weight"] = np.zeros((1024, HIDDEN), np.float16)
            tensors["model.norm.weight"] = np.ones(HIDDEN, np.float16)
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file)
        total += (folder / file).stat().st_size
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "quantization_config": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def read_with_safetensors(folder: Path) -> int:
    """Load every tensor into NumPy; returns bytes."""
    from safetensors.numpy import load_file

    arrays = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return sum(a.nbytes for tensors in arrays for a in tensors.values())


def read_with_jaxquant(folder: Path) -> int:
    """Load the model; returns bytes of its weights."""
    import jax
    from flax import nnx

    import jaxquant as jq

    model = jq.from_pretrained(folder)
    jax.block_until_ready(nnx.state(model))
    return model.nbytes


def measure(reader, folder: Path, queue) -> None:
    """Time ``reader`` in a process of its own; puts seconds, bytes and peak MiB over the start."""
    import jax

    import jaxquant as jq

    jax.numpy.zeros(1).block_until_ready()
    assert jq.from_pretrained
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    size = reader(folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((seconds, size, (peak - before) / 1024))


def main() -> None:
    """Measure both readers in alternation, page cache warm; the ratio is the median of pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    readers = {"safetensors": read_with_safetensors, "jaxquant": read_with_jaxquant}
    results: dict[str, list[tuple[float, int, float]]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_checkpoint(folder, arguments.gib)
        # Writing back two gigabytes would otherwise go on under the first measurements.
        os.sync()
        for _ in range(arguments.repeats):
            for key, reader in readers.items():
                queue = context.Queue()
                child = context.Process(target=measure, args=(reader, folder, queue))
                child.start()
                results[key].append(queue.get())
                child.join()
    report = {
        key: {
            "gib_per_s": total / 2**30 / statistics.median(r[0] for r in runs),
            "peak_mib": max(r[2] for r in runs),
            "output_mib": runs[0][1] / 2**20,
        }
        for key, runs in results.items()
    }
    report["ratios"] = [
        theirs[0] / ours[0]
        for theirs, ours in zip(results["safetensors"], results["jaxquant"], strict=True)
    ]
    report["ratio"] = statistics.median(report["ratios"])
    print(json.dumps(report, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
