"""Metrics of predicted labels: accuracy, macro-F1, Matthews, Pearson and Spearman correlation, calibration.

    classification(logits, labels)                # {"accuracy": ..., "macro_f1": ..., "matthews": ..., "ece": ...}
    regression(predictions, values)               # {"pearson": ..., "spearman": ..., "rmse": ...}

Definitions as in scikit-learn and scipy, against which they are tested; ece is the expected calibration error over 15 equal
bins of confidence (Guo et al. 2017, arXiv:1706.04599, eq. 3). Its temperature scaling is
`scaled`: logits over one number, fitted by likelihood on half of the rows and judged on the other half.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BINS = 15
COLDEST, HOTTEST = 0.01, 100.0  # temperatures; where all rows are right there is no best one


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of one class per row.

    Args:
      logits: [n, classes].
      labels: [n], classes by number.
    """
    if not len(labels):
        return {}
    predicted = logits.argmax(1)
    table = confusion(predicted, labels, logits.shape[1])
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": macro_f1(table),
        "matthews": matthews(table),
        "ece": calibration_error(logits, labels),
        **scaled(logits, labels),
    }


def multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of several classes per row, each decided at probability 1/2: [n, classes] both."""
    if not len(labels):
        return {}
    predicted, truth = logits > 0, labels > 0.5
    hits, extra, missed = (predicted & truth).sum(0), (predicted & ~truth).sum(0), (~predicted & truth).sum(0)
    each = [_f1(h, e, m) for h, e, m in zip(hits, extra, missed, strict=True)]
    return {
        "subset_accuracy": float((predicted == truth).all(1).mean()),
        "macro_f1": float(np.mean(each)),
        "micro_f1": _f1(hits.sum(), extra.sum(), missed.sum()),
    }


def regression(predictions: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Correlations and errors: [n] both. A correlation of constant numbers is 0."""
    if not len(values):
        return {}
    return {
        "pearson": _pearson(predictions, values),
        "spearman": _pearson(ranks(predictions), ranks(values)),
        "rmse": float(np.sqrt(((predictions - values) ** 2).mean())),
        "mae": float(np.abs(predictions - values).mean()),
    }


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often class i (row) was called j (column): [classes, classes]."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def macro_f1(table: np.ndarray) -> float:
    """Mean F1 over the classes that occur among labels or predictions."""
    hits = np.diag(table)
    there = (table.sum(0) + table.sum(1)) > 0
    each = [_f1(h, p - h, n - h) for h, p, n in zip(hits, table.sum(0), table.sum(1), strict=True)]
    return float(np.mean(np.asarray(each)[there]))


def binary_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1: [n] both, classes by number; 0 where class 1 is never met."""
    said, true = predicted == 1, labels == 1
    return _f1((said & true).sum(), (said & ~true).sum(), (~said & true).sum())


def matthews(table: np.ndarray) -> float:
    """Matthews correlation, many classes (Gorodkin 2004); 0 where it is undefined."""
    t, p, n = table.sum(1).astype(float), table.sum(0).astype(float), float(table.sum())
    correct = float(np.trace(table))
    below = math.sqrt((n * n - p @ p) * (n * n - t @ t))
    return float((correct * n - t @ p) / below) if below else 0.0


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean gap between confidence and accuracy, weighted by the rows in each bin of confidence."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    chance = shifted / shifted.sum(1, keepdims=True)
    confidence, right = chance.max(1), chance.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number T for which softmax(logits / T) gives the labels their largest likelihood, within 0.01 to 100.

    The likelihood is concave in 1 / T, so the zero of its derivative is found by halving an interval.
    """
    z = logits.astype(np.float64)
    picked = z[np.arange(len(z)), labels].mean()
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(math.exp(middle) * (z - z.max(1, keepdims=True)))
        expected = ((weights * z).sum(1) / weights.sum(1)).mean()
        low, high = (middle, high) if picked >= expected else (low, middle)
    return math.exp(-(low + high) / 2)


def scaled(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Calibration by one temperature: fitted on half of the rows, a fixed draw; errors of the other half before and after.

    Returns:
      "temperature", "ece_unscaled", "ece_scaled"; nothing where a half has fewer rows than there are bins.
    """
    if len(labels) < 2 * BINS:
        return {}
    order = np.random.default_rng(0).permutation(len(labels))
    fitted, judged = order[: len(order) // 2], order[len(order) // 2 :]
    t = temperature(logits[fitted], labels[fitted])
    return {
        "temperature": t,
        "ece_unscaled": calibration_error(logits[judged], labels[judged]),
        "ece_scaled": calibration_error(logits[judged] / t, labels[judged]),
    }


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal numbers sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _f1(hits: Any, extra: Any, missed: Any) -> float:
    return float(2 * hits / (2 * hits + extra + missed)) if hits else 0.0


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    below = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum() / below) if below else 0.0
