"""Divergence from a teacher of whom only the k likeliest tokens of each place are known.

t = softmax(log p' / T) over the k likeliest tokens alone;   s = softmax(z / T) over the whole vocabulary
D = sum over the k of t (log t - log s)

    nll, distance, right = top_k_tokens(output, targets, batch.top_ids, batch.top_log_p, temperature=2.0)

log p' are the teacher's log-probabilities in its whole distribution at temperature 1. Because p^(1/T) is proportional to
exp(z' / T), t is the teacher's distribution at T, cut to these tokens and renormalised; with k the whole vocabulary it is that
distribution itself. What the teacher gave the other tokens is given to the k, and the student is drawn away from the others.
The reverse and the Jensen-Shannon divergence need the teacher's share of every token, and are not defined here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.kernels.vocab_loss import over_tokens
from ftjax.objectives.classification import smoothed


def top_k(output: Any, k: int) -> dict[str, jax.Array]:
    """The k likeliest tokens at every place of a model's output and their log-probabilities, [B, T, k] each.

    Args:
      output: with `head`, `hidden` [B, T, D] and `chunk`: the tokens whose logits may exist at once.
      k: at most the vocabulary.
    """

    def one(z: jax.Array) -> Any:
        best, ids = jax.lax.top_k(z, k)
        return ids.astype(jnp.int32), best - jax.nn.logsumexp(z, axis=-1, keepdims=True)

    ids, log_p = over_tokens(one, output.head, output.hidden, chunk=output.chunk)
    return {"top_ids": ids, "top_log_p": log_p}


def top_k_kl(z: jax.Array, ids: jax.Array, log_p: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """T^2 D of logits [..., V] from a teacher's likeliest tokens [..., k] -> [...]."""
    t = jax.nn.log_softmax(log_p / temperature, axis=-1)
    cool = z / temperature
    s = jnp.take_along_axis(cool, ids, axis=-1) - jax.nn.logsumexp(cool, axis=-1, keepdims=True)
    return temperature**2 * (jnp.exp(t) * (t - s)).sum(-1)


def top_k_tokens(
    student: Any, targets: jax.Array, ids: jax.Array, log_p: jax.Array, *, temperature: jax.Array | float,
    smoothing: jax.Array | float = 0.0,
) -> Any:  # fmt: skip
    """(nll, T^2 D, whether the target is the likeliest) of each token [B, T], in chunks.

    Args:
      student: its output, with `head`, `hidden` [B, T, D] and `chunk`.
      targets: [B, T].
      ids: the teacher's likeliest tokens [B, T, k].
      log_p: their log-probabilities at temperature 1.
      temperature: T.
      smoothing: of the labels.
    """

    def one(z: jax.Array, y: jax.Array, ids: jax.Array, log_p: jax.Array) -> Any:
        picked = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]
        right = (picked >= z.max(-1)).astype(jnp.float32)
        return smoothed(z, y, smoothing), top_k_kl(z, ids, log_p, temperature), right

    return over_tokens(one, student.head, student.hidden, targets, ids, log_p, chunk=student.chunk)
