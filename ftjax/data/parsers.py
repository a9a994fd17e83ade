"""One parser per file format: bytes in, `Row`s out, each malformed record reported with its line and byte offset.

rows = list(parse_jsonl(Source("train.jsonl", data), BadRows(0)))
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftjax.data.rows import BadRows, Row, excerpt
from ftjax.errors import DataError

TextUnit = Literal["auto", "file", "paragraph", "line", "block"]
BLOCK_CHARS = 4096  # a "block" of plain text: long enough to fill a context, short enough that some can be held out
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")


@dataclass(frozen=True)
class Source:
    """A file's content.

    Attributes:
      name: path, as the user gave it.
      data: the bytes, unzipped, without byte order mark.
      skew: bytes cut off in front of `data`.
    """

    name: str
    data: bytes
    skew: int = 0

    def place(self, at: int) -> str:
        """``name:line`` of a byte of `data`."""
        return f"{self.name}:{self.data.count(10, 0, at) + 1}"

    def line_at(self, at: int) -> bytes:
        """The line around a byte of `data`."""
        stop = self.data.find(b"\n", at)
        return self.data[self.data.rfind(b"\n", 0, at) + 1 : stop if stop >= 0 else None]


def find_bad_text(line: bytes) -> tuple[int, str] | None:
    """Offset and name of the first byte that is not UTF-8, or NUL; None if the line is good."""
    nul = line.find(b"\0")
    try:
        line.decode()
    except UnicodeDecodeError as e:
        if nul < 0 or e.start < nul:
            return e.start, f"byte 0x{line[e.start]:02x} is not UTF-8 ({e.reason})"
    return (nul, "NUL byte") if nul >= 0 else None


def decode(source: Source) -> str:
    """The whole file as text.

    Raises:
      DataError: a byte that is not UTF-8, or NUL; the text has line and byte offset.
    """
    found = find_bad_text(source.data)
    if found:
        at, what = found
        raise DataError(f"{source.place(at)}: {what}, at byte {at + source.skew}\n  {excerpt(source.line_at(at))}")
    return source.data.decode()


def parse_jsonl(source: Source, bad: BadRows) -> Iterator[Row]:
    """One JSON object per line; empty lines are passed over."""
    at = 0
    for number, line in enumerate(source.data.splitlines(keepends=True), 1):
        if line.strip():
            place = f"{source.name}:{number}"
            found = find_bad_text(line)
            if found:
                bad.add(f"{place}: {found[1]}, at byte {at + found[0] + source.skew}\n  {excerpt(line, found[0])}")
            else:
                row = _parse_object(line, place, at + source.skew, bad)
                if row is not None:
                    yield row
        at += len(line)


def _parse_object(line: bytes, place: str, at: int, bad: BadRows) -> Row | None:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as e:
        bad.add(f"{place}:{e.colno}: not JSON: {e.msg}\n  {excerpt(line, e.colno)}")
    except (ValueError, RecursionError) as e:
        bad.add(f"{place}: not JSON: {e}\n  {excerpt(line)}")
    else:
        return _checked_row(value, line, place, at, bad)
    return None


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _checked_row(value: Any, raw: bytes, place: str, at: int, bad: BadRows) -> Row | None:
    """A row, if `value` is an object whose texts can be encoded; `at` is the byte offset of `raw` in the file."""
    if not isinstance(value, dict):
        bad.add(f"{place}: expected an object like {{\"prompt\": ..., \"completion\": ...}}, got {_json_type(value)}"
                f"\n  {excerpt(raw)}")  # fmt: skip
        return None
    escape = _ESCAPED.search(raw)  # only a line with such an escape can hold a lone surrogate or NUL
    if escape:
        field, what = next(((k, w) for k, v in value.items() if (w := _bad_chars(v))), ("", ""))
        if what:
            bad.add(f"{place}: field {field!r} holds a {what}, near byte {at + escape.start()}"
                    f"\n  {excerpt(raw, escape.start())}")  # fmt: skip
            return None
    return Row(value, place)


def _bad_chars(value: Any) -> str:
    if isinstance(value, str):
        return "lone surrogate" if _SURROGATE.search(value) else "NUL character" if "\0" in value else ""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((w for v in items if (w := _bad_chars(v))), "")


def _json_type(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
    }
    return f"{names[type(value)]} ({excerpt(json.dumps(value))})"


def parse_json(source: Source, bad: BadRows) -> Iterator[Row]:
    """An array of objects, an object with such an array as ``"data"``, or (misnamed but usual) JSON lines."""
    text = decode(source)
    start = _skip_space(text, 0)
    if text[start : start + 1] == "{":
        first_line = text[start:].split("\n", 1)[0]
        try:
            if isinstance(json.loads(first_line), dict) and text[start + len(first_line) :].strip():
                yield from parse_jsonl(source, bad)
                return
        except ValueError:
            pass
        inside = re.compile(r'\{\s*"data"\s*:\s*').match(text, start)
        if not inside:
            raise DataError(f'{source.name}: expected an array of objects [{{...}}, ...] or {{"data": [...]}}')
        start = inside.end()
    if text[start : start + 1] != "[":
        if start == len(text):
            return
        raise DataError(f"{source.name}:1: expected an array of objects, got\n  {excerpt(text[start:])}")
    yield from _parse_array(source, text, start + 1, bad)


def _parse_array(source: Source, text: str, at: int, bad: BadRows) -> Iterator[Row]:
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    line, seen = 1, 0
    at = _skip_space(text, at)
    while text[at : at + 1] != "]":
        line += text.count("\n", seen, at)
        seen = at
        try:
            value, stop = decoder.raw_decode(text, at)
            after = _skip_space(text, stop)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError(
                    "the array is cut off" if after == len(text) else "expected ','", text, after
                )
        except json.JSONDecodeError as e:
            where = f"{source.name}:{e.lineno}:{e.colno}"
            broken = text.splitlines()[e.lineno - 1] if e.pos < len(text) else "(end of file)"
            raise DataError(f"{where}: not JSON: {e.msg}\n  {excerpt(broken, e.colno)}") from None
        except (ValueError, RecursionError) as e:
            raise DataError(f"{source.name}:{line}: not JSON: {e}") from None
        raw = text[at:stop].encode()
        offset = len(text[:at].encode()) + source.skew if _ESCAPED.search(raw) else 0
        row = _checked_row(value, raw, f"{source.name}:{line}", offset, bad)
        if row is not None:
            yield row
        at = _skip_space(text, after + 1) if text[after] == "," else after


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def parse_csv(source: Source, bad: BadRows, delimiter: str) -> Iterator[Row]:
    """A header and quoted fields, which may span lines; every value is a string."""
    if not source.data.strip():
        return
    text = source.data.decode("utf-8", "surrogateescape")  # bad bytes become surrogates and are found per row below
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
    except csv.Error as e:
        raise DataError(f"{source.name}:1: the header is not CSV: {e}") from None
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"{source.name}:1: the header needs distinct, non-empty names, got {', '.join(header)}")
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        for line, fields in _csv_records(reader, source, bad):
            place = f"{source.name}:{line}"
            if any(_SURROGATE.search(f) or "\0" in f for f in fields):
                bad.add(_csv_bad_text(source, line, place))
            elif len(fields) != len(header):
                bad.add(f"{place}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}"
                        f"\n  {excerpt(delimiter.join(fields))}")  # fmt: skip
            else:
                yield Row(zip(header, fields, strict=True), place)
    finally:
        csv.field_size_limit(old_limit)


def _csv_records(reader: Any, source: Source, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            quote = " (a quote opened here is never closed)" if "end of data" in str(e) else ""
            shown = excerpt(source.data.splitlines()[line - 1])
            bad.add(f"{source.name}:{line}: not CSV: {e}{quote}\n  {shown}")
        else:
            if fields:
                yield line, fields


def _csv_bad_text(source: Source, line: int, place: str) -> str:
    start = sum(map(len, source.data.splitlines(keepends=True)[: line - 1]))
    found = find_bad_text(source.data[start:])
    assert found is not None
    at = start + found[0]
    return f"{source.place(at)}: {found[1]}, at byte {at + source.skew}\n  {excerpt(source.line_at(at))}"


def parse_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield Row(record, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a whole Parquet file: {str(e).splitlines()[0]}") from None


def parse_text(source: Source, unit: TextUnit) -> Iterator[Row]:
    """Plain text as ``{"text": ...}``; a block that is not the last of its file also has ``"continues": True``."""
    text = decode(source)
    line = seen = 0
    for start, stop in _spans(text, unit):
        if text[start:stop].strip():
            line += text.count("\n", seen, start)
            seen = start
            row = Row({"text": text[start:stop]}, f"{source.name}:{line + 1}")
            if unit in ("auto", "block") and text[stop:].strip():
                row["continues"] = True
            yield row


def _spans(text: str, unit: TextUnit) -> Iterator[tuple[int, int]]:
    if unit == "file":
        yield 0, len(text)
    elif unit == "line":
        yield from (m.span() for m in re.finditer(r"[^\r\n]+", text))
    elif unit == "paragraph":
        yield from (m.span() for m in re.finditer(r"[^\S\n]*\S[^\n]*(?:\n[^\S\n]*\S[^\n]*)*", text))
    else:
        start = 0
        while start < len(text):
            stop = start + BLOCK_CHARS
            if stop < len(text):
                # cut after the last paragraph, else line, else word of the block, but not in its first half
                half = start + BLOCK_CHARS // 2
                cuts = [at + len(mark) for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, half, stop)) >= 0]
                stop = min(cuts[0], stop) if cuts else stop
            yield start, min(stop, len(text))
            start = stop
