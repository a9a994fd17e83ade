"""Answers to the same prompts at two moments, side by side, and held-out numbers before and after.

pairs = pair(before, after)          # answers as logged: prompt, completion, reference
grid = comparison({"loss": 3.9}, {"loss": 2.1})
"""

from __future__ import annotations

import dataclasses as dc
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ftjax.report.grid import Grid
from ftjax.report.units import measured, number, title

ABSENT = "-"


class Answered(Protocol):
    """A prompt, what the model said and what was expected."""

    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...
    @property
    def reference(self) -> str: ...


@dc.dataclass(frozen=True)
class Sample:
    """One prompt, answered before and after training; None where it was not asked."""

    prompt: str
    before: str | None
    after: str | None
    reference: str


def pair(before: Iterable[Answered], after: Iterable[Answered]) -> list[Sample]:
    """Matches answers by prompt (the n-th of equal prompts with the n-th), in order of first appearance."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for moment, answers in (("before", before), ("after", after)):
        seen: Counter[str] = Counter()
        for a in answers:
            entry = found.setdefault((a.prompt, seen[a.prompt]), {"reference": a.reference})
            entry[moment] = a.completion
            seen[a.prompt] += 1
    return [Sample(k[0], v.get("before"), v.get("after"), v["reference"]) for k, v in found.items()]


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> Grid:
    """Held-out numbers before and after; either may be a whole line of metrics.jsonl."""
    old, new = measured(before), measured(after)
    names = [*old, *(k for k in new if k not in old)]
    rows = []
    for k in names:
        change = f"{new[k] - old[k]:+.4f}" if k in old and k in new else ABSENT
        rows.append((title(k), *(number(x[k]) if k in x else ABSENT for x in (old, new)), change))
    steps = [f"step {int(x['step'])}" if "step" in x else word for x, word in ((before, "before"), (after, "after"))]
    return Grid("held-out results", ("metric", *steps, "change"), tuple(rows))
