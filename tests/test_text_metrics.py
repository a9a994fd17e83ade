"""Metrics of generated text by hand; `tests/oracle/test_text_metrics.py` compares them with other libraries."""

from __future__ import annotations

import pytest

from ftjax.errors import ConfigError
from ftjax.evals.answers import f1
from ftjax.evals.bleu import corpus_bleu, tokens_13a
from ftjax.evals.numbers import gsm8k_exact, gsm8k_flexible
from ftjax.evals.text import METRICS, scores, token_f1


def test_tokens_by_hand():
    assert tokens_13a("It's $3,000.50, i.e. 5-6 &lt;b") == [
        "It's", "$", "3,000.50", ",", "i", ".", "e", ".", "5", "-", "6", "<", "b",
    ]  # fmt: skip


def test_bleu_by_hand():
    # matches 4/6, 3/5, 2/4, 1/3 with equal lengths
    assert corpus_bleu(["the cat sat on a mat"], ["the cat sat on the mat"]) == pytest.approx(53.7285, abs=1e-4)
    assert corpus_bleu(["x"], ["x"]) == 0 and corpus_bleu([], []) == 0


def test_numbers_by_hand():
    reference = "6 * 7 = <<6*7=42>>42\n#### 42"
    assert gsm8k_exact("So: #### 42", reference) == 1 and gsm8k_exact("It is 42", reference) == 0
    assert gsm8k_flexible("It is $42.", reference) == 1 and gsm8k_flexible("42 or 43", reference) == 0
    assert gsm8k_exact("#### 1,000.", "#### 1000") == 1


def test_words():
    assert token_f1("the red ball", "a red ball") == pytest.approx(2 / 3)  # articles are words
    assert f1("the red ball", "a red ball") == 1  # SQuAD leaves them out
    assert token_f1("well-known", "well known") == 1 and f1("well-known", "well known") == 0
    assert token_f1("", "") == f1("", "the") == 1 and token_f1("", "a") == f1("", "b") == 0


def test_all_metrics_together():
    found = scores([*METRICS, "bleu"], ["a b c d e", "#### 4"], ["a b c d e", "#### 5"])
    assert found["exact_match"] == found["rouge_l"] == 0.5 and found["gsm8k_exact"] == 0 and found["bleu"] > 50
    assert scores(("bleu",), [], []) == {}
    with pytest.raises(ConfigError, match="unknown metric 'blue'. Did you mean 'bleu'"):
        scores(("blue",), ["a"], ["a"])
