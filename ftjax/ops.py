"""The only places where a weight multiplies. They dispatch on the leaf: an array, or anything that knows how to multiply.

    y = dense(x, w, b)        # w: Array [in, out] | Weight

A `Weight` is a pytree with ``dot(x, bias)``: `Adapted` (a base with an adapter's delta) below, quantized weights
elsewhere. Models call these functions and never ask what a weight is; that is how QLoRA is LoRA over a quantized base
without code of its own, and why a fused kernel has one call site.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

GLOBAL_SEGMENT = -1  # segment id of positions that every segment sees: prefixes and soft prompts
PAD_SEGMENT = -2  # segment id of padding: sees nothing, seen by nothing


@runtime_checkable
class Weight(Protocol):
    """A leaf that multiplies: a pytree standing for a kernel [in, out]."""

    def dot(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out] in x's dtype, the bias (or None) included."""
        ...

    def materialize(self) -> jax.Array:
        """The kernel as one array [in, out] (with leading dimensions where the leaf is stacked), in float32."""
        ...


class Delta(Protocol):
    """What an adapter does to one weight: a pytree. See `ftjax.peft.base` for how one is made."""

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """The adapted product [..., out], in x's dtype. `key` is the dropout key, None outside training."""
        ...

    def merge(self, base: jax.Array) -> jax.Array:
        """The kernel with the adapter folded in, float32 in and out."""
        ...


@struct.dataclass
class Adapted:
    """A weight under an adapter: base (array or `Weight`), delta, and the dropout key of this layer in this step."""

    base: Any
    delta: Any
    key: jax.Array | None = None

    def dot(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The adapted product; the delta sees the bias, which IA3 scales and DoRA leaves out of its norm."""
        return self.delta.dot(x, self.base, bias, self.key)

    def conv(self, x: jax.Array, *, stride: int, padding: int) -> jax.Array:
        """The adapted convolution; of a delta that knows none, by its merged kernel."""
        if hasattr(self.delta, "conv"):
            return self.delta.conv(x, self.base, self.key, stride=stride, padding=padding)
        return conv(x, self.materialize(), stride=stride, padding=padding)

    def embed(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Adapted rows; of a delta that knows no lookup, of its merged table."""
        if hasattr(self.delta, "embed"):
            return self.delta.embed(ids, self.base, dtype)
        return embed(ids, self.materialize(), dtype)

    def unembed(self, x: jax.Array) -> jax.Array:
        """The tied head: a delta of the lookup leaves it alone."""
        return unembed(x, self.base if hasattr(self.delta, "embed") else self.materialize())

    def materialize(self) -> jax.Array:
        """Base and adapter folded into one kernel, computed in float32."""
        return self.delta.merge(materialize(self.base))


def materialize(leaf: Any) -> jax.Array:
    """Any leaf as a float32 kernel."""
    return leaf.materialize() if hasattr(leaf, "materialize") else leaf.astype(jnp.float32)


def dense(x: jax.Array, w: Any, b: jax.Array | None = None) -> jax.Array:
    """x [..., in] times w [in, out] plus b [out]; the result has x's dtype."""
    if hasattr(w, "dot") and not isinstance(w, jax.Array):
        return w.dot(x, b)
    y = x @ w.astype(x.dtype)
    return y if b is None else y + b.astype(x.dtype)


def conv(x: jax.Array, w: Any, *, stride: int = 1, padding: int = 0) -> jax.Array:
    """x [B, height, width, in] convolved with w [kernel height, kernel width, in, out], zero padding; x's dtype."""
    if hasattr(w, "conv"):
        return w.conv(x, stride=stride, padding=padding)
    kernel = w.materialize() if hasattr(w, "materialize") else w
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def unembed(x: jax.Array, w: Any) -> jax.Array:
    """x [..., D] times the transpose of an embedding table [V, D]: the tied output head."""
    if hasattr(w, "unembed"):
        return w.unembed(x)
    table = w.materialize() if hasattr(w, "materialize") else w
    return jax.lax.dot_general(x, table.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def embed(ids: jax.Array, w: Any, dtype: Any) -> jax.Array:
    """Rows of an embedding table [V, D] for ids [...]: [..., D]."""
    if hasattr(w, "embed"):
        return w.embed(ids, dtype)
    table = w.materialize() if hasattr(w, "materialize") else w
    return table[ids].astype(dtype)
