"""Lies in mixed-precision plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxquant.convert.plan_file import read_plan, resolve
from tests.hostile.harness import Case, Link
from tests.hostile.quantization_cases import SLOW

FILE = "plan.yaml"
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(40)]


def read(folder: Path) -> Any:
    return resolve(read_plan(folder / FILE), MODULES)


def plan(text: str | bytes, found: str = "") -> Case:
    return Case({FILE: text if isinstance(text, bytes) else text.encode()}, FILE, found)


def body(text: str, found: str = "") -> Case:
    return plan(f"mixed_precision: {{base_model_path: a, {text}}}", found)


def mapped(key: str, precision: str = "w8a16", found: str = "") -> Case:
    quoted = key.replace("'", "''")
    return body(f"weight_mapping: {{'{quoted}': {precision}}}", found)


GOOD = mapped("re:model\\.layers\\.\\d+\\.self_attn\\.q_proj\\.weight")
LAUGHS = "a0: &a0 [x,x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
CASES = {
    "empty": plan(""),
    "null": plan("null"),
    "list": plan("[1, 2]", "no mixed_precision"),
    "text": plan("hello"),
    "number": plan("3"),
    "two documents": plan("mixed_precision: {}\n---\nmixed_precision: {}"),
    "not UTF-8": plan(b"mixed_precision: \xff"),
    "null byte": plan(b"mixed_precision: \x00"),
    "UTF-16 without a mark": plan("mixed_precision: {}".encode("utf-16-le")),
    "control byte": plan(b"mixed_precision: \x1b[2J"),
    "unclosed": plan("mixed_precision: {", "not a valid plan"),
    "tab": plan("mixed_precision:\n\t- a"),
    "another key beside it": plan("base_model_path: a\nmixed_precision: {}", "at the top"),
    "pointer of Git LFS": plan("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "aliases": plan("a: &x [1]\nmixed_precision: *x", "aliases"),
    "a billion laughs": plan(LAUGHS + "mixed_precision: *a11", "aliases"),
    "an alias of itself": plan("mixed_precision: &x {base_model_path: *x}", "aliases"),
    "merge keys": plan("a: &x {base_model_path: a}\nmixed_precision: {<<: *x}", "aliases"),
    "python object": plan("mixed_precision: !!python/object/apply:os.system ['true']"),
    "python name": plan("mixed_precision: !!python/name:os.system ''"),
    "unknown tag": plan("mixed_precision: !secret {}"),
    "binary": body("weight_mapping: {x: !!binary aGk=}"),
    "set": body("weight_mapping: !!set {x, y}"),
    "omap": body("weight_mapping: !!omap [x: fp8]"),
    "timestamp": body("weight_mapping: {x: 2001-01-01}"),
    "bad timestamp": body("weight_mapping: {x: 2001-99-99}"),
    "integer of 5000 digits": body("weight_mapping: {x: " + "1" * 5000 + "}"),
    "sexagesimal": body("weight_mapping: {x: 1:2:3:4}"),
    "infinite": body("weight_mapping: {x: .inf}"),
    "nested lists": plan("mixed_precision: " + "[" * 5000, "not a valid plan"),
    "nested objects": plan("mixed_precision: " + "{a: " * 5000 + "}" * 5000),
    "nested blocks": plan("".join(" " * i + "a:\n" for i in range(2000))),
    "long anchor": plan("mixed_precision: &" + "a" * 100_000 + " {}"),
    "long key": body(f"weight_mapping: {{? {'a' * 100_000} : w8a16}}", "at most 512"),
    "long complex key": body("weight_mapping: {? [a, b] : w8a16}"),
    "number as key": body("weight_mapping: {3: w8a16}"),
    "null as key": body("weight_mapping: {null: w8a16}"),
    "boolean as key": body("weight_mapping: {yes: w8a16}"),
    "list as key": plan("mixed_precision: {[a]: b}"),
    "key twice": plan("mixed_precision: {base_model_path: a, base_model_path: b}", "repeated"),
    "weight twice": body("weight_mapping: {x: w8a16, x: fp8}", "repeated"),
    "unknown key": body("weight_mapping: {x: w8a16}, seed: 1", "unknown keys"),
    "no mapping": plan("mixed_precision: {base_model_path: a}", "weight_mapping is missing"),
    "empty mapping": body("weight_mapping: {}", "weight_mapping is missing"),
    "mapping a list": body("weight_mapping: [x]"),
    "mapping a text": body("weight_mapping: fp8"),
    "no base": plan("mixed_precision: {weight_mapping: {x: w8a16}}", "neither base_model_path"),
    "base a number": plan(
        "mixed_precision: {base_model_path: 3, weight_mapping: {x: w8a16}}", "base_model_path"
    ),
    "base a list": plan("mixed_precision: {base_model_path: [a], weight_mapping: {x: w8a16}}"),
    "base null": plan("mixed_precision: {base_model_path: null, weight_mapping: {x: w8a16}}"),
    "base with a null byte": plan(
        'mixed_precision: {base_model_path: "a\\0b", weight_mapping: {x: w8a16}}'
    ),
    "a precision without a source": body("weight_mapping: {x: fp8}", "fp8"),
    "an unknown precision": body("weight_mapping: {x: w4a17}", "w4a17"),
    "a precision of 100000 letters": body(f"weight_mapping: {{x: {'w4a16_' * 20_000}}}"),
    "a precision with a huge group": body("weight_mapping: {x: w4a16_g" + "9" * 5000 + "}"),
    "a precision that is a number": body("weight_mapping: {x: 8}", "8"),
    "a precision that is a list": body("weight_mapping: {x: [fp8]}"),
    "a precision that is null": body("weight_mapping: {x: null}"),
    "base as a precision": body("weight_mapping: {x: base}"),
    "a directory": Case({f"{FILE}/x": b""}, FILE),
    "a link to itself": Case({FILE: Link(FILE)}, FILE),
    "a device": Case({FILE: Link("/dev/zero")}, FILE),
    "missing": Case({}, FILE),
}
CASES |= {f"pattern: {label}": mapped(f"re:{pattern}") for label, pattern in SLOW.items()}
