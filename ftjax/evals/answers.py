"""Answers to questions about a text: the best span over all windows, and SQuAD's exact match and F1.

    best_spans(starts, ends, examples, index, 30)        # {row: "in 1815"}
    squad(predictions, references)                       # {"exact_match": 0.8, "f1": 0.86}

Normalisation as in SQuAD's evaluation (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, no punctuation, no articles. Each
question scores its best reference; one without references is right when the prediction is empty (arXiv:1806.03822). Both are
shares, not percent.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.evals.text import bag_f1

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def exact(prediction: str, reference: str) -> float:
    """1 when the words are the same."""
    return float(normalised(prediction) == normalised(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bags of words; where one side has none, 1 if neither has."""
    return bag_f1(normalised(prediction), normalised(reference))


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean exact match and F1.

    Args:
      predictions: one text per question; empty says that there is no answer.
      references: the answers of each question; none where it has none.
    """
    if not predictions:
        return {}
    pairs = list(zip(predictions, (r or ("",) for r in references), strict=True))
    return {
        name: float(np.mean([max(score(p, r) for r in several) for p, several in pairs]))
        for name, score in (("exact_match", exact), ("f1", f1))
    }


def best_spans(
    starts: np.ndarray, ends: np.ndarray, examples: Any, index: np.ndarray, longest: int
) -> Mapping[int, str]:
    """The text of the best span of each source row: the largest start + end logit within the context, over its windows.

    Args:
      starts, ends: logits of each window's tokens, [windows, T].
      examples: `SpanExamples`; where `nullable`, the answer is empty if the first token's score is better in every window.
      index: which example each window is, [windows]; negative ones are left out.
      longest: tokens of an answer at most.
    """
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for start, end, i in zip(starts, ends, index.tolist(), strict=True):
        if i < 0:
            continue
        row, here = int(examples.rows[i]), slice(int(examples.offsets[i]), int(examples.offsets[i + 1]))
        chars, none = examples.chars[here], int(examples.nulls[i])
        null[row] = min(null.get(row, np.inf), float(start[none] + end[none]))
        inside = np.flatnonzero(chars[:, 0] >= 0)
        if not len(inside):
            continue
        score, a, b = _best(start[inside], end[inside], longest)
        if row not in best or score > best[row][0]:
            best[row] = score, examples.context(i)[chars[inside[a], 0] : chars[inside[b], 1]].strip()
    return {
        row: "" if row not in best or (examples.nullable and null[row] > best[row][0]) else best[row][1] for row in null
    }


def _best(start: np.ndarray, end: np.ndarray, longest: int) -> tuple[float, int, int]:
    """(score, first, last) of the best span of at most `longest` tokens: O(T x longest)."""
    found = (-np.inf, 0, 0)
    for size in range(min(longest, len(start))):
        total = start[: len(start) - size] + end[size:]
        at = int(total.argmax())
        if total[at] > found[0]:
            found = (float(total[at]), at, at + size)
    return found
