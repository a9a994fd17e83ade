"""`Row`: one record and the place it came from; `BadRows`: the malformed ones, tolerated up to a limit and counted.

row = Row({"prompt": "2+2=", "completion": "4"}, origin="train.jsonl:17")
bad = BadRows(limit=2)
bad.add("train.jsonl:18: not JSON")        # raises DataError from the third one on
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ftjax.errors import DataError

EXCERPT = 100
FLOAT32_MAX = 3.4028234e38
NEAR_LEAK = "equal or similar to a held-out row, and kept"


class Row(dict[str, Any]):
    """A record as a dict that knows where it stands.

    Attributes:
      origin: ``file:line`` (``file:row N`` in Parquet), for messages and previews.
    """

    __slots__ = ("origin",)

    def __init__(self, data: Any = (), origin: str = ""):
        super().__init__(data)
        self.origin = origin


@dataclass
class BadRows:
    """Counts malformed rows; the one that exceeds the limit raises.

    Attributes:
      limit: rows tolerated (``loader.skip_bad``).
      problems: text of each one so far.
      cleaning: counts of what cleaning did (see `ftjax.data.clean`), by what they are.
      removed: good rows that cleaning removed.
    """

    limit: int = 0
    problems: list[str] = field(default_factory=list)
    cleaning: dict[str, int] = field(default_factory=dict)
    removed: int = 0

    @property
    def count(self) -> int:
        return len(self.problems)

    def note(self, what: str, count: int, *, removed: bool = False) -> None:
        """Counts what a step of cleaning did."""
        if count:
            self.cleaning[what] = self.cleaning.get(what, 0) + count
            self.removed += count if removed else 0

    def add(self, problem: str) -> None:
        """Notes one malformed row.

        Raises:
          DataError: more than `limit` of them.
        """
        self.problems.append(problem)
        if self.count > self.limit:
            if self.limit == 0:
                raise DataError(
                    f"{problem}\nTo go on without such rows, set loader.skip_bad to how many are tolerable."
                )
            first = f"\nThe first one: {self.problems[0]}"
            raise DataError(
                f"{self.count} malformed rows, loader.skip_bad={self.limit} tolerates fewer. {problem}{first}"
            )

    def summary(self) -> str:
        """E.g. ``2 malformed rows skipped, the first: train.jsonl:18: not JSON``."""
        if not self.problems:
            return ""
        first = self.problems[0].splitlines()[0]
        return f"{self.count} malformed row{'s' * (self.count != 1)} skipped, the first: {first}"


def excerpt(line: bytes | str, column: int = 0) -> str:
    """A printable piece of a line, around `column` when the line is long."""
    text = line.decode("utf-8", "backslashreplace") if isinstance(line, bytes) else line
    start = max(0, min(column - EXCERPT // 2, len(text) - EXCERPT))
    piece = text[start : start + EXCERPT].strip("\r\n")
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece)
    return f"{'...' * (start > 0)}{shown}{'...' * (start + EXCERPT < len(text))}"


def row_hash(row: dict[str, Any]) -> str:
    """SHA-256 of the content of a row: equal rows have equal hashes, wherever they stand."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def number(value: Any) -> float:
    """A number as float32 holds it; NaN for what is none, infinite for what is too large."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) <= FLOAT32_MAX else found * math.inf


def share_of(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: `share_of(k) < 0.05` picks a stable twentieth."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13


def held_out_split(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows, split by the hash of their content: equal rows fall on the same side.

    Args:
      rows: all rows.
      share: part to hold out; 0 holds out nothing. Some row is held out whenever two rows differ.
    """
    rows = list(rows)
    shares = [share_of(row_hash(row)) for row in rows]
    bound = share
    if share > 0 and len(set(shares)) > 1 and min(shares) >= share:
        bound = sorted(set(shares))[1]  # a tiny data set: hold out the one with the smallest hash
    train = [row for row, s in zip(rows, shares, strict=True) if s >= bound]
    return train, [row for row, s in zip(rows, shares, strict=True) if s < bound]
