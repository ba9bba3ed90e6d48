"""Metadata of a GGUF model that is no model: types, sizes and a tokenizer that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.convert import from_pretrained
from tests.convert.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    I64,
    STRING,
    U32,
    U64,
    array,
    build,
    pair,
    scalar,
    strings,
    text,
)
from tests.convert.gguf_models import MOE, VOCAB, dense_family, expert_family, metadata
from tests.hostile.harness import Case

FILE = "model.gguf"
TENSORS = dense_family(True).tensors("Q8_0")
EXPERTS = expert_family(norms=True).tensors("Q8_0")
TOKENS = [b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(VOCAB - 3))]
PIECES = {
    "tokenizer.ggml.model": pair("tokenizer.ggml.model", STRING, text("llama")),
    "tokenizer.ggml.tokens": strings("tokenizer.ggml.tokens", TOKENS),
    "tokenizer.ggml.scores": pair(
        "tokenizer.ggml.scores", ARRAY, array(F32, [-float(i) for i in range(VOCAB)])
    ),
}


def read(folder: Path) -> Any:
    return from_pretrained(folder / FILE, dtype=np.float32)


def value(content: object) -> tuple[int, bytes]:
    """A metadata value's type and bytes."""
    if isinstance(content, tuple):
        kind, number = content
        return kind, scalar(kind, number)
    if isinstance(content, list):
        return ARRAY, array(
            STRING if content and isinstance(content[0], str | bytes) else I32, content
        )
    kind = {bool: BOOL, float: F32, str: STRING, bytes: STRING}.get(type(content), U32)
    return kind, scalar(kind, content)


def model(changes: dict[str, object], arch: str = "llama", tensors: Any = TENSORS, **more) -> bytes:
    """The good model with other values of some keys; None takes a key away."""
    pairs = {p[8 : 8 + int.from_bytes(p[:8], "little")].decode(): p for p in metadata(arch, **more)}
    pairs |= PIECES
    for key, content in changes.items():
        pairs.pop(key, None)
        if content is not None:
            pairs[key] = pair(key, *value(content))
    return build(list(pairs.values()), tensors)


def lie(key: str, content: object, subject: str | None = None) -> Case:
    return Case({FILE: model({key: content})}, FILE, "", key if subject is None else subject)


GOOD = Case({FILE: model({})}, FILE)
WRONG: dict[str, object] = {
    "text": "many",
    "negative": (I32, -1),
    "zero": 0,
    "fraction": 1.5,
    "boolean": True,
    "array": [1, 2, 3],
    "huge": (U64, (1 << 64) - 1),
    "2 to the 31": (U64, 1 << 31),
    "NaN": float("nan"),
    "infinite": (F64, float("inf")),
    "least integer": (I64, -(1 << 63)),
}
SIZES = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length")
CASES = {
    f"{key}: {name}": lie(f"llama.{key}", content, "")
    for key in SIZES
    for name, content in WRONG.items()
}
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
CASES |= {
    f"{key}: {name}": lie(f"llama.{key}", WRONG[name])
    for key in NUMBERS
    for name in ("text", "boolean", "array", "NaN", "infinite", "negative", "zero")
}
CASES |= {
    f"{key}: {name}": lie(f"llama.{key}", WRONG[name], "")
    for key in ("attention.head_count_kv", "attention.key_length", "context_length")
    for name in ("text", "negative", "fraction", "array", "huge")
}
CASES |= {
    f"no {key}": lie(f"llama.{key}", None)
    for key in ("block_count", "embedding_length", "attention.head_count", "context_length")
}
CASES |= {
    "architecture: number": lie("general.architecture", 3),
    "architecture: array": lie("general.architecture", ["llama"]),
    "architecture: absent": lie("general.architecture", None),
    "architecture: unknown": lie("general.architecture", "megabyte"),
    "architecture: another's keys": lie("general.architecture", "qwen2", "qwen2."),
    "rope scaling: unknown": lie("llama.rope.scaling.type", "spiral"),
    "rope scaling: number": lie("llama.rope.scaling.type", 3),
    "rope scaling: no factor": lie("llama.rope.scaling.type", "linear", "rope.scaling.factor"),
    "rope dimension: too many": lie("llama.rope.dimension_count", 1 << 30, ""),
    "rope dimension: odd": lie("llama.rope.dimension_count", 3, ""),
    "tokens: number": lie("tokenizer.ggml.tokens", 3),
    "tokens: none": lie("tokenizer.ggml.tokens", [], ""),
    "tokens: twice": lie("tokenizer.ggml.tokens", [b"a", b"a"]),
    "tokens: not UTF-8": lie("tokenizer.ggml.tokens", [b"\xff"] * VOCAB),
    "tokens: one of a megabyte": lie("tokenizer.ggml.tokens", [b"a" * (1 << 20), *TOKENS[1:]]),
    "scores: another length": lie("tokenizer.ggml.scores", [1, 2]),
    "scores: text": lie("tokenizer.ggml.scores", "high"),
    "tokenizer: unknown": lie("tokenizer.ggml.model", "bert"),
    "tokenizer: number": lie("tokenizer.ggml.model", 3),
    "tokenizer: array": lie("tokenizer.ggml.model", ["llama"]),
    "bos: past the end": lie("tokenizer.ggml.bos_token_id", 1 << 20),
    "bos: text": lie("tokenizer.ggml.bos_token_id", "<s>"),
    "merges: no pair": Case(
        {FILE: model({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["abc"]})},
        FILE,
        "",
        "tokenizer.ggml.merges",
    ),
    "merges: of no tokens": Case(
        {FILE: model({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["qq zz"]})},
        FILE,
        "",
        "tokenizer.ggml",
    ),
    "split pattern: unknown": Case(
        {
            FILE: model(
                {
                    "tokenizer.ggml.model": "gpt2",
                    "tokenizer.ggml.pre": "mine",
                    "tokenizer.ggml.merges": ["t 1"],
                }
            )
        },
        FILE,
        "",
        "tokenizer.ggml.pre",
    ),
    "a tensor too many": Case(
        {
            FILE: build(
                metadata("llama"), [*TENSORS, TENSORS[0]._replace(name="blk.0.extra.weight")]
            )
        },
        FILE,
        "blk.0.extra.weight",
    ),
    "a tensor missing": Case({FILE: build(metadata("llama"), TENSORS[:-1])}, "", "missing"),
    "no embedding": Case({FILE: build(metadata("llama"), TENSORS[1:])}, FILE, "token_embd"),
    "experts: too many": Case(
        {FILE: model({}, "qwen3moe", EXPERTS, **MOE | {"expert_count": 1 << 30})}, ""
    ),
    "experts: more chosen than there are": Case(
        {FILE: model({}, "qwen3moe", EXPERTS, **MOE | {"expert_used_count": 99})}, ""
    ),
}
