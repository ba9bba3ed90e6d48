"""Tokenizers rebuilt from GGUF metadata, against the tokenizers that the metadata came from."""

import itertools

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from jaxquant.convert.gguf_tokenizer import metadata_of, read_tokenizer
from jaxquant.convert.load import tokenizer_of
from jaxquant.convert.read_gguf import open_gguf
from jaxquant.convert.write_gguf import write_gguf
from jaxquant.errors import FormatError

TEXTS = [
    "Hello, world! It's 2024; they'll've 12345 apples.",
    "naïve café — 東京 ﬁ\r\n\r\n  indented\ttabs   ",
    "def f(x):\n    return x**2  # ok?\n",
    "",
    " leading and trailing ",
]
# Written out in full here, and not imported: these are the patterns of the original tokenizers.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pattern: str | None, nfc: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = level
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def rebuilt(tmp_path, metadata):
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata, [])
    return read_tokenizer(open_gguf(path))


@pytest.mark.parametrize(
    ("pre", "pattern", "nfc"),
    [("gpt-2", None, False), ("llama-bpe", LLAMA3, False), ("qwen2", QWEN2, True)],
)
def test_byte_level_tokenizers_are_rebuilt(pre, pattern, nfc, tmp_path):
    original = trained(pattern, nfc)
    metadata = metadata_of(original, {"bos": 0, "eos": 1})
    assert metadata["tokenizer.ggml.pre"] == pre
    metadata["tokenizer.ggml.add_bos_token"] = False
    found = rebuilt(tmp_path, metadata)
    for text in [*TEXTS, "a<|end|>b"]:
        ids = original.encode(text).ids
        assert found.backend.encode(text).ids == ids
        assert found.backend.decode(ids, skip_special_tokens=False) == original.decode(
            ids, skip_special_tokens=False
        )
    assert found.special == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert found.chat_template is None
    assert found.backend.decode([0, 1]) == ""


def test_split_patterns_differ(tmp_path):
    """Negative control: under another name the same vocabulary cuts numbers elsewhere."""
    metadata = metadata_of(trained(LLAMA3), {})
    right = rebuilt(tmp_path, metadata).backend.encode(TEXTS[0]).ids
    wrong = rebuilt(tmp_path, metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert wrong.backend.encode(TEXTS[0]).ids != right


def test_deepseek3_splits(tmp_path):
    metadata = metadata_of(trained(None), {}) | {"tokenizer.ggml.pre": "deepseek-v3"}
    backend = rebuilt(tmp_path, metadata).backend
    pieces = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("ab 1234_x 東京yes!\n")]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expected = ["ab", " ", "123", "4", "_x", " ", "東京", "yes", "!\n"]
    assert pieces == [alphabet.pre_tokenize_str(piece)[0][0] for piece in expected]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, ["bos"]),
        ({"add_eos_token": True}, ["eos"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["bos", "eos"]),
    ],
)
def test_tokens_around_a_text(flags, expected, tmp_path):
    original = trained(None)
    metadata = metadata_of(original, {"bos": 0, "eos": 1})
    metadata |= {f"tokenizer.ggml.{k}": v for k, v in flags.items()}
    backend = rebuilt(tmp_path, metadata).backend
    plain = original.encode("hello").ids
    ids = [0] * ("bos" in expected) + plain + [1] * ("eos" in expected)
    assert backend.encode("hello").ids == ids
    assert backend.encode("hello", add_special_tokens=False).ids == plain
    assert backend.encode("hello", "hello").ids == ids + ids


def sentence_pieces():
    """Pieces with scores: characters, then words from frequent to rare."""
    words = ["▁h", "el", "lo", "▁hel", "▁hello", "ll", "ello", "▁w", "or", "ld", "▁world", "orld"]
    chars = sorted({c for w in words for c in w} | {"x"})
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words, *chars]
    scores = [0.0] * (3 + 256) + [-float(i + 1) for i in range(len(words))] + [-100.0] * len(chars)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(chars))
    return tokens, np.float32(scores), np.int32(kinds)


def sentence_piece_metadata(**more):
    tokens, scores, kinds = sentence_pieces()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def greedy(text: str) -> list[str]:
    """SentencePiece's rule, directly: join the best-scored neighbours until none can be joined."""
    tokens, scores, _ = sentence_pieces()
    score = dict(zip(tokens, scores.tolist(), strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (score[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in score
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bytes_ = [[p] if p in score else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [piece for pieces in bytes_ for piece in pieces]


@pytest.mark.parametrize(
    "text", ["hello world", "hell", "world hello", "low", "xx wor", "é hello", "hello  hello"]
)
def test_sentence_piece_tokenizers_are_rebuilt(text, tmp_path):
    found = rebuilt(tmp_path, sentence_piece_metadata())
    encoded = found.backend.encode(text)
    assert encoded.tokens == ["<s>", *greedy(text)]
    assert found.backend.decode(encoded.ids) == text
    assert found.chat_template == "{{ messages }}"
    assert found.special["unk_token"] == "<unk>"


def test_no_space_prefix(tmp_path):
    found = rebuilt(tmp_path, sentence_piece_metadata(add_space_prefix=False, add_bos_token=False))
    assert found.backend.encode("lo").tokens == ["lo"]


GOOD = metadata_of(trained(None), {"bos": 0})


@pytest.mark.parametrize(
    ("changes", "message", "key"),
    [
        ({"model": "none"}, "no tokenizer", "model"),
        ({"model": "bert"}, "'bert'", "model"),
        ({"model": 3}, "3", "model"),
        ({"model": ["gpt2"]}, "gpt2", "model"),
        ({"model": np.int32([1, 2])}, "array", "model"),
        ({"pre": np.int32([1])}, "array", "pre"),
        ({"pre": "unheard-of"}, "unheard-of", "pre"),
        ({"tokens": np.int32([1, 2])}, "array of strings", "tokens"),
        ({"tokens": ["a", "a"]}, "1 tokens twice", "tokens"),
        ({"merges": np.int32([1])}, "array of strings", "merges"),
        ({"merges": ["one"]}, "two tokens", "merges"),
        ({"merges": ["a b c"]}, "two tokens", "merges"),
        ({"merges": [" a"]}, "two tokens", "merges"),
        ({"merges": ["unheard of"]}, "no tokenizer", "tokens"),
        ({"token_type": np.int32([1, 2, 3])}, "another length", "token_type"),
        ({"token_type": "words"}, "another length", "token_type"),
        ({"bos_token_id": 10**6}, "1000000", "bos_token_id"),
        ({"bos_token_id": -1}, "-1", "bos_token_id"),
        ({"bos_token_id": "zero"}, "zero", "bos_token_id"),
        ({"add_eos_token": True}, "missing", "eos_token_id"),
    ],
)
def test_damaged_tokenizers(changes, message, key, tmp_path):
    metadata = GOOD | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(FormatError, match=message) as error:
        rebuilt(tmp_path, metadata)
    assert error.value.where.endswith(f"tokenizer.ggml.{key}")


def test_tokenizers_that_gguf_cannot_describe():
    odd = trained(None)
    odd.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(FormatError, match="known split"):
        metadata_of(odd, {})
    with pytest.raises(FormatError, match="known split"):
        metadata_of(trained(r"\w+"), {})
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(FormatError, match="WordLevel"):
        metadata_of(words, {})


def test_a_tokenizer_beside_the_file_stands_in(tmp_path):
    """As the error for an unknown split pattern advises."""
    original = trained(None)
    metadata = metadata_of(original, {}) | {"tokenizer.ggml.pre": "unheard-of"}
    write_gguf(tmp_path / "model.gguf", metadata, [])
    with pytest.raises(FormatError, match=r"tokenizer\.json beside"):
        tokenizer_of(tmp_path / "model.gguf")
    original.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer_of(tmp_path / "model.gguf")
    assert found is not None
    assert found.encode(TEXTS[0]) == original.encode(TEXTS[0]).ids
