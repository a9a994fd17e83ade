"""Errors that a user sees, each with the exit code of `run.py`.

Users' mistakes raise one of these with a text that names the value, what is allowed and the nearest match;
`run.py` prints the text without a traceback. Broken invariants of ours are `assert`s and keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FtjaxError(Exception):
    """Base of everything that `run.py` prints without a traceback."""

    exit_code = 1


class ConfigError(FtjaxError, ValueError):
    """The user's input is wrong: config, override, pattern, option. Exit code 2.

    Args:
      title: where the problems are, e.g. ``configs/x.py``.
      problems: one line each, ``"<place>  <reason>"`` with two spaces between (the reasons are shown aligned), or a
        plain sentence. All of them are shown at once.
    """

    exit_code = 2

    def __init__(self, title: str, problems: Iterable[str] = ()):
        self.title, self.problems = title, tuple(problems)
        count = f": {len(self.problems)} problem{'s' * (len(self.problems) != 1)}" if self.problems else ""
        super().__init__("\n".join([title + count, *(f"  {line}" for line in aligned(self.problems))]))


class DataError(FtjaxError, ValueError):
    """Data, tokenizer, weights or adapter files are wrong. Exit code 3."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint or run folder cannot be used. Exit code 3."""


class DivergenceError(FtjaxError):
    """Training produced non-finite numbers too often. Exit code 3."""

    exit_code = 3


class DeviceError(FtjaxError):
    """The devices do not fit the run: mesh arithmetic, memory. Exit code 4."""

    exit_code = 4


def aligned(lines: Iterable[str], widest: int = 44) -> list[str]:
    """Lines of the form ``"<place>  <reason>"`` with their reasons in one column."""
    parts = [line.partition("  ") for line in lines]
    width = max((len(place) for place, gap, _ in parts if gap and len(place) <= widest), default=0)
    return [f"{place:<{width}}  {reason.lstrip()}" if gap else place for place, gap, reason in parts]


def listing(title: str, lines: list[str], most: int = 20) -> str:
    """A title and the first lines below it, for an error."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([title, *("  " + line for line in aligned(lines[:most], widest=80) + more)])


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The names most like `name`, best first; for 'did you mean' texts."""
    by_lower = {str(x).lower(): str(x) for x in names}
    return [by_lower[x] for x in difflib.get_close_matches(name.lower(), by_lower, n, cutoff=0.5)]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`" Did you mean 'rank'?"`, or the empty string when nothing is near."""
    near = nearest(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""
