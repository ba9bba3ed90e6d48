"""Lies in ``tokenizer.json``, ``tokenizer_config.json`` and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxquant.tokenize import Tokenizer
from tests.hostile.config_cases import TEXTS
from tests.hostile.harness import Case, Link

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "user", "content": "again"}]
WORDS: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "hello": 1}, "unk_token": "<unk>"},
}


def read(folder: Path) -> Any:
    tokenizer = Tokenizer.from_directory(folder)
    tokenizer.encode("hello")
    return tokenizer.chat(MESSAGES) if tokenizer.chat_template else tokenizer


def lie(content: object, file: str = FILE, where: str | None = None) -> Case:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    good = {FILE: json.dumps(WORDS).encode()}
    return Case(good | {file: text}, file if where is None else where)


def template(text: str) -> Case:
    return lie(text.encode(), TEMPLATE, "chat")


GOOD = template(
    "{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}{% endfor %}"
    "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}"
)
CASES = {
    name: lie(text)
    for name, text in TEXTS.items()
    if name not in ("duplicate key", "duplicate inner key")
}
CASES |= {
    f"settings: {name}": lie(text, SETTINGS)
    for name, text in TEXTS.items()
    if name not in ("pointer of Git LFS",)
}
CASES |= {
    "no unknown word": lie(WORDS | {"model": {**WORDS["model"], "vocab": {"other": 1}}}),
    "no model": lie({k: v for k, v in WORDS.items() if k != "model"}),
    "model a text": lie(WORDS | {"model": "BPE"}),
    "model of an unknown type": lie(WORDS | {"model": {"type": "Magic", "vocab": {}}}),
    "vocabulary a list": lie(WORDS | {"model": {"type": "WordLevel", "vocab": ["a"]}}),
    "ids that are texts": lie(WORDS | {"model": {"type": "WordLevel", "vocab": {"a": "0"}}}),
    "negative ids": lie(WORDS | {"model": {"type": "WordLevel", "vocab": {"a": -1}}}),
    "ids past 32 bits": lie(WORDS | {"model": {"type": "WordLevel", "vocab": {"a": 1 << 40}}}),
    "merges of unknown tokens": lie(
        WORDS | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}
    ),
    "merges that are numbers": lie(
        WORDS | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}}
    ),
    "merges of three": lie(
        WORDS | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a a"]}}
    ),
    "broken split pattern": lie(
        WORDS
        | {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a"},
                "behavior": "Isolated",
                "invert": False,
            }
        }
    ),
    "unknown normalizer": lie(WORDS | {"normalizer": {"type": "Magic"}}),
    "version 9": lie(WORDS | {"version": "9.0"}),
    "added token without an id": lie(WORDS | {"added_tokens": [{"content": "a"}]}),
    "a link to itself": Case({FILE: Link(FILE)}, "model"),
    "a device": Case({FILE: Link("/dev/zero")}, "model"),
    "chat_template a number": lie({"chat_template": 3}, SETTINGS),
    "chat_template an object": lie({"chat_template": {"default": "x"}}, SETTINGS),
    "chat_template a list of numbers": lie(
        {"chat_template": [{"name": "default", "template": 3}]}, SETTINGS
    ),
    "bos_token a list": lie({"bos_token": ["<s>"]}, SETTINGS),
    "bos_token a number": lie({"bos_token": 1}, SETTINGS),
    "bos_token without content": lie({"bos_token": {"lstrip": True}}, SETTINGS),
    "template not UTF-8": lie(b"\xff\xfe", TEMPLATE),
    "template of nine megabytes": lie(b"x" * (9 << 20), TEMPLATE),
    "template: unclosed": template("{% for m in messages %}"),
    "template: unknown filter": template("{{ messages | magic }}"),
    "template: unknown tag": template("{% magic %}"),
    "template: include": template("{% include '/etc/passwd' %}"),
    "template: import": template("{% import 'os' as os %}"),
    "template: extends": template("{% extends '/etc/passwd' %}"),
    "template: class of a text": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: globals of a function": template("{{ range.__globals__['__builtins__'] }}"),
    "template: globals through a filter": template("{{ ''|attr('__class__')|attr('mro')() }}"),
    "template: format attribute": template("{{ '{0.__class__.__init__.__globals__}'.format(x) }}"),
    "template: changes the messages": template("{{ messages.append(messages) }}"),
    "template: refuses": template("{{ raise_exception('no') }}"),
    "template: division by zero": template("{{ 1 // 0 }}"),
    "template: text plus number": template("{{ 'a' + 1 }}"),
    "template: key of nothing": template("{{ nothing.at.all }}"),
    "template: long loop": template("{% for i in range(99999999) %}x{% endfor %}"),
    "template: nested loops": template(
        "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "template: loops over a text": template(
        "{% set s = 'x' * 1000 %}{% for a in s %}{% for b in s %}{% for c in s %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "template: endless macro": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "template: branching macro": template(
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "template: large text": template("{{ 'x' * 10000000000 }}"),
    "template: large list": template("{{ ([0] * 10000000000) | length }}"),
    "template: large power": template("{{ 9 ** 9 ** 9 }}"),
    "template: product of large numbers": template(
        "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
        "{% endfor %}"
    ),
    "template: text that doubles": template(
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}"
    ),
    "template: text that doubles by joining": template(
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}"
    ),
    "template: block that doubles": template(
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}"
    ),
    "template: wide format": template("{{ '%9999999999d' % 1 }}"),
    "template: wide format filter": template("{{ '%9999999999d' | format(1) }}"),
    "template: wide format method": template("{{ '{:>9999999999}'.format('a') }}"),
    "template: centred in a desert": template("{{ 'a' | center(9999999999) }}"),
    "template: centred by a method": template("{{ 'a'.center(9999999999) }}"),
    "template: indented": template("{{ 'a\n' * 1000 | indent(9999999999) }}"),
    "template: replaced": template("{{ ('x' * 100000).replace('x', 'y' * 100000) }}"),
    "template: JSON of wide indents": template("{{ messages | tojson(indent=9999999999) }}"),
}
