"""A bigram model of the same tokens: the least that a language model has to beat.

p(b | a) = l c(a, b) / c(a) + (1 - l) (c(b) + 1) / (N + V),  l chosen on the training counts' own tail (Jelinek-Mercer)
"""

from __future__ import annotations

import numpy as np

from ftjax.data.batches import Examples

LAMBDAS = (0.5, 0.6, 0.7, 0.8, 0.9)


def bigram_loss(train: Examples, held_out: Examples, vocab: int) -> float:
    """Mean negative log-likelihood per trained token of `held_out`, in nats, under an interpolated bigram model.

    The interpolation weight that is best on the held-out tokens is used, which flatters the bigram model.

    Args:
      train: examples that are counted.
      held_out: examples that are predicted.
      vocab: number of token ids.
    """
    first, second, weight = _pairs(train)
    unigram = np.bincount(second, weights=(weight > 0).astype(float), minlength=vocab)
    starts = np.bincount(first, minlength=vocab)
    codes, counts = np.unique(first * vocab + second, return_counts=True)
    a, b, w = _pairs(held_out)
    place = np.minimum(np.searchsorted(codes, a * vocab + b), len(codes) - 1)
    both = np.where(codes[place] == a * vocab + b, counts[place], 0)
    conditional = both / np.maximum(starts[a], 1)
    smooth = (unigram[b] + 1) / (unigram.sum() + vocab)
    losses = [-(np.log(m * conditional + (1 - m) * smooth) * w).sum() / w.sum() for m in LAMBDAS]
    return float(min(losses))


def _pairs(examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token, next token, weight of the next) within examples."""
    ids = examples.input_ids.astype(np.int64)
    inside = np.ones(len(ids), bool)
    inside[examples.offsets[:-1][examples.offsets[:-1] < len(ids)]] = False
    at = np.flatnonzero(inside)
    return ids[at - 1], ids[at], examples.weights[at]
