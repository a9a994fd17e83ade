"""Metrics of generated text: BLEU as sacrebleu computes it, numbers as lm-evaluation-harness finds them."""

from __future__ import annotations

import random

import pytest

sacrebleu = pytest.importorskip("sacrebleu")

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # noqa: E402

from ftjax.evals.bleu import corpus_bleu, tokens_13a  # noqa: E402
from ftjax.evals.numbers import gsm8k_exact, gsm8k_flexible  # noqa: E402

pytestmark = pytest.mark.oracle

TEXTS = (
    "Hello, world! It's 3,000.50 dollars - or 5-6 (maybe).",
    "U.S.A. and 1.5, 2,5; a-b 3-4 -5 x.y 9.z z.9",
    "&quot;quoted&quot; &amp;lt; &lt;tag&gt; <skipped>hyphen-\nated\nline",
    "{braces} [x] ~tilde `tick` ^caret _under_ \\slash/ |pipe| @at #hash $5.00 %10 *star*",
    "«Ça va?» – “très bien”… 東京、大阪。 naïve\tcafé",
    ".,.,", "...", "", " ", "a", "A b C d", "a b c d", "the cat sat on the mat .", "The cat sat on the mat.",
)  # fmt: skip


def test_bleu_is_sacrebleus():
    for text in TEXTS:
        assert tokens_13a(text) == Tokenizer13a()(text).split(), text
    rng = random.Random(0)
    vocabulary = ["a", "b", "c.", "d,", "1,5", "E", "3-4", "it's", "f", "g"]
    values = set()
    for size in (*range(1, 30), 200):
        references = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 12))) for _ in range(size)]
        said = [
            " ".join(w for w in r.split() if rng.random() < 0.9) + rng.choice(["", " a b c", "."]) for r in references
        ]
        theirs = sacrebleu.corpus_bleu(said, [references]).score
        assert corpus_bleu(said, references) == pytest.approx(theirs, rel=1e-12, abs=1e-12)
        values.add(round(theirs))
    said, references = list(TEXTS), list(TEXTS[1:] + TEXTS[:1])
    assert corpus_bleu(said, references) == pytest.approx(sacrebleu.corpus_bleu(said, [references]).score, rel=1e-12)
    smoothed = ["a b x d e f", "q r"], ["a b c d e z", "r q"]  # no match of the orders 3 and 4
    assert corpus_bleu(*smoothed) == pytest.approx(sacrebleu.corpus_bleu(smoothed[0], [smoothed[1]]).score, rel=1e-12)
    assert len(values) > 10


NUMBERS = (
    "It is 42.\n#### 42", "#### 1,000", "#### $5", "####7", "so 3 + 4 = 7.", "$1,000.50.", "-3", "#### -3.", "a 5 b", "none",
    "#### 5 or #### 6", "... ,", "12 and 13", "#### 42.0", "", "7.\n", "#### 1,234.", "5%", "x-5",
)  # fmt: skip


def test_numbers_are_the_harness():
    filters = pytest.importorskip("lm_eval.filters.extraction")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    strict = filters.RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = filters.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    right = 0
    for reference in ("2 + 2\n#### 42", "#### 1,000", "#### 7", "#### -3", "#### 5", "#### 13", "#### 1234"):
        for said in NUMBERS:
            for ours, take in ((gsm8k_exact, strict), (gsm8k_flexible, flexible)):
                found = list(take.apply([[said]], [{}]))[0]
                theirs = exact_match_hf_evaluate(found, [reference], regexes_to_ignore=ignored, ignore_case=True)
                assert ours(said, reference) == theirs["exact_match"], (ours, said, reference)
                right += ours(said, reference) > 0
    assert right > 10
