"""Corpus BLEU as sacrebleu computes it: tokens of mteval-v13a, case kept, one reference per text, 0 to 100.

    BLEU = 100 b exp(mean_n log p_n),  n = 1 .. 4,  p_n = clipped matches / n-grams,  b = min(1, exp(1 - reference / output))

    corpus_bleu(["the cat sat on a mat"], ["the cat sat on the mat"])       # 53.73

Papineni et al. 2002, doi:10.3115/1073083.1073135; Post 2018, arXiv:1804.08771. An order without matches counts as half a
match, the next such order as a quarter, and so on (smoothing "exp").
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

ORDER = 4
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# An apostrophe never stands alone; comma, period and dash do so by what is beside them.
_ALONE = re.compile(f"([{re.escape(''.join(sorted(set(string.punctuation) - set("',-."))))}])")
_MARK_AFTER_TEXT = re.compile(r"([^0-9])([.,])")
_MARK_BEFORE_TEXT = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")


def tokens_13a(text: str) -> list[str]:
    """The tokens of a text: words, numbers with their points, and marks."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _ALONE.sub(r" \1 ", f" {text} ")
    text = _MARK_AFTER_TEXT.sub(r"\1 \2 ", text)
    text = _MARK_BEFORE_TEXT.sub(r" \1 \2", text)
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", text).split()


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all texts together, 0 to 100; 0 where nothing matches or no text has four tokens."""
    matches, totals = [0] * ORDER, [0] * ORDER
    said = expected = 0
    for prediction, reference in zip(predictions, references, strict=True):
        p, r = tokens_13a(prediction), tokens_13a(reference)
        said, expected = said + len(p), expected + len(r)
        for n in range(ORDER):
            ours, theirs = _ngrams(p, n + 1), _ngrams(r, n + 1)
            matches[n] += sum((ours & theirs).values())
            totals[n] += sum(ours.values())
    if not any(matches) or not all(totals):
        return 0.0
    logs, smoothed = 0.0, 1.0
    for hit, total in zip(matches, totals, strict=True):
        smoothed *= 1.0 if hit else 2.0
        logs += math.log((hit or 1.0 / smoothed) / total)
    return 100.0 * math.exp(min(0.0, 1.0 - expected / said) + logs / ORDER)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
