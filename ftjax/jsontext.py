"""JSON as people write it: syntax errors with a caret, and the line of every key.

parse('{"a": {"b": 1}}', title="x.json").lines == {"a": 1, "a.b": 1}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftjax.errors import ConfigError

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


@dataclass(frozen=True)
class JsonText:
    """A parsed file: its value and the line (from 1) of each key, by dotted path."""

    value: Any
    lines: dict[str, int]


def caret(title: str, *, line: int, column: int, source: str, message: str) -> str:
    """``title:line:column: message``, the source line and a caret below the column (both count from 1)."""
    shown = source.rstrip("\n").replace("\t", " ")
    return f"{title}:{line}:{column}: {message}\n    {shown}\n    {' ' * (column - 1)}^"


def parse(text: str, *, title: str) -> JsonText:
    """Parses strictly; `title` names the file in the errors.

    Raises:
      ConfigError: a syntax error, with line, column and a caret; or a key that stands twice, with both lines.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        source = (text.splitlines() or [""])[min(e.lineno, len(text.splitlines()) or 1) - 1]
        raise ConfigError(caret(title, line=e.lineno, column=e.colno, source=source, message=e.msg)) from None
    lines: dict[str, int] = {}
    twice = []
    for path, line in _keys(text):
        if path in lines:
            twice.append(f"{path}  stands twice, in lines {lines[path]} and {line}; remove one")
        lines[path] = line
    if twice:
        raise ConfigError(title, twice)
    return JsonText(value, lines)


def _keys(text: str) -> Iterator[tuple[str, int]]:
    """The dotted path and line of each key of well-formed JSON, in the order of the text."""
    stack: list[str | int] = []  # the key or index under which each open object or array is reading its current value
    in_object: list[bool] = []
    awaiting_key = False
    for token in TOKEN.finditer(text):
        mark = token.group()
        if mark in "{[":
            in_object.append(mark == "{")
            stack.append("" if mark == "{" else 0)
            awaiting_key = mark == "{"
        elif mark in "}]":
            in_object.pop()
            stack.pop()
            awaiting_key = False
        elif mark == ",":
            awaiting_key = in_object[-1]
            last = stack[-1]
            stack[-1] = last + 1 if isinstance(last, int) else ""
        elif awaiting_key:
            stack[-1] = json.loads(mark)
            awaiting_key = False
            yield ".".join(map(str, stack)), text.count("\n", 0, token.start()) + 1
