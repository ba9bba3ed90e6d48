"""Generation: ragged batches, ends, sampling, one program per bucket, texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.errors import ConfigError, FormatError
from jaxquant.generation import Sampling, _decode, _prefill, generate, sample
from jaxquant.models import CausalLM
from jaxquant.tokenize import Tokenizer
from tests.small_models import small_model

PROMPTS = [[5, 9, 3], [8], list(range(20)), [1, 2, 3, 4, 5, 6, 7]]
BUNDLED = Path(jaxquant.__file__).parent / "bundled" / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return small_model("llama")


def greedy_by_full_passes(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """No cache, no loop on the device: the whole text again for every token."""
    text = np.zeros((1, 32), np.int32)
    text[0, : len(prompt)] = prompt
    end = len(prompt)
    for _ in range(count):
        text[0, end] = int(np.argmax(np.asarray(model(text))[0, end - 1]))
        end += 1
    return text[0, len(prompt) : end].tolist()


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "mistral-window"])
def test_ragged_batch_equals_each_prompt_alone_without_a_cache(name: str):
    model = small_model(name)
    together = generate(model, PROMPTS, max_new_tokens=9, eos=())
    assert together == [greedy_by_full_passes(model, prompt, 9) for prompt in PROMPTS]
    assert together[:1] == generate(model, PROMPTS[:1], max_new_tokens=9, eos=())


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_rotations_go_by_the_length_of_a_row_and_not_of_its_padding(name: str):
    model = small_model(name)
    together = generate(model, PROMPTS, max_new_tokens=9, eos=())
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert row[0] == int(np.argmax(np.asarray(model(np.array([prompt])))[0, -1]))
        assert [row] == generate(model, [prompt], max_new_tokens=9, eos=())


def test_rows_end_at_their_own_stop_token(model: CausalLM):
    free = generate(model, PROMPTS, max_new_tokens=12, eos=())
    stop = free[0][4]
    ended = generate(model, PROMPTS, max_new_tokens=12, eos=stop)
    for row, whole in zip(ended, free, strict=True):
        first = whole.index(stop) + 1 if stop in whole else 12
        assert row == whole[:first]
    assert len(ended[0]) <= 5 < max(map(len, ended))
    several = generate(model, PROMPTS[:1], max_new_tokens=12, eos=[stop, free[0][1]])
    assert several == [free[0][: free[0].index(free[0][1]) + 1]]


def test_stop_tokens_come_from_the_config(model: CausalLM):
    free = generate(model, PROMPTS, max_new_tokens=40, eos=())
    (stop,) = model.config.eos
    for row, whole in zip(generate(model, PROMPTS, max_new_tokens=40), free, strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_one_program_per_bucket(model: CausalLM):
    generate(model, [[1] * 9, [2] * 3], max_new_tokens=5)
    sizes = _prefill._cache_size(), _decode._cache_size()
    generate(model, [[3] * 16, [2]], max_new_tokens=16)
    generate(model, [[3] * 2, [2] * 13], max_new_tokens=1, temperature=0.0)
    assert (_prefill._cache_size(), _decode._cache_size()) == sizes
    generate(model, [[3] * 17, [2]], max_new_tokens=16)
    assert _prefill._cache_size() == sizes[0] + 1


def test_another_tokenizer_compiles_nothing_anew():
    first, second = small_model("llama"), small_model("llama", seed=1)
    one = generate(first, [[1, 2]], max_new_tokens=4, eos=())
    sizes = _prefill._cache_size(), _decode._cache_size()
    second.tokenizer = Tokenizer.from_directory(BUNDLED)
    assert generate(second, [[1, 2]], max_new_tokens=4, eos=()) != one
    assert (_prefill._cache_size(), _decode._cache_size()) == sizes


def test_seeds(model: CausalLM):
    def draw(seed: int) -> list[list[int]]:
        return generate(model, [[5, 9]] * 3, max_new_tokens=8, temperature=1.5, seed=seed, eos=())

    assert draw(1) == draw(1) != draw(2)
    # Equal in their lower 32 bits.
    alike = (1, 1 + 2**32, 1 + 2**33, 1 - 2**32, 1 - 2**63)
    assert len({str(draw(seed)) for seed in alike}) == len(alike)
    rows = draw(1)
    assert rows[0] != rows[1] != rows[2]


def test_tiny_temperature_is_greedy(model: CausalLM):
    cold = generate(model, PROMPTS, max_new_tokens=6, temperature=1e-4, eos=())
    assert cold == generate(model, PROMPTS, max_new_tokens=6, eos=())
    first = generate(model, PROMPTS, max_new_tokens=6, temperature=3.0, top_k=1, eos=())
    assert first == cold
    assert cold == generate(model, PROMPTS, max_new_tokens=6, temperature=3.0, top_p=1e-6, eos=())


def frequencies(
    logits: Sequence[float], top_k: int, top_p: float, temperature: float = 1.0
) -> np.ndarray:
    draws = 20_000
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    filtered = top_k < len(logits) or top_p < 1
    tokens = sample(
        many,
        jax.random.split(jax.random.key(0), draws),
        Sampling(False, filtered),
        jnp.float32(temperature),
        jnp.int32(top_k),
        jnp.float32(top_p),
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


LOGITS = np.log([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (5, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (5, 0.69, [1, 3]),
        (5, 0.71, [1, 3, 4]),
        # Of the three that top_k leaves, 0.4 / 0.85 and 0.7 / 0.85 come before.
        (3, 0.46, [1]),
        (3, 0.8, [1, 3]),
    ],
)
def test_sampling_distribution(top_k: int, top_p: float, kept: list[int]):
    expected = np.zeros(5)
    expected[kept] = np.exp(LOGITS)[kept]
    expected /= expected.sum()
    found = frequencies(LOGITS.tolist(), top_k, top_p)
    assert np.abs(found - expected).max() < 0.015
    assert not found[expected == 0].any()


def test_temperature_scales_logits():
    expected = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    assert np.abs(frequencies(LOGITS.tolist(), 5, 1.0, 2.0) - expected).max() < 0.015


def test_ties_are_cut_by_rank():
    assert (frequencies([0.0, 0.0, 0.0, 0.0], 2, 1.0) > 0).sum() == 2


@pytest.mark.parametrize(
    "prompts, settings, where",
    [
        ([[1], []], {}, "prompt 1"),
        ([[1, 64]], {}, "prompt 0"),
        ([[-1]], {}, "prompt 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ("text", {}, "prompts"),
        (["text"], {}, "prompts"),
        (["text", [1]], {}, "prompts"),
    ],
)
def test_bad_input(model: CausalLM, prompts, settings: dict, where: str):
    with pytest.raises(ConfigError) as error:
        generate(model, prompts, **{"max_new_tokens": 4, **settings})
    assert error.value.where == where


def test_no_prompts_give_no_texts(model: CausalLM):
    assert generate(model, [], max_new_tokens=4) == []


def test_texts(model: CausalLM):
    tokenizer = Tokenizer.from_directory(BUNDLED)
    for text in ("He said nothing.", "naïve – “quoted”"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = "a b"
    ids = tokenizer.encode(prompt)
    if max(ids) >= model.config.vocab_size:
        ids, prompt = tokenizer.encode("!"), "!"
    model.tokenizer = tokenizer
    try:
        (text,) = generate(model, [prompt], max_new_tokens=4, eos=())
        (tokens,) = generate(model, [ids], max_new_tokens=4, eos=())
    finally:
        model.tokenizer = None
    assert text == tokenizer.decode(tokens)


def test_tokenizer_errors(tmp_path: Path):
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer.from_directory(BUNDLED).chat([{"role": "user", "content": "hello"}])


def test_chat_needs_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    tokenizer = Tokenizer(None, chat_template="{{ messages }}")
    with pytest.raises(ConfigError, match="jinja2 is not installed"):
        tokenizer.chat([])


def test_chat_template(tmp_path: Path):
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer.json").write_bytes((BUNDLED / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}'
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}[assistant]\"}"
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    message = {"role": "user", "content": "hello"}
    assert tokenizer.chat([message]) == "<s>[user] hello [assistant]"
    with pytest.raises(ConfigError, match="one only"):
        tokenizer.chat([message, message])
