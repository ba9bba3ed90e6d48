"""Lies in ``config.json`` and ``generation_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.convert import from_pretrained
from jaxquant.models import ModelConfig
from tests.convert.writer import assemble, header_of
from tests.hostile.harness import Case
from tests.small_models import CONFIGS, random_tensors

FILE, GENERATION = "config.json", "generation_config.json"
MODEL = CONFIGS["qwen3-moe"]


def weights(config: dict[str, Any]) -> bytes:
    arrays = random_tensors(ModelConfig.from_hf(config))
    return assemble(*header_of({n: a.astype(np.float16) for n, a in arrays.items()}))


WEIGHTS = {"model.safetensors": weights(MODEL)}


def read(folder: Path) -> Any:
    return from_pretrained(folder, dtype=jnp.float32)


def lie(content: object, found: str = "", subject: str = "", file: str = FILE) -> Case:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    good = {FILE: json.dumps(MODEL).encode()}
    return Case(WEIGHTS | good | {file or FILE: text}, file, found, subject)


def changed(base: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A deep copy with another value at one place."""
    copy = json.loads(json.dumps(base))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


GOOD = lie(MODEL)
TEXTS = {
    "empty": b"",
    "array": b"[1]",
    "string": b'"config"',
    "null": b"null",
    "number": b"3",
    "unclosed": b"{",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "not UTF-8": b'{"a": "\xff"}',
    "null byte": b'{"a": "\x00"}',
    "overlong UTF-8": b'{"a": "\xc0\x80"}',
    "two objects": b"{} {}",
    "trailing comma": b'{"a": 1,}',
    "comment": b'{"a": 1} // no',
    "duplicate key": b'{"hidden_size": 1, "hidden_size": 2}',
    "duplicate inner key": b'{"a": {"b": 1, "b": 2}}',
    "nesting bomb": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "object bomb": b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "many values": b'{"a": [' + b"0," * 300_000 + b"0]}",
    "nine megabytes": b'{"a": "' + b"x" * (9 << 20) + b'"}',
    "integer of 10000 digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "HTML": b"<!DOCTYPE html><html></html>",
}
CASES = {name: lie(text) for name, text in TEXTS.items()}
CASES |= {f"generation config: {n}": lie(TEXTS[n], file=GENERATION) for n in ("empty", "array")}
CASES["config is a directory"] = Case(WEIGHTS | {f"{FILE}/x": b""}, "", "")

# Every number that shapes a model, each with values that it cannot have.
WRONG: dict[str, object] = {
    "text": "64",
    "list": [64],
    "object": {"a": 64},
    "boolean": True,
    "negative": -64,
    "zero": 0,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "2 to the 70": 1 << 70,
    "3 billion": 3_000_000_000,
}
COUNTS = {
    "qwen2-moe-window": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "decoder_sparse_step",
        "shared_expert_intermediate_size",
    ),
    "deepseek-v3-yarn": (
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "n_group",
        "topk_group",
    ),
}
names = list(WRONG)
for base, keys in COUNTS.items():
    for i, key in enumerate(keys):
        # Four of the wrong values for each key, all of them for the keys together.
        for name in (names[(4 * i + j) % len(names)] for j in range(4)):
            content = changed(CONFIGS[base], (key,), WRONG[name])
            CASES[f"{key}: {name}"] = lie(content, subject=key)
OTHERS: dict[str, tuple[tuple[str, ...], tuple[object, ...]]] = {
    "llama-llama3": (
        ("rope_scaling", "factor"),
        ("8", -1, 0, float("nan"), [8.0], True, 1e300),
    ),
    "llama-llama3 ": (("rope_scaling", "original_max_position_embeddings"), ("8", -1, 0, 1.5)),
    "llama-yarn-sharp": (("rope_scaling", "beta_fast"), ("fast", -1, [1], float("inf"))),
    "llama-yarn-sharp ": (("rope_scaling", "truncate"), ("yes", 1)),
    "llama-longrope": (
        ("rope_scaling", "short_factor"),
        ("1.0", [1.0], [0.0] * 4, ["1"] * 4, [float("nan")] * 4, [1.0] * 100_000),
    ),
    "llama": (("rms_norm_eps",), ("1e-5", 0, -1e-5, float("inf"), None, [1e-5])),
    "llama ": (("rope_theta",), ("1e4", 0, -1, float("nan"), True)),
    "llama  ": (("hidden_act",), (3, ["silu"], "sigmoidal", {"a": 1})),
    "llama   ": (("tie_word_embeddings",), ("false", 0, [])),
    "llama    ": (("architectures",), ("LlamaForCausalLM", [3], {"a": 1}, ["Megabyte"], 7)),
    "llama     ": (("rope_scaling",), ("yarn", [1], 3, {"type": "spiral"}, {"rope_type": ["x"]})),
    "llama      ": (("max_position_embeddings",), ("64", -1, 1.5, 1 << 70)),
    "llama-biases": (("attention_bias",), ("yes", 1)),
    "llama-biases ": (("mlp_bias",), ("yes", {})),
    "llama       ": (("eos_token_id",), ("</s>", -1, [1, "2"], [-1], 1.5, {"a": 1})),
    "mistral-window": (("sliding_window",), ("7", -7, [7], 0.5)),
    "qwen3-layer-types": (
        ("layer_types",),
        ("full", ["full_attention"], [3, 4], [["full_attention"]] * 2),
    ),
    "qwen2-window": (("use_sliding_window",), ("true", 1)),
    "qwen2-window ": (("max_window_layers",), ("1", -1, 1.5)),
    "qwen3-moe-sparse": (("mlp_only_layers",), ("2", [-1], ["2"], 2, [1 << 70])),
    "qwen3-moe": (("norm_topk_prob",), ("true", 1)),
    "deepseek-v3": (("topk_method",), (3, "best", ["noaux_tc"])),
    "deepseek-v3 ": (("routed_scaling_factor",), ("2.5", 0, -1, float("nan"))),
    "deepseek-v3  ": (("first_k_dense_replace",), ("1", -1, 1.5)),
    "deepseek-v3   ": (("n_shared_experts",), ("1", -1, 1.5)),
    "deepseek-v3    ": (("rope_interleave",), ("no", 0)),
}
for base, (path, values) in OTHERS.items():
    for value in values:
        subject = path[-1] if path != ("rope_scaling",) else "rope"
        content = changed(CONFIGS[base.strip()], path, value)
        CASES[f"{'.'.join(path)}: {str(value)[:30]}"] = lie(content, subject=subject)
CASES |= {
    "heads that do not divide": lie(MODEL | {"num_key_value_heads": 3}, "divides"),
    "4096 layers of nothing": lie(MODEL | {"num_hidden_layers": 4096}, "layers"),
    "65536 experts of nothing": lie(MODEL | {"num_experts": 1 << 16}, "missing", file=""),
    "odd rotary features": lie(MODEL | {"partial_rotary_factor": 0.4}, "even"),
    "more rotary features than there are": lie(MODEL | {"partial_rotary_factor": 2.0}, "at most"),
    "more experts chosen than there are": lie(MODEL | {"num_experts_per_tok": 99}, "experts"),
    "generation eos: text": lie({"eos_token_id": "</s>"}, "", "eos_token_id", GENERATION),
    "generation eos: a million": lie({"eos_token_id": [1] * 100_000}, "", "", GENERATION),
    "quantization_config: text": lie(MODEL | {"quantization_config": "fp8"}),
    "quantization_config: list": lie(MODEL | {"quantization_config": []}),
    "quantization_config: number": lie(MODEL | {"quantization_config": 3}),
    "text_config: list": lie(MODEL | {"text_config": [1]}, "", "text_config"),
}
