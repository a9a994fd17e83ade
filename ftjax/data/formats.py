"""Dataset types by their columns, as in TRL: what a row means is decided by which fields it has.

    typed = type_rows(rows, columns=("prompt=question", "completion=answer"))
    typed.type                              # DatasetType(kind="prompt_completion", conversational=False)

| kind | columns |
|---|---|
| language_modeling | text, or messages |
| prompt_only | prompt |
| prompt_completion | prompt, completion |
| preference | prompt, chosen, rejected; or chosen, rejected with the prompt as their common beginning |
| unpaired_preference | prompt, completion, label (true or false) |
| stepwise_supervision | prompt, completions, labels |

Texts are strings, or lists of messages ``{"role": ..., "content": ...}`` (conversational). Alpaca and ShareGPT rows are
converted first (see `convert`). Other columns (a reward, tools, an id) are kept as they are.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ftjax.data.convert import ALPACA, SHAREGPT, convert
from ftjax.data.rows import BadRows, Row
from ftjax.errors import ConfigError, DataError, did_you_mean

Kind = Literal[
    "language_modeling", "prompt_only", "prompt_completion", "preference", "unpaired_preference", "stepwise_supervision",
    "labelled", "image", "tagged", "question_answering"
]  # fmt: skip
# the first entry whose columns are all there decides
COLUMNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("stepwise_supervision", ("prompt", "completions", "labels")),
    ("unpaired_preference", ("prompt", "completion", "label")),
    ("preference", ("chosen", "rejected")),
    ("prompt_completion", ("prompt", "completion")),
    ("prompt_only", ("prompt",)),
    ("language_modeling", ("messages",)),
    ("language_modeling", ("text",)),
)
ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = (
    "text | messages | prompt, completion | prompt | prompt, chosen, rejected | prompt, completion, label | "
    f"prompt, completions, labels | {', '.join(ALPACA)} | {', '.join(SHAREGPT)}"
)


@dataclass(frozen=True)
class DatasetType:
    """What the rows of a data set are.

    Attributes:
      kind: see the module.
      conversational: texts are lists of messages.
    """

    kind: Kind
    conversational: bool

    def __str__(self) -> str:
        return self.kind + " (conversational)" * self.conversational


@dataclass(frozen=True)
class TypedRows:
    """Rows that all have one type and passed the checks of its fields.

    Attributes:
      names: of the classes in their order, where the data set says so; empty: those of the rows.
      problem: regression or a kind of classification, where the data set says so; empty: as the labels look.
    """

    type: DatasetType
    rows: list[Row]
    names: tuple[str, ...] = ()
    problem: str = ""


def detect(rows: Sequence[Row]) -> DatasetType:
    """The type that all rows share.

    Raises:
      DataError: no row, no known set of columns, or rows of different types; the text names the first odd row.
    """
    if not rows:
        raise DataError("no rows to detect a dataset type from")
    types = [_type_of(row) for row in rows]
    common, count = Counter(types).most_common(1)[0]
    if common is None:
        raise DataError(_unknown(rows[0]))
    if count < len(rows):
        odd = next(i for i, t in enumerate(types) if t != common)
        usual = rows[types.index(common)]
        raise DataError(
            f"{rows[odd].origin}: mixed rows: this one has {_shape(rows[odd])}, which is "
            f"{types[odd] or 'no known type'}; {count} of {len(rows)} rows are {common}, "
            f"e.g. {usual.origin} with {_shape(usual)}"
        )
    return common


def type_rows(rows: Sequence[Row], *, columns: Sequence[str] = (), bad: BadRows | None = None) -> TypedRows:
    """Renames columns, converts Alpaca and ShareGPT rows, detects the type and checks every field.

    Args:
      rows: rows as read.
      columns: renames, each ``"ours=theirs"``, e.g. ``("prompt=question", "completion=answer")``.
      bad: collects rows with wrong fields up to its limit; by default none is tolerated.

    Raises:
      ConfigError: a rename is malformed or names a column that the rows lack.
      DataError: see `detect`; or a field has the wrong type, naming field, place and what is expected.
    """
    bad = bad or BadRows()
    renamed = rename(rows, columns)
    converted = []
    for row in renamed:
        try:
            converted.append(convert(row))
        except DataError as e:
            bad.add(str(e))
    common = Counter(map(_type_of, converted)).most_common(1)
    if bad.limit and common and common[0][0] is not None:
        kept = []
        for row in converted:  # with a tolerance, a row of another type is a malformed row like any other
            if _type_of(row) == common[0][0]:
                kept.append(row)
            else:
                bad.add(f"{row.origin}: expected {common[0][0]}, got {_shape(row)}")
        converted = kept
    if not converted:
        raise DataError(f"no rows are left of {len(rows)}: {bad.summary()}")
    found = detect(converted)
    typed = []
    for row in converted:
        problem = _problem(row, found)
        if problem:
            bad.add(f"{row.origin}: {problem}")
        else:
            typed.append(_explicit_prompt(row) if found.kind == "preference" else row)
    return TypedRows(found, typed)


def rename(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Rows with the columns named as we name them; see `type_rows`."""
    pairs = [tuple(part.strip() for part in c.split("=")) for c in columns]
    wrong = [c for c, pair in zip(columns, pairs, strict=True) if len(pair) != 2 or not all(pair)]
    if wrong:
        raise ConfigError(
            "data.columns", [f"{c!r} is not of the form 'ours=theirs', e.g. 'prompt=question'" for c in wrong]
        )
    theirs = {theirs: ours for ours, theirs in pairs}
    there = dict.fromkeys(k for row in rows[:100] for k in row)
    missing = [t for t in theirs if rows and not any(t in row for row in rows)]
    if missing:
        raise ConfigError(
            "data.columns",
            [f"{t!r} is no column of the data.{did_you_mean(t, there)} Columns: {', '.join(there)}" for t in missing],
        )
    if not theirs:
        return list(rows)
    ours = set(theirs.values())
    return [
        Row({theirs.get(k, k): v for k, v in row.items() if k in theirs or k not in ours}, row.origin) for row in rows
    ]


def is_messages(value: Any) -> bool:
    """Whether a value looks like a list of messages rather than a text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def is_empty(answer: Any) -> bool:
    """Whether a text, or a list of messages, says nothing: only white space, and no tool is called."""
    if isinstance(answer, str):
        return not answer.strip()
    spoken = (m["content"].strip() if isinstance(m.get("content"), str) else m.get("content") for m in answer)
    return not any(spoken) and not any(m.get("tool_calls") for m in answer)


def shown(rows: Sequence[Row]) -> str:
    """The columns that rows have, by their first one; for messages about others that are needed."""
    return f"{rows[0].origin} has {_shape(rows[0])}" if rows else "there are no rows"


def _type_of(row: Row) -> DatasetType | None:
    found = _kind_of(tuple(k for k, v in row.items() if v is not None))
    return found and DatasetType(found[0], found[1] == "messages" or isinstance(row[found[1]], list))


@functools.lru_cache(maxsize=1024)
def _kind_of(present: tuple[str, ...]) -> tuple[Kind, str] | None:
    """The kind that a row with these columns is, and the column that tells whether it is conversational."""
    for kind, columns in COLUMNS:
        if all(c in present for c in columns):
            return kind, columns[1] if kind == "preference" else columns[0]
    return None


def _shape(row: Row) -> str:
    return f"columns {', '.join(k + (' (null)' if v is None else '') for k, v in row.items()) or '(none)'}"


def _unknown(row: Row) -> str:
    known = sorted({c for _, columns in COLUMNS for c in columns})
    near = {k: difflib.get_close_matches(k, known, 1, 0.75) for k in row if k not in known}
    hints = "".join(f" Is {k!r} meant to be {m[0]!r}?" for k, m in near.items() if m)
    return (
        f"{row.origin}: no known dataset type has {_shape(row)}.{hints}\nExpected columns: {EXPECTED}\n"
        "Other names can be mapped, e.g. data.columns=('prompt=question','completion=answer')"
    )


def _problem(row: Row, kind: DatasetType) -> str:
    """What is wrong with the fields of a row; empty if nothing."""
    if kind.kind == "stepwise_supervision":
        return _text(row, "prompt", False) or _lists(row)
    if kind.kind == "unpaired_preference":
        problem = _label(row)
        if problem:
            return problem
    fields: dict[Kind, tuple[str, ...]] = {
        "language_modeling": ("messages" if kind.conversational else "text",),
        "prompt_only": ("prompt",),
        "preference": ("prompt", "chosen", "rejected") if row.get("prompt") is not None else ("chosen", "rejected"),
        "prompt_completion": ("prompt", "completion"),
        "unpaired_preference": ("prompt", "completion"),
    }
    problem = next((p for f in fields[kind.kind] if (p := _text(row, f, kind.conversational))), "")
    return problem or _tools(row)


def _text(row: Row, field: str, conversational: bool) -> str:
    value = row[field]
    if not conversational:
        return "" if isinstance(value, str) else f"field {field!r} expected a string, got {_short(value)}"
    if not is_messages(value):
        return f'field {field!r} expected a list of messages [{{"role": ..., "content": ...}}], got {_short(value)}'
    checks: Sequence[Callable[[dict], str]] = (_role, _content)
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return f"field '{field}[{i}]' expected a message, got {_short(message)}"
        problem = next((p for check in checks if (p := check(message))), "")
        if problem:
            return f"field '{field}[{i}]' {problem}"
    return ""


def _role(message: dict) -> str:
    role = message.get("role")
    if role in ROLES:
        return ""
    return f"has role {_short(role)}.{did_you_mean(str(role), ROLES)} Expected one of: {', '.join(ROLES)}"


def _content(message: dict) -> str:
    content = message.get("content")
    if isinstance(content, str | list) or (content is None and message.get("tool_calls")):
        return ""
    return f"expected a string as 'content', got {_short(content)}"


def _label(row: Row) -> str:
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(row["label"]).lower())
    if label is None:
        return f"field 'label' expected true or false, got {_short(row['label'])}"
    row["label"] = label
    return ""


def _lists(row: Row) -> str:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not all(isinstance(s, str) for s in steps):
        return f"field 'completions' expected a list of strings, got {_short(steps)}"
    if not isinstance(labels, list) or not all(isinstance(v, bool) for v in labels):
        return f"field 'labels' expected a list of true and false, got {_short(labels)}"
    return "" if len(steps) == len(labels) else f"{len(steps)} completions, but {len(labels)} labels"


def _tools(row: Row) -> str:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as e:
            return f"field 'tools' is not JSON: {e}"
        row["tools"] = tools
    good = not tools or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools))
    return "" if good else f"field 'tools' expected a list of JSON schemas, got {_short(tools)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _explicit_prompt(row: Row) -> Row:
    """A preference row whose prompt is the common beginning of both answers gets it as a field (as TRL does)."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None and isinstance(row["prompt"], list) == isinstance(chosen, list):
        return row
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if same and same < len(chosen) and chosen[same - 1] == " ":
        same -= 1  # the space belongs to the answers
    return Row({**row, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}, row.origin)
