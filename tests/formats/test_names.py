"""The matching rules of ignore lists, and patterns that could run for ever."""

import time

import pytest

from jaxquant.errors import FormatError
from jaxquant.formats.base import Coverage
from jaxquant.formats.names import (
    by_component,
    by_glob,
    by_name_or_regex,
    by_regex_or_suffix,
    by_substring,
    ignored_by,
    roots,
    search_prefix,
    string_list,
)

GATE = "model.layers.1.mlp.gate"
GATE_UP = "model.layers.1.mlp.gate_up_proj"
Q = "model.layers.10.self_attn.q_proj"

RULES = [
    (by_component, "mlp.gate", GATE, True),
    (by_component, "mlp.gate", GATE_UP, False),
    (by_component, "model.layers.1", Q, False),
    (by_component, GATE, GATE, True),
    (by_regex_or_suffix, "gate", "model.layers.1.xyz_gate", True),
    (by_regex_or_suffix, r"model\.layers\.1", GATE, True),
    (by_regex_or_suffix, r"model\.layers\.1", Q, False),
    (by_regex_or_suffix, r"mlp\.gat.", GATE, False),
    (by_regex_or_suffix, r".*\.mlp\.gate", GATE, True),
    (by_regex_or_suffix, r".*\.mlp\.gate", GATE_UP, False),
    (by_substring, "gate", GATE_UP, True),
    (by_substring, "experts", GATE, False),
    (by_name_or_regex, GATE, GATE, True),
    (by_name_or_regex, "gate", GATE, False),
    (by_name_or_regex, "re:.*gate$", GATE, True),
    (by_name_or_regex, "re:.*gate$", GATE_UP, False),
    (by_name_or_regex, "re:gate", GATE, False),
    (by_glob, "model.layers.1.mlp*", GATE_UP, True),
    (by_glob, "model.layers.1", GATE, True),
    (by_glob, "model.layers.1", Q, False),
    (by_glob, "*lm_head*", "lm_head", True),
]


@pytest.mark.parametrize("rule,entry,path,expected", RULES)
def test_each_familys_rule(rule, entry, path, expected):
    assert rule(entry, path) is expected
    coverage = Coverage((entry,), rule)
    assert (ignored_by(coverage, path) == entry) is expected


@pytest.mark.parametrize("rule", [by_component, by_regex_or_suffix, by_name_or_regex, by_glob])
def test_long_lists_give_the_same_answer_as_each_entry(rule):
    entries = (*(f"model.layers.{i}.mlp.gate" for i in range(61)), "lm_head", "re:.*norm$")
    for path in (GATE, GATE_UP, Q, "lm_head", "layers.3.mlp.gate"):
        alone = [e for e in entries if any(rule(e, name) for name in roots(path))]
        assert (ignored_by(Coverage(entries, rule), path) is not None) is bool(alone)


def test_roots_are_exchanged():
    coverage = Coverage(("language_model.model.layers.1.mlp.gate",), by_name_or_regex)
    assert ignored_by(coverage, "model.language_model.layers.1.mlp.gate")
    assert ignored_by(coverage, "model.layers.2.mlp.gate") is None
    assert ignored_by(Coverage(("layers.1.mlp.gate",), by_name_or_regex), GATE)


def test_a_fused_entry_covers_its_parts():
    coverage = Coverage(("model.layers.10.self_attn.qkv_proj",), by_name_or_regex)
    assert ignored_by(coverage, Q)
    assert ignored_by(coverage, Q.replace("q_proj", "o_proj")) is None


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*)*", "((ab)*c)*", "(.*a){9,}x+", "(x+x+)+y"])
def test_nested_repeats_are_refused(pattern):
    with pytest.raises(FormatError, match="for ever"):
        search_prefix(pattern, "a" * 40)


def test_many_repeats_are_refused_only_on_long_names():
    pattern = ".*" * 8 + "x"
    with pytest.raises(FormatError, match="for ever"):
        search_prefix(pattern, "a" * 200)
    assert search_prefix(pattern, "aaax") == 4


def test_real_patterns_pass():
    experts = r".*mlp\.experts\.\d+\.(gate|up)_proj$"
    start = time.process_time()
    assert search_prefix(experts, "model.layers.3.mlp.experts.17.up_proj") == 37
    assert search_prefix(r"[a-z.+*]+\(x\)", "no") is None
    assert search_prefix(r"(?:a|b)*\.c", "ab.c") == 4
    assert time.process_time() - start < 0.5


def test_lists_are_united_and_checked():
    assert string_list({"a": ["x"], "b": ["x", "y"], "c": None}, "a", "b", "c") == ("x", "y")
    assert string_list({"a": "x"}, "a") == ("x",)
    with pytest.raises(FormatError, match="list of names"):
        string_list({"a": [1]}, "a")
