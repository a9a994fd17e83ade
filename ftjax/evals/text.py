"""Metrics of generated text against one reference each: averaged over examples, or of all of them together (BLEU).

    scores(("rouge_l", "bleu"), completions, references)      # {"rouge_l": 0.31, "bleu": 12.4}

Words are lower case, with punctuation turned into spaces; token_f1 keeps articles, exact_match leaves them out (SQuAD's own
normalisation is in `ftjax.evals.answers`). rouge_l is the F-measure of the longest common subsequence (Lin 2004).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ftjax.errors import ConfigError, did_you_mean
from ftjax.evals.bleu import corpus_bleu
from ftjax.evals.numbers import gsm8k_exact, gsm8k_flexible


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower()).split()


def _f1(overlap: int, predicted: int, expected: int) -> float:
    return 2 * overlap / (predicted + expected) if overlap else float(predicted == expected == 0)


def bag_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over bags of words; 1 where both are empty, 0 where one is."""
    return _f1(sum((Counter(predicted) & Counter(expected)).values()), len(predicted), len(expected))


def exact_match(prediction: str, reference: str) -> float:
    """1 when the words are the same, articles aside."""
    plain = [[w for w in words(t) if w not in ("a", "an", "the")] for t in (prediction, reference)]
    return float(plain[0] == plain[1])


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bags of words."""
    return bag_f1(words(prediction), words(reference))


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
    "gsm8k_exact": gsm8k_exact,
    "gsm8k_flexible": gsm8k_flexible,
    "rouge_l": rouge_l,
    "token_f1": token_f1,
}
CORPUS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"bleu": corpus_bleu}


def scores(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Each metric: its mean over the examples, or its value for all of them together.

    Raises:
      ConfigError: no metric of that name.
    """
    for name in names:
        if name not in METRICS | CORPUS:
            known = [*METRICS, *CORPUS]
            raise ConfigError(f"unknown metric {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        return {}
    return {
        n: CORPUS[n](predictions, references) if n in CORPUS else sum(METRICS[n](p, r) for p, r in pairs) / len(pairs)
        for n in names
    }
