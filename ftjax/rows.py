"""Where a token stands in its example, read off the segments of a row: examples lie one after another, padding on either side.

place, length = places(segments)                 # counted within each example
prompt = prompt_lengths(segments, weights > 0)   # what comes before the first trained token
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def places(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(place of each token in its example, length of that example), int32 [B, T] each, from segments [B, T]."""
    start, end = _bounds(segments)
    return _columns(segments) - start, end - start + 1


def prompt_lengths(segments: jax.Array, trained: jax.Array) -> jax.Array:
    """Length of the prompt of each token's example, int32 [B, T]: its tokens before the first trained one, all if none is.

    Args:
      segments: which example a token belongs to [B, T].
      trained: whether a token is a target of the loss [B, T].
    """
    start, end = _bounds(segments)
    T = segments.shape[-1]
    column = _columns(segments)
    # The first trained column at or after each one; past its example's end there is none.
    coming = jax.lax.cummin(jnp.where(trained, column, T), axis=segments.ndim - 1, reverse=True)
    first = jnp.take_along_axis(coming, start, axis=-1)
    return jnp.minimum(first, end + 1) - start


def _columns(segments: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)


def _bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns of the first and last token of each token's example."""
    T, axis, column = segments.shape[-1], segments.ndim - 1, _columns(segments)
    border = segments[..., 1:] != segments[..., :-1]
    edge = jnp.ones_like(segments[..., :1], bool)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([edge, border], -1), column, 0), axis=axis)
    end = jax.lax.cummin(jnp.where(jnp.concatenate([border, edge], -1), column, T - 1), axis=axis, reverse=True)
    return start, end
