"""Ensembles: means of probabilities or logits, majority votes (Lakshminarayanan et al. 2017, arXiv:1612.01474).

p = 1/M sum_m p_m        z = 1/M sum_m z_m        vote: the class that most members name

    found = classification({"a": logits_a, "b": logits_b}, labels)      # {"a": {...}, ..., "mean of probabilities": {...}}
    found = tokens({"a": nll_a, "b": nll_b}, weights)

By Jensen's inequality the negative log-likelihood of the mean of probabilities is at most the mean of the members' own. Where
classes have equally many votes, the one of them with the larger mean probability wins; where these are equal too, the one with
the lower number. Votes are no probabilities, so a vote has no likelihood; its confidence is the winner's share of the votes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ftjax.evals.labels import calibration_error

MEAN_OF_PROBABILITIES, MEAN_OF_LOGITS, VOTE = "mean of probabilities", "mean of logits", "majority vote"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., C] in double precision."""
    z = logits.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def log_mean(log_p: np.ndarray) -> np.ndarray:
    """Logarithm of the mean over the first axis of what [M, ...] are logarithms of."""
    top = log_p.max(0)
    return top + np.log(np.exp(log_p - top).mean(0))


def majority(log_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(winning class [n], share of the votes of each class [n, C]) of members' log-probabilities [M, n, C]."""
    classes = log_p.shape[-1]
    votes = (log_p.argmax(-1)[..., None] == np.arange(classes)).sum(0)
    first = votes == votes.max(-1, keepdims=True)
    winner = np.where(first, np.exp(log_p).mean(0), -1.0).argmax(-1)
    return winner, votes / len(log_p)


def classification(members: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy, negative log-likelihood and calibration error of each member and of the three ensembles.

    Args:
      members: logits [n, C] by name.
      labels: [n], classes by number.
    """
    logits = np.stack([z.astype(np.float64) for z in members.values()])
    log_p = log_softmax(logits)
    found = {name: _judged(x, labels) for name, x in zip(members, log_p, strict=True)}
    found[MEAN_OF_PROBABILITIES] = _judged(log_mean(log_p), labels)
    found[MEAN_OF_LOGITS] = _judged(log_softmax(logits.mean(0)), labels)
    winner, share = majority(log_p)
    # The winner of a tie must also be the class whose confidence is looked at.
    ahead = share + 1e-9 * (winner[:, None] == np.arange(share.shape[-1]))
    with np.errstate(divide="ignore"):
        found[VOTE] = {"accuracy": float((winner == labels).mean()), "ece": calibration_error(np.log(ahead), labels)}
    return found


def _judged(log_p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float((log_p.argmax(-1) == labels).mean()),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "ece": calibration_error(log_p, labels),
    }


def tokens(members: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, dict[str, float]]:
    """Negative log-likelihood per token, and perplexity, of each language model and of the mean of their probabilities.

    Args:
      members: negative log-likelihoods of the same tokens [n] by name.
      weights: [n].
    """
    nll = np.stack([x.astype(np.float64) for x in members.values()])
    means = {n: float((x * weights).sum() / weights.sum()) for n, x in zip(members, nll, strict=True)}
    means[MEAN_OF_PROBABILITIES] = float((-log_mean(-nll) * weights).sum() / weights.sum())
    return {name: {"nll": x, "perplexity": math.exp(min(x, 700.0))} for name, x in means.items()}
