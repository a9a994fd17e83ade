"""Two models' logits of the same tokens, chunk by chunk: for losses that compare whole distributions over the vocabulary.

    out_t = f(head(h_t), head'(h'_t), y_t)

Both logits exist for one chunk of tokens at a time; the backward pass computes them again (jax.checkpoint), chunk by chunk.

    nll, distance = over_pairs(f, student.head, student.hidden, teacher.head, teacher.hidden, targets, chunk=1024)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.kernels.vocab_loss.chunked import Head, over_chunks


def over_pairs(
    fn: Callable[[jax.Array, jax.Array, jax.Array], Any], student: Head, hidden: jax.Array, teacher: Head,
    known: jax.Array, targets: jax.Array, *, chunk: int = 0,
) -> Any:  # fmt: skip
    """Maps a function of two models' logits over the tokens.

    Args:
      fn: ``(student logits [B, t, V], teacher logits [B, t, V], targets [B, t]) -> [B, t, ...] leaves``; float32 logits.
      student: projection [..., D] -> [..., V]; gradients flow into it.
      hidden: [B, T, D].
      teacher: the other projection, constant.
      known: the teacher's hidden values [B, T, D'].
      targets: [B, T].
      chunk: largest number of tokens whose logits exist at once; 0 is all of them.

    Returns:
      What `fn` returns, over all of T.
    """
    B, T = targets.shape
    width = T if chunk <= 0 else min(T, max(1, chunk // B))
    known, teacher = jax.lax.stop_gradient((known, teacher))

    @jax.checkpoint
    def one(h: jax.Array, k: jax.Array, y: jax.Array) -> Any:
        return fn(student(h).astype(jnp.float32), teacher(k).astype(jnp.float32), y)

    return over_chunks(one, width, hidden, known, targets)
