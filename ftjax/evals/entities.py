"""Precision, recall and F1 of named entities from tags B-x, I-x, O: an entity counts when class and both ends are right.

    F1 = 2 hits / (predicted + true), over all entities of all sentences (micro)

    entity_scores([["B-PER", "I-PER", "O"]], [["B-PER", "O", "O"]])       # {"precision": 0.0, "recall": 0.0, "f1": 0.0}

Entities are read as the CoNLL-2000 evaluation does, and seqeval by default: an I- after O, or after another class, begins
an entity too (Tjong Kim Sang & Buchholz 2000, arXiv:cs/0009008).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]


def is_iob2(names: Iterable[str]) -> bool:
    """Whether class names are B-x, I-x and O, with at least one of the former."""
    names = list(names)
    return all(re.fullmatch(r"O|[BI](-.+)?", n) for n in names) and any(n != "O" for n in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """(class, first word, last word) of every entity of one sentence."""
    found: set[Entity] = set()
    start, kind = -1, ""
    for i, tag in enumerate([*tags, "O"]):
        here, new = tag[:1], tag[2:]
        if start >= 0 and (here != "I" or new != kind):
            found.add((kind, start, i - 1))
            start = -1
        if here != "O" and start < 0:
            start, kind = i, new
    return found


def entity_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro precision, recall and F1; 0 where nothing is predicted, or nothing is there."""
    hits = said = there = 0
    for t, p in zip(true, predicted, strict=True):
        mine, theirs = entities(p), entities(t)
        hits, said, there = hits + len(mine & theirs), said + len(mine), there + len(theirs)
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (said + there) if hits else 0.0,
    }
