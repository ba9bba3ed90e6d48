"""The tokenizer in a GGUF file's metadata, rebuilt with the ``tokenizers`` library.

Two models occur in language models: byte-level BPE (``gpt2``), whose split pattern the file only
names, and SentencePiece BPE (``llama``), whose merges follow from the scores of the pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxquant.convert.read_gguf import Gguf
from jaxquant.errors import FormatError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LAST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_LAST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_LAST}",)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LAST}",
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "deepseek-v3": _DEEPSEEK3,
}
"""Split patterns by ``tokenizer.ggml.pre``; none stands for GPT-2's, which the library has."""

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
MAX_SQUARES = 100_000_000
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class GgufTokenizer(NamedTuple):
    """What a file says about its tokenizer.

    Attributes:
        backend: a ``tokenizers.Tokenizer``.
        chat_template: Jinja source of the chat format, or None.
        special: special tokens that templates may use (``bos_token`` ...).
    """

    backend: Any
    chat_template: str | None
    special: Mapping[str, str]


class _Vocabulary(NamedTuple):
    """The token section, checked."""

    where: str
    tokens: list[str]
    ids: dict[str, int]
    kinds: list[int]

    def with_kind(self, kind: int) -> list[str]:
        return [t for t, k in zip(self.tokens, self.kinds, strict=True) if k == kind]


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _numbers(file: Gguf, name: str, count: int, default: float) -> np.ndarray:
    values = file.metadata.get(_key(name))
    if values is None:
        return np.full(count, default)
    if not isinstance(values, np.ndarray) or values.shape != (count,):
        raise FormatError(f"{file.path}: {_key(name)}", "another length", f"{count} numbers")
    return values


def _strings(file: Gguf, name: str) -> list[str]:
    values = file.metadata.get(_key(name))
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise FormatError(f"{file.path}: {_key(name)}", "missing", "an array of strings")
    return values


def _vocabulary(file: Gguf) -> _Vocabulary:
    tokens = _strings(file, "tokens")
    where = f"{file.path}: {_key('tokens')}"
    ids = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(ids) != len(tokens):
        raise FormatError(where, f"{len(tokens) - len(ids)} tokens twice", "tokens are unique")
    # Finding the merges of a piece takes time with the square of its length.
    if sum(len(token) ** 2 for token in tokens) > MAX_SQUARES:
        longest = max(map(len, tokens))
        raise FormatError(where, f"tokens of up to {longest} letters", "tokens are short")
    kinds = _numbers(file, "token_type", len(tokens), 1).tolist()
    return _Vocabulary(where, tokens, ids, kinds)


def _token_id(file: Gguf, role: str, vocabulary: _Vocabulary) -> int | None:
    number = file.metadata.get(_key(f"{role}_token_id"))
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(vocabulary.tokens):
        where = f"{file.path}: {_key(role)}_token_id"
        raise FormatError(where, f"{number!r}"[:60], f"below {len(vocabulary.tokens)}")
    return number


def _merges_from_scores(vocabulary: _Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores highest: merges in order of that score."""
    ids = vocabulary.ids
    ranked: list[tuple[float, int, int, str]] = []
    for i, token in enumerate(vocabulary.tokens):
        if vocabulary.kinds[i] != 1:
            continue
        for cut in range(1, len(token)):
            if token[:cut] in ids and token[cut:] in ids:
                ranked.append((-float(scores[i]), i, cut, token))
    return [(token[:cut], token[cut:]) for _, _, cut, token in sorted(ranked)]


def _merges(file: Gguf) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(file, "merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            where = f"{file.path}: {_key('merges')}"
            raise FormatError(where, f"{merge[:60]!r}", "two tokens with a space between them")
        pairs.append((left, right))
    return pairs


def _byte_level(file: Gguf, vocabulary: _Vocabulary) -> Any:
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    pre = file.metadata.get(_key("pre"), "gpt-2")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise FormatError(
            f"{file.path}: {_key('pre')}",
            repr(pre)[:60],
            f"split patterns are known for {', '.join(_SPLITS)}",
            "put the original tokenizer.json beside the file",
        )
    patterns = _SPLITS[pre]
    # Llama 3's vocabulary has words that its merges cannot reach.
    model = models.BPE(vocabulary.ids, _merges(file), ignore_merges=pre in _LLAMA3_NAMES)
    tokenizer = tokenizers.Tokenizer(model)
    if patterns is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: Gguf, vocabulary: _Vocabulary) -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = _numbers(file, "scores", len(vocabulary.tokens), 0)
    unknown = _token_id(file, "unknown", vocabulary)
    model = models.BPE(
        vocabulary.ids,
        _merges_from_scores(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = file.metadata.get(_key("add_space_prefix"), True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _surround(tokenizer: Any, file: Gguf, vocabulary: _Vocabulary, begins: bool) -> None:
    """Add the tokens that a text begins and ends with."""
    from tokenizers import processors

    parts, special = ["$A"], []
    for role, default in (("bos", begins), ("eos", False)):
        number = _token_id(file, role, vocabulary)
        # Without the flag a model's usual token is added, if the file has one.
        usual = default and number is not None
        if not file.metadata.get(_key(f"add_{role}_token"), usual):
            continue
        if number is None:
            where = f"{file.path}: {_key(role)}_token_id"
            raise FormatError(where, "missing", f"add_{role}_token asks for it")
        token = vocabulary.tokens[number]
        parts = [token, *parts] if role == "bos" else [*parts, token]
        special.append((token, number))
    if special:
        second = ["$B:1" if part == "$A" else f"{part}:1" for part in parts]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, pair=[*parts, *second], special_tokens=special
        )


def read_tokenizer(file: Gguf) -> GgufTokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        file: an open file.
    Raises:
        FormatError: the file has no tokenizer, one of another kind, or a damaged one.
    """
    import tokenizers

    metadata = file.metadata
    kind = metadata.get(_key("model"))
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if not isinstance(kind, str) or kind not in builders:
        rule = "byte-level BPE (gpt2) and SentencePiece BPE (llama) are rebuilt"
        none = kind is None or (isinstance(kind, str) and kind in ("none", "no_vocab"))
        found = "no tokenizer" if none else repr(kind)[:60]
        action = "put the original tokenizer.json beside the file"
        raise FormatError(f"{file.path}: {_key('model')}", found, rule, action)
    vocabulary = _vocabulary(file)
    try:
        tokenizer = builders[kind](file, vocabulary)
    except FormatError:
        raise
    except Exception as error:  # The library raises bare Exception for bad merges.
        raise FormatError(vocabulary.where, f"no tokenizer ({error})"[:200]) from error
    added = tokenizers.AddedToken
    control = [*vocabulary.with_kind(_CONTROL), *vocabulary.with_kind(_UNKNOWN)]
    tokenizer.add_special_tokens([added(t, normalized=False, special=True) for t in control])
    own = vocabulary.with_kind(_USER_DEFINED)
    tokenizer.add_tokens([added(t, normalized=False) for t in own])
    begins = kind == "llama" or metadata.get(_key("pre"), "") in _LLAMA3_NAMES
    _surround(tokenizer, file, vocabulary, begins)
    special = _special_tokens(file, vocabulary)
    template = metadata.get("tokenizer.chat_template")
    return GgufTokenizer(tokenizer, template if isinstance(template, str) else None, special)


def _special_tokens(file: Gguf, vocabulary: _Vocabulary) -> dict[str, str]:
    found = {name: _token_id(file, role, vocabulary) for name, role in _SPECIAL.items()}
    return {f"{name}_token": vocabulary.tokens[i] for name, i in found.items() if i is not None}


def metadata_of(
    tokenizer: Any, special: Mapping[str, int], chat_template: str | None = None
) -> dict[str, Any]:
    """Metadata that describes a byte-level BPE tokenizer, for writing it into a GGUF file.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        special: token ids by role: ``bos``, ``eos``, ``unknown``, ``padding``.
        chat_template: Jinja source of the chat format.
    Raises:
        FormatError: the model is not BPE, its split pattern has no name in GGUF, or it puts other
            tokens around a text than those that begin and end one.
    """
    described = json.loads(tokenizer.to_str())
    model, pre = described["model"], described.get("pre_tokenizer") or {}
    name = _name_of_splits(pre)
    if model.get("type") != "BPE" or name is None:
        raise FormatError("tokenizer", f"{model.get('type')} model", "byte-level BPE, known split")
    special, flags = _around(tokenizer, special)
    control = {token["id"] for token in described["added_tokens"] if token["special"]}
    own = {token["id"] for token in described["added_tokens"]} - control
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    tokens = [tokenizer.id_to_token(i) or f"[PAD{i}]" for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = [_CONTROL if i in control else _USER_DEFINED if i in own else 1 for i in range(size)]
    return {
        _key("model"): "gpt2",
        _key("pre"): name,
        _key("tokens"): tokens,
        _key("token_type"): np.asarray(kinds, np.int32),
        _key("merges"): merges,
        **{_key(f"{role}_token_id"): np.uint32(number) for role, number in special.items()},
        **{_key(f"add_{role}_token"): added for role, added in flags.items()},
        **({"tokenizer.chat_template": chat_template} if chat_template else {}),
    }


def special_ids(tokenizer: Any, names: Mapping[str, str]) -> dict[str, int]:
    """Token ids by role, as :func:`metadata_of` wants them, of special tokens by name."""
    texts = {role: names.get(f"{name}_token") for name, role in _SPECIAL.items()}
    ids = {role: tokenizer.token_to_id(text) for role, text in texts.items() if text is not None}
    return {role: number for role, number in ids.items() if number is not None}


def _around(tokenizer: Any, special: Mapping[str, int]) -> tuple[dict[str, int], dict[str, bool]]:
    """Special tokens, and which of ``bos`` and ``eos`` a text gets; what it gets first is bos."""
    whole, plain = (tokenizer.encode("a", add_special_tokens=s).ids for s in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, behind = whole[:start], whole[start + len(plain) :]
    special = {**special, "bos": before[0]} if len(before) == 1 else dict(special)
    if len(before) > 1 or behind not in ([], [special.get("eos")]):
        raise FormatError("tokenizer", f"{before} and {behind} around a text", "one token each")
    return special, {"bos": bool(before), "eos": bool(behind)}


def _name_of_splits(pre: Mapping[str, Any]) -> str | None:
    """The GGUF name of a pre-tokenizer, None where it has none."""
    steps: Sequence[Any] = pre.get("pretokenizers", [pre])
    found = tuple(s["pattern"].get("Regex") for s in steps if s.get("type") == "Split")
    levels = [s for s in steps if s.get("type") == "ByteLevel"]
    if len(levels) != 1 or levels[0].get("use_regex", True) == bool(found):
        return None
    return next((name for name, patterns in _SPLITS.items() if patterns == found), None)
