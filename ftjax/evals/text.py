"""Metrics of generated text against one reference each, averaged over examples.

    scores(("rouge_l", "token_f1"), completions, references)      # {"rouge_l": 0.31, "token_f1": 0.28}

exact_match and token_f1 follow SQuAD's evaluation (Rajpurkar et al. 2016, arXiv:1606.05250), rouge_l the F-measure of the
longest common subsequence (Lin 2004).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ftjax.errors import ConfigError, did_you_mean


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower()).split()


def _f1(overlap: int, predicted: int, expected: int) -> float:
    return 2 * overlap / (predicted + expected) if overlap else float(predicted == expected == 0)


def exact_match(prediction: str, reference: str) -> float:
    """1 when the words are the same, articles aside."""
    plain = [[w for w in words(t) if w not in ("a", "an", "the")] for t in (prediction, reference)]
    return float(plain[0] == plain[1])


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bags of words."""
    p, r = words(prediction), words(reference)
    return _f1(sum((Counter(p) & Counter(r)).values()), len(p), len(r))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words."""
    p, r = words(prediction), words(reference)
    best = [0] * (len(r) + 1)
    for a in p:
        before = 0
        for j, b in enumerate(r, 1):
            best[j], before = (before + 1 if a == b else max(best[j], best[j - 1])), best[j]
    return _f1(best[-1], len(p), len(r))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "token_f1": token_f1,
}


def scores(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean of each metric over the examples.

    Raises:
      ConfigError: no metric of that name.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r}.{did_you_mean(name, METRICS)} Known: {', '.join(METRICS)}")
    pairs = list(zip(predictions, references, strict=True))
    return {n: sum(METRICS[n](p, r) for p, r in pairs) / len(pairs) for n in names} if pairs else {}
