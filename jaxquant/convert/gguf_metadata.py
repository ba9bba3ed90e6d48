"""The key-value section of a GGUF file.

Nothing is allocated in proportion to a number that the file merely claims: counts are compared with
the bytes that are left, strings and arrays stay in the mapped file until they are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxquant.errors import FormatError

MAX_HEADER_BYTES = 64 << 20
MAX_STRINGS = 1 << 20
"""Strings in all arrays of one file; the largest vocabularies with merges have 0.8 million."""
MAX_KEY_BYTES = 65535
MAX_NESTING = 2

STRING, ARRAY, BOOL, UINT32 = 8, 9, 7, 4
SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "<u1"),
    1: ("int8", "<i1"),
    2: ("uint16", "<u2"),
    3: ("int16", "<i2"),
    UINT32: ("uint32", "<u4"),
    5: ("int32", "<i4"),
    6: ("float32", "<f4"),
    BOOL: ("bool", "<u1"),
    10: ("uint64", "<u8"),
    11: ("int64", "<i8"),
    12: ("float64", "<f8"),
}


class Entry(NamedTuple):
    """Where one metadata value lies.

    Attributes:
        kind: type number of the value, or of the elements of an array.
        start: offset of the first byte in the file.
        length: elements of an array; None for a scalar.
    """

    kind: int
    start: int
    length: int | None


class Cursor:
    """Reads a header from front to back and refuses to leave it."""

    def __init__(self, buffer: Any, where: str) -> None:
        self.buffer = buffer
        self.where = where
        self.position = 0
        self.end = min(len(buffer), MAX_HEADER_BYTES)

    def skip(self, count: int, what: str) -> int:
        """Move over ``count`` bytes and return where they start."""
        start = self.position
        if count > self.end - start:
            self.overrun(what, f"needs {count} bytes at {start}")
        self.position = start + count
        return start

    def overrun(self, what: str, found: str) -> NoReturn:
        """Raise: the header ends before ``what`` does."""
        if self.end < len(self.buffer):
            rule = f"a header has at most {self.end} bytes"
        else:
            rule = f"the file has {self.end} bytes"
        raise FormatError(
            self.where, f"{what} {found}", rule, "the file is truncated or damaged: get it again"
        )

    def u32(self, what: str) -> int:
        """One little-endian uint32."""
        return struct.unpack_from("<I", self.buffer, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        """One little-endian uint64."""
        return struct.unpack_from("<Q", self.buffer, self.skip(8, what))[0]

    def text(self, what: str, most: int) -> str:
        """A length-prefixed printable string of at most ``most`` bytes."""
        length = self.u64(what)
        if not 0 < length <= most:
            raise FormatError(self.where, f"{what} of {length} bytes", f"1 to {most} bytes")
        start = self.skip(length, what)
        return decode_text(self.buffer, start, length, f"{self.where}: {what}", printable=True)


def decode_text(
    buffer: Any, start: int, length: int, where: str, *, printable: bool = False
) -> str:
    """Decode UTF-8 bytes of the file."""
    try:
        text = buffer[start : start + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(where, f"bytes that are no UTF-8 ({error.reason})", "UTF-8") from None
    if printable and not text.isprintable():
        raise FormatError(where, f"{text[:40]!r}", "printable characters")
    return text


class Metadata(Mapping[str, Any]):
    """Key-value metadata, decoded on access: numbers, strings, bools, lists and NumPy arrays.

    Args:
        buffer: the mapped file.
        where: file name, for errors.
        entries: where each value lies.
    """

    def __init__(self, buffer: Any, where: str, entries: dict[str, Entry]) -> None:
        self._buffer = buffer
        self._where = where
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        """The value of ``key``: arrays of numbers as read-only NumPy arrays, others as lists.

        Raises:
            KeyError: there is no such key.
            FormatError: a string is no UTF-8, or a bool neither 0 nor 1.
        """
        kind, start, count = self._entries[key]
        value, _ = self._read(kind, start, count, f"{self._where}: {key}")
        return value

    def kind(self, key: str) -> str:
        """Type of a value as a word, e.g. ``"uint32"``, ``"string"``, ``"array of string"``."""
        kind, _, count = self._entries[key]
        name = SCALARS[kind][0] if kind in SCALARS else "string" if kind == STRING else "array"
        return name if count is None else f"array of {name}"

    def _read(self, kind: int, start: int, count: int | None, where: str) -> tuple[Any, int]:
        """The value at ``start`` and the offset behind it; its extent was checked before."""
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind][1])
            array = np.frombuffer(self._buffer, dtype, 1 if count is None else count, start)
            if kind == BOOL:
                if (array > 1).any():
                    raise FormatError(where, f"a bool of value {array.max()}", "0 or 1")
                array = array.view(np.bool_)
            end = start + array.nbytes
            return (array[0].item() if count is None else array), end
        if kind == STRING and count is None:
            length = struct.unpack_from("<Q", self._buffer, start)[0]
            return decode_text(self._buffer, start + 8, length, where), start + 8 + length
        items = []
        for _ in range(count or 0):
            inner_kind, inner_count = kind, None
            if kind == ARRAY:
                inner_kind, inner_count = struct.unpack_from("<IQ", self._buffer, start)
                start += 12
            item, start = self._read(inner_kind, start, inner_count, where)
            items.append(item)
        return items, start


def _skip_array(cursor: Cursor, what: str, strings: int, depth: int) -> tuple[int, int, int]:
    """Move over an array; returns its element kind, its count and the strings counted so far."""
    kind, count = cursor.u32(what), cursor.u64(what)
    if kind in SCALARS:
        cursor.skip(count * np.dtype(SCALARS[kind][1]).itemsize, what)
        return kind, count, strings
    if kind not in (STRING, ARRAY):
        raise FormatError(cursor.where, f"{what} has elements of type {kind}", "types 0 to 12")
    if kind == ARRAY and depth == MAX_NESTING:
        raise FormatError(cursor.where, f"{what} is nested deeper than {MAX_NESTING}", "flat data")
    strings += count
    if strings > MAX_STRINGS:
        rule = f"at most {MAX_STRINGS} strings and inner arrays in a file"
        raise FormatError(cursor.where, f"{what} has {count} elements", rule)
    if count * (8 if kind == STRING else 12) > cursor.end - cursor.position:
        cursor.overrun(what, f"has {count} elements")
    if kind == ARRAY:
        for _ in range(count):
            _, _, strings = _skip_array(cursor, what, strings, depth + 1)
        return kind, count, strings
    # The one long loop of the reader: a quarter of a million tokens, so no method calls.
    buffer, position, end, read = cursor.buffer, cursor.position, cursor.end, struct.Struct("<Q")
    for _ in range(count):
        if end - position < 8:
            cursor.overrun(what, "ends in the middle of a string")
        length = read.unpack_from(buffer, position)[0]
        position += 8 + length
        if position > end:
            cursor.overrun(what, f"has a string of {length} bytes")
    cursor.position = position
    return kind, count, strings


def read_metadata(cursor: Cursor, count: int) -> Metadata:
    """Walk over ``count`` key-value pairs, checking their extents.

    Raises:
        FormatError: a key or value type breaks a rule, or the values do not fit the file.
    """
    entries: dict[str, Entry] = {}
    strings = 0
    for i in range(count):
        key = cursor.text(f"key {i}", MAX_KEY_BYTES)
        if not key.isascii():
            raise FormatError(cursor.where, f"key {key[:40]!r}", "keys are ASCII")
        if key in entries:
            raise FormatError(f"{cursor.where}: {key}", "twice", "keys are unique")
        what = f"the value of {key[:100]!r}"
        kind = cursor.u32(what)
        if kind in SCALARS:
            size = np.dtype(SCALARS[kind][1]).itemsize
            entries[key] = Entry(kind, cursor.skip(size, what), None)
        elif kind == STRING:
            start = cursor.position
            cursor.skip(cursor.u64(what), what)
            entries[key] = Entry(kind, start, None)
        elif kind == ARRAY:
            start = cursor.position + 12
            inner, length, strings = _skip_array(cursor, what, strings, 1)
            entries[key] = Entry(inner, start, length)
        else:
            raise FormatError(f"{cursor.where}: {key}", f"value type {kind}", "types 0 to 12")
    return Metadata(cursor.buffer, cursor.where, entries)
