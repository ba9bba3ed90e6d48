"""JSON from untrusted files: bounded in size, depth and memory, duplicate keys refused.

Large flat objects (safetensors headers, index files) are scanned entry by entry with possessive
patterns, so that a bad entry is met before anything was built from the ones behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxquant.errors import FormatError

MAX_CONFIG_BYTES = 8 << 20
MAX_CONFIG_VALUES = 200_000
MAX_BRACKETS = 400_000
_CHUNK = 1 << 20

_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_PLAIN = rb'[^"\[\]{}]++'


def _nested(depth: int) -> bytes:
    inner = b"|".join([_PLAIN, _STRING] + ([_nested(depth - 1)] if depth else []))
    return rb"[\[{](?:" + inner + rb")*+[\]}]"


_VALUE = b"|".join([_STRING, _nested(3), rb'[^\s,"\[\]{}]++'])
_ENTRY = re.compile(rb"\s*+(" + _STRING + rb")\s*+:\s*+(" + _VALUE + rb")\s*+([,}])", re.DOTALL)
_OPEN = re.compile(rb"\s*+\{\s*+")


def scan_object(buffer: Any, where: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Yield ``(key, start, stop)`` of every member of the JSON object in ``buffer[start:stop]``.

    Values are not parsed; they may nest four deep, and there is a cap on brackets.

    Raises:
        FormatError: no JSON object, or bytes after it that are not white space.
    """
    brackets = 0
    for low in range(start, stop, _CHUNK):
        part = buffer[low : min(low + _CHUNK, stop)]
        brackets += part.count(b"[") + part.count(b"{")
        if brackets > MAX_BRACKETS:
            raise FormatError(where, f"over {MAX_BRACKETS} lists and objects", "a few a tensor")
    opened = _OPEN.match(buffer, start, stop)
    if opened is None:
        raise FormatError(where, "no JSON object", "it starts with '{'")
    position = opened.end()
    if buffer[position : position + 1] == b"}":
        position += 1
    else:
        while True:
            entry = _ENTRY.match(buffer, position, stop)
            if entry is None:
                found = bytes(buffer[position : position + 40])
                raise FormatError(
                    where,
                    f"no JSON member at byte {position}: {found!r}",
                    "members are '\"name\": value', nested at most four deep",
                )
            yield parse(entry[1], where), entry.start(2), entry.end(2)
            position = entry.end()
            if entry[3] == b"}":
                break
    if bytes(buffer[position:stop]).strip(b" \n\r\t"):
        raise FormatError(
            where, f"bytes after the JSON object, at {position}", "nothing follows it"
        )


class _DuplicateKey(Exception):
    """A key that occurs twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse(text: bytes, where: str) -> Any:
    """Parse a small JSON text.

    Raises:
        FormatError: not UTF-8 JSON, nested too deep, or with a duplicate key.
    """
    try:
        if text[:1] == b'"' and b"\\" not in text:
            return text[1:-1].decode()
        return _DECODER.decode(text.decode())
    except _DuplicateKey as error:
        raise FormatError(
            where, f"key {error.args[0]!r} twice in one JSON object", "keys are unique"
        ) from None
    except RecursionError:
        raise FormatError(where, "JSON nested too deep", "a few levels") from None
    except ValueError as error:
        raise FormatError(where, f"not valid JSON ({error})", "UTF-8 JSON") from None


def load_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file that holds an object, such as ``config.json``.

    Raises:
        FormatError: unreadable, over the caps, malformed, or not an object.
    """
    where = str(path)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise FormatError(where, f"{size} bytes", f"a config has at most {MAX_CONFIG_BYTES}")
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(where, error.strerror or str(error), "a readable file") from None
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_CONFIG_VALUES:
        raise FormatError(where, f"more than {MAX_CONFIG_VALUES} values", "a config is small")
    if text.startswith(b"version https://git-lfs"):
        raise lfs_error(where)
    value = parse(text, where)
    if not isinstance(value, dict):
        raise FormatError(where, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def lfs_error(where: str) -> FormatError:
    """The error for a Git LFS pointer that stands where a file should be."""
    return FormatError(
        where,
        "a Git LFS pointer, not the file itself",
        "the content was not downloaded",
        "run 'git lfs pull' in the checkpoint's folder",
    )
