"""One model's logits, chunk by chunk, for any function of a token's logits and of arrays that stand beside the token.

    out_t = f(head(h_t), a_t, b_t, ...)

Logits exist for one chunk of tokens at a time; the backward pass computes them again (jax.checkpoint), chunk by chunk.

    nll, distance = over_tokens(f, head, hidden, targets, ids, chunk=1024)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.kernels.vocab_loss.chunked import Head, over_chunks


def over_tokens(fn: Callable[..., Any], head: Head, hidden: jax.Array, *beside: jax.Array, chunk: int = 0) -> Any:
    """Maps a function of a model's logits over the tokens.

    Args:
      fn: ``(logits [B, t, V], *beside [B, t, ...]) -> [B, t, ...] leaves``; float32 logits.
      head: projection [..., D] -> [..., V]; gradients flow into it.
      hidden: [B, T, D].
      beside: whatever else belongs to the tokens, [B, T, ...].
      chunk: largest number of tokens whose logits exist at once; 0 is all of them.

    Returns:
      What `fn` returns, over all of T.
    """
    B, T = hidden.shape[:2]
    width = T if chunk <= 0 else min(T, max(1, chunk // B))

    @jax.checkpoint
    def one(h: jax.Array, *xs: jax.Array) -> Any:
        return fn(head(h).astype(jnp.float32), *xs)

    return over_chunks(one, width, hidden, *beside)
