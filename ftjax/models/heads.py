"""Heads: what turns hidden values into logits. Each is a Linen module ``(h, seq, embedding table) -> (hidden, Head)``.

The projection itself is not applied here: losses over a vocabulary do so in chunks (see `Output.nll`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.base import Head
from ftjax.models.layers import ACTIVATIONS, LayerNorm, Linear, Seq
from ftjax.ops import PAD_SEGMENT
from ftjax.params import ParamSpec, leaf


class Projection(nn.Module):
    """The weights of an output projection [D, out]."""

    out: int
    hf: str
    std: float
    use_bias: bool = False
    axes: tuple[str | None, str | None] = ("embed", None)

    @nn.compact
    def __call__(self, dim: int) -> Head:
        spec = ParamSpec((dim, self.out), self.axes, std=self.std, hf=self.hf + ".weight", transposed=True)
        w, b = leaf(self, "w", spec), None
        if self.use_bias:
            b = leaf(self, "b", ParamSpec((self.out,), self.axes[1:], "bias", init="zeros", hf=self.hf + ".bias"))
        return Head(w, False, b)


class VocabularyHead(nn.Module):
    """Next-token logits at every place: the embedding table again, or weights of its own."""

    vocab: int
    tied: bool
    hf: str
    std: float
    cap: float | None = None
    use_bias: bool = False

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, embedding: Any) -> tuple[jax.Array, Head]:
        if self.tied:
            return h, Head(embedding, True, None, self.cap)
        name = self.hf.removesuffix(".weight")
        made = Projection(self.vocab, name, self.std, self.use_bias, ("embed", "vocab"), name="head")(h.shape[-1])
        return h, Head(made.w, False, made.b, self.cap)


class ScoreHead(nn.Module):
    """Labels or numbers at every place."""

    labels: int
    hf: str
    std: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, embedding: Any) -> tuple[jax.Array, Head]:
        return h, Projection(self.labels, self.hf, self.std, self.use_bias, name="head")(h.shape[-1])


class PooledHead(nn.Module):
    """Labels of a row from its last real token, on whichever side the padding is."""

    labels: int
    hf: str
    std: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, embedding: Any) -> tuple[jax.Array, Head]:
        pooled = jnp.take_along_axis(h, last_real(seq)[:, None, None], axis=1)[:, 0]
        return pooled, Projection(self.labels, self.hf, self.std, self.use_bias, name="head")(h.shape[-1])


def last_real(seq: Seq) -> jax.Array:
    """Column of the last token that is not padding [B]; 0 where there is none."""
    real = seq.segments != PAD_SEGMENT
    return jnp.where(real, jnp.arange(real.shape[1], dtype=jnp.int32), 0).max(axis=1)


def mean_real(h: jax.Array, seq: Seq) -> jax.Array:
    """Mean over the tokens that are not padding, summed in float32: [B, T, D] -> [B, D]; 0 where there is none."""
    real = (seq.segments != PAD_SEGMENT).astype(jnp.float32)
    total = jnp.einsum("BTD,BT->BD", h.astype(jnp.float32), real)
    return (total / jnp.maximum(real.sum(1), 1)[:, None]).astype(h.dtype)


class _Dense(nn.Module):
    """The inner part of `EncoderHead`, named "head" in the table."""

    head: EncoderHead

    @nn.compact
    def __call__(self, h: jax.Array, embedding: Any) -> tuple[jax.Array, Head]:
        c = self.head
        if c.dense_hf:
            h = ACTIVATIONS[c.activation](
                Linear(h.shape[-1], ("embed", None), c.dense_hf, c.dense_bias, c.std, name="dense")(h)
            )
        if c.norm_hf:
            h = LayerNorm(c.eps, c.norm_hf, c.norm_bias, name="norm")(h)
        bias = ParamSpec((c.out,), (c.axis,), "bias", init="zeros", hf=c.bias_hf)
        b = leaf(self, "b", bias) if c.bias_hf else None
        if c.tied:
            return h, Head(embedding, True, b)
        spec = ParamSpec((h.shape[-1], c.out), ("embed", c.axis), std=c.std, hf=c.hf + ".weight", transposed=True)
        return h, Head(leaf(self, "w", spec), False, b)


class EncoderHead(nn.Module):
    """What BERT and its kin put on top: pool, dense layer, norm, projection; what has no name is left out.

    Attributes:
      out: labels or tokens.
      hf: projection in the file.
      std: initial standard deviation.
      bias_hf: the projection's bias in the file.
      first, mean: whether only the first token counts, or the mean of all that are not padding.
      pooler_hf: tanh layer over the first token that belongs to the base (BERT).
      dense_hf, activation, dense_bias: layer before the projection.
      norm_hf, eps, norm_bias: norm after it.
      tied: whether the projection is the embedding table.
      axis: logical axis of the outputs.
    """

    out: int
    hf: str
    std: float
    bias_hf: str
    first: bool = False
    mean: bool = False
    pooler_hf: str = ""
    dense_hf: str = ""
    activation: str = "tanh"
    dense_bias: bool = True
    norm_hf: str = ""
    eps: float = 0.0
    norm_bias: bool = True
    tied: bool = False
    axis: str | None = None

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, embedding: Any) -> tuple[jax.Array, Head]:
        h = h[:, 0] if self.first else mean_real(h, seq) if self.mean else h
        if self.pooler_hf:
            h = jnp.tanh(Linear(h.shape[-1], ("embed", None), self.pooler_hf, True, self.std, name="pooler")(h))
        return _Dense(self.clone(parent=None, name=None), name="head")(h, embedding)
