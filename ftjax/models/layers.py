"""Layers shared by the families: projections, norms, rotary positions, attention over explicit keys and values.

Shape suffixes: B batch, T query time, S key time, D embed, N heads, K key/value heads, G = N / K, H head dim, L layers.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ftjax.ops import GLOBAL_SEGMENT, PAD_SEGMENT, dense
from ftjax.params import ParamSpec, leaf

MASKED = -1e30
"""The score of a key that a query does not see."""


@struct.dataclass
class Seq:
    """A batch of token rows on its way through a model.

    Attributes:
      h: hidden values [B, T, D].
      positions: position of each token in its own example [B, T].
      segments: which example of the row a token belongs to [B, T]; GLOBAL_SEGMENT and PAD_SEGMENT are special.
      prompt_len: length of the prompt of the token's example [B, T]; interventions at prompt positions read it.
      first: whether this is the whole sequence or the prefill, rather than a decoding step.
      scores: filled with the scores that `attend` finds [B, N, T, S], where they are wanted (see `ftjax.models.scores`).
    """

    h: jax.Array | None
    positions: jax.Array
    segments: jax.Array
    prompt_len: jax.Array
    first: bool = struct.field(pytree_node=False, default=True)
    scores: list[jax.Array] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class KV:
    """Keys and values with what decides who may see them: k, v [B, S, K, H], positions and segments [B, S].

    `gates` [B, T, S], if there are any, are factors on each key and value as a query sees it.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array
    gates: jax.Array | None = None


@struct.dataclass
class Cache:
    """Keys and values of all layers so far: k, v [L, B, S, K, H]; positions, segments [B, S]; `at`: columns filled."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array
    at: jax.Array


class Linear(nn.Module):
    """y = x W + b, W [in, out]."""

    out: int
    axes: tuple[str | None, str | None]
    hf: str
    use_bias: bool
    std: float
    transposed: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.out)
        w = leaf(
            self, "w", ParamSpec(shape, self.axes, std=self.std, hf=self.hf + ".weight", transposed=self.transposed)
        )
        b = None
        if self.use_bias:
            b = leaf(self, "b", ParamSpec(shape[1:], self.axes[1:], "bias", init="zeros", hf=self.hf + ".bias"))
        return dense(x, w, b)


class RMSNorm(nn.Module):
    """x / rms(x) * w, statistics in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    Attributes:
      eps: added to the mean square.
      hf: name in the file.
      offset: None multiplies in x's dtype, as Llama does; a number is added to w and all is done in float32 (Gemma: 1).
      axis: logical axis of w.
    """

    eps: float
    hf: str
    offset: float | None = None
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = "zeros" if self.offset else "ones"
        w = leaf(self, "w", ParamSpec(x.shape[-1:], (self.axis,), "norm", init=init, hf=self.hf))
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.offset is None:
            return w.astype(x.dtype) * y.astype(x.dtype)
        return (y * (w.astype(jnp.float32) + self.offset)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * w + b, statistics in float32 (Ba et al. 2016, arXiv:1607.06450). `since`: see `ParamSpec`."""

    eps: float
    hf: str
    use_bias: bool = True
    since: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dims = x.shape[-1:]
        w = leaf(self, "w", ParamSpec(dims, ("embed",), "norm", "ones", hf=self.hf + ".weight", since=self.since))
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = w.astype(x.dtype) * y.astype(x.dtype)
        if not self.use_bias:
            return y
        b = leaf(self, "b", ParamSpec(dims, ("embed",), "bias", "zeros", hf=self.hf + ".bias", since=self.since))
        return y + b.astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""By the names of transformers' `hidden_act`."""


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, inv_freq_h: jax.Array, *, scale: float) -> jax.Array:
    """Rotary position embedding on two halves, angles in float32 (Su et al. 2021, arXiv:2104.09864).

    Args:
      x_BTNH: queries or keys.
      positions_BT: token positions.
      inv_freq_h: inverse frequencies [H / 2]; fewer leave the last dimensions of a head as they are.
      scale: factor on the result (1 for the plain form).
    """
    rotated = 2 * inv_freq_h.shape[-1]
    if rotated < x_BTNH.shape[-1]:
        turned = rotate(x_BTNH[..., :rotated], positions_BT, inv_freq_h, scale=scale)
        return jnp.concatenate([turned, x_BTNH[..., rotated:]], axis=-1)
    angle = positions_BT[..., None, None].astype(jnp.float32) * inv_freq_h
    cos, sin = (jnp.cos(angle) * scale).astype(x_BTNH.dtype), (jnp.sin(angle) * scale).astype(x_BTNH.dtype)
    x1, x2 = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def visible(seq: Seq, kv: KV, *, causal: bool, window: Any) -> jax.Array:
    """Who sees whom [B, T, S]: same segment or a global one; causal: not later; window: not further away.

    `window` w is an int or a traced scalar: tokens less than w positions back are seen, and those ahead likewise where
    attention is not causal.
    """
    q, k = seq.positions[:, :, None], kv.positions[:, None, :]
    mine = seq.segments[:, :, None]
    # Padding sees everything, as in transformers, where a mask is one of keys: of BERT's first column this can be read.
    same = (mine == kv.segments[:, None, :]) | (mine == PAD_SEGMENT)
    everywhere = kv.segments[:, None, :] == GLOBAL_SEGMENT
    mask = (same | everywhere) & (kv.segments[:, None, :] != PAD_SEGMENT)
    if causal:
        mask = mask & (k <= q)
    if window is not None:
        near = (q - k if causal else jnp.abs(q - k)) < window
        mask = mask & (near | everywhere)
    return mask


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap): keeps values within +- cap (Gemma 2, arXiv:2408.00118)."""
    return jnp.tanh(x / cap) * cap


def attend(
    q_BTNH: jax.Array,
    kv: KV,
    seq: Seq,
    *,
    scale: Any,
    causal: bool = True,
    window: Any = None,
    cap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with grouped heads, statistics in float32: [B, T, N * H].

    Args:
      q_BTNH: queries.
      kv: keys and values with what decides who sees them.
      seq: positions and segments of the queries.
      scale: factor on the scores; a number, or a traced one.
      causal: whether nothing later is seen.
      window: see `visible`.
      cap: soft limit of the scores, None for none.
      bias: added to the scores, broadcast to [B, N, T, S] (T5's relative positions).
    """
    B, T, N, H = q_BTNH.shape
    K = kv.k.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(scale, q_BTNH.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, kv.k, preferred_element_type=jnp.float32)
    gates = None if kv.gates is None else kv.gates[:, None, None].astype(scores.dtype)
    scores = scores if gates is None else scores * gates
    if cap is not None:
        scores = soft_cap(scores, cap)
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, (B, N, *scores.shape[3:])).reshape(scores.shape)
    mask = visible(seq, kv, causal=causal, window=window)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    if seq.scores is not None:
        seq.scores.append(scores.reshape(B, N, *scores.shape[3:]))
    weights = jax.nn.softmax(scores, axis=-1)
    weights = (weights if gates is None else weights * gates).astype(kv.v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, kv.v).reshape(B, T, N * H)


def extend(
    cache: Cache | None, layer: jax.Array | int, k: jax.Array, v: jax.Array, seq: Seq
) -> tuple[KV, Cache | None]:
    """The keys and values that this layer attends to: those of the present tokens, after what the cache holds.

    The cache's positions and segments are written by the caller once for all layers, before the first layer.
    """
    if cache is None:
        return KV(k, v, seq.positions, seq.segments), None
    zero = jnp.zeros((), jnp.int32)
    start = (jnp.asarray(layer, jnp.int32), zero, cache.at, zero, zero)
    grown = dc.replace(
        cache,
        k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start),
        v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start),
    )
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)  # noqa: E731
    return KV(pick(grown.k), pick(grown.v), grown.positions, grown.segments), grown


Body = Callable[[dict, jax.Array, jax.Array | int, Any], tuple[jax.Array, Any]]


def run_stack(
    body: Body, segments: tuple[dict, ...], h: jax.Array, cache: Any, *, unroll: bool, remat: str,
    each: list[jax.Array] | None = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Runs ``h, cache = body(params, h, layer, cache)`` over all layers of all segments.

    The cache is part of the carry, not of scan's inputs and outputs: there it would exist twice.

    Args:
      body: one layer.
      segments: stacked parameters of adjoining layer ranges, in order.
      h: hidden values.
      cache: passed from layer to layer.
      unroll: a Python loop instead of `jax.lax.scan`.
      remat: "none", "dots" (keep matrix products) or "full" (keep only layer inputs).
      each: filled with the hidden values after every layer, [n, ...] of each segment; None: they are not kept.
    """
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        body = jax.checkpoint(body, policy=policy)
    at = 0
    for params in segments:
        n = jax.tree.leaves(params)[0].shape[0]
        if unroll:
            for i in range(n):
                h, cache = body(jax.tree.map(lambda x, i=i: x[i], params), h, at + i, cache)
                if each is not None:
                    each.append(h[None])
        else:

            def step(carry: Any, xs: Any) -> tuple[Any, Any]:
                out = body(xs[0], carry[0], xs[1], carry[1])
                return out, None if each is None else out[0]

            (h, cache), kept = jax.lax.scan(step, (h, cache), (params, jnp.arange(at, at + n)))
            if each is not None:
                each.append(kept)
        at += n
    return h, cache
