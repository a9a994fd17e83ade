"""From logits to the next token: greedy, or drawn after temperature, top-k and top-p, in transformers' order.

token = draw(logits, keys, SamplingArrays.of(Sampling(temperature=0.8, top_p=0.95)))
"""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.errors import ConfigError


@dc.dataclass(frozen=True)
class Sampling:
    """How to answer.

    Attributes:
      max_new_tokens: longest answer.
      temperature: 0 takes the likeliest token.
      top_k: draw from the k likeliest; 0 is all.
      top_p: draw from the smallest set whose probability reaches p; 1 is all (Holtzman et al. 2019, arXiv:1904.09751).
      stop: texts that end the answer; they are not part of it.
      seed: of the draws.

    Raises:
      ConfigError: a number is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value}  expected {allowed}"
            for name, value, ok, allowed in (
                ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
                ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
                ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "a share in (0, 1]"),
            )
            if not ok
        ]
        if wrong:
            raise ConfigError("sampling", wrong)


@struct.dataclass
class SamplingArrays:
    """The numbers of `Sampling` as arrays, so that changing them compiles nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingArrays:
        """Scalars for the device."""
        return cls(jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))


def keep(logits: jax.Array, numbers: SamplingArrays) -> jax.Array:
    """Logits [B, V] divided by the temperature, -inf where top-k or top-p leaves a token out."""
    z = logits / jnp.maximum(numbers.temperature, 1e-6)
    ascending = jnp.sort(z, axis=-1)
    V = z.shape[-1]
    k = jnp.where(numbers.top_k > 0, jnp.minimum(numbers.top_k, V), V)
    kth = jnp.take_along_axis(ascending, jnp.broadcast_to(V - k, (z.shape[0], 1)), axis=-1)
    z = jnp.where(z < kth, -jnp.inf, z)
    order = jnp.argsort(z, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(z, order, -1), axis=-1), axis=-1)
    drop = (below <= 1 - numbers.top_p) & (numbers.top_p < 1)
    drop = drop.at[:, -1].set(False)  # the likeliest token always stays
    inverse = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(drop, inverse, -1), -jnp.inf, z)


def draw(logits: jax.Array, keys: jax.Array, numbers: SamplingArrays) -> jax.Array:
    """One token per row [B], each row by its own key [B]."""
    return jax.vmap(jax.random.categorical)(keys, keep(logits, numbers)).astype(jnp.int32)
