"""Attention scores on their way out of a stack of layers: those of the layers that were asked for, and of no others.

    body, carried = watching(body, layers, cache, shape)
    h, (cache, scores) = run_stack(body, params, h, carried, ...)        # scores [P, B, N, T, T]

`attend` leaves its scores in a list that the batch brings; here each layer takes them from there into one array that goes from
layer to layer, so that a scan over L layers holds the P that are wanted. Where nothing is asked for, none of this is there.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.layers import Body, Seq


def asked(attentions: bool | tuple[int, ...], count: int) -> tuple[int, ...]:
    """The layers of `count` whose scores are wanted: all, none, or those that are named, each once and in order."""
    return tuple(range(count)) if attentions is True else tuple(sorted(set(attentions or ())))


def watching(
    block: Callable[..., tuple[jax.Array, Any]], seq: Seq, layers: tuple[int, ...], cache: Any, shape: tuple[int, ...]
) -> tuple[Body, Any]:
    """A layer that notes its scores, and what it carries at first.

    Args:
      block: ``(params, h, layer, cache, seq) -> (h, cache)``.
      seq: the batch.
      layers: numbers of the layers that count.
      cache: what the layers carry already.
      shape: [B, N, T] of the tokens that count, the last ones of each row.
    """
    *_, T = shape
    place = np.full(max(layers) + 2, len(layers), np.int32)  # what is placed beyond the end is dropped
    place[list(layers)] = np.arange(len(layers))

    def body(params: dict, h: jax.Array, layer: Any, carried: Any) -> tuple[jax.Array, Any]:
        inner, kept = carried
        seen: list[jax.Array] = []
        h, inner = block(params, h, layer, inner, dc.replace(seq, scores=seen))
        (scores,) = seen
        at = jnp.asarray(place)[jnp.minimum(jnp.asarray(layer, jnp.int32), len(place) - 1)]
        return h, (inner, kept.at[at].set(scores[..., -T:, -T:], mode="drop"))

    return body, (cache, jnp.zeros((len(layers), *shape, T), jnp.float32))
