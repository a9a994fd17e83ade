"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p, in transformers' order.

token = draw(logits, keys, SamplingArrays.of(Sampling(temperature=0.8, top_p=0.95)))
"""

from __future__ import annotations

import dataclasses as dc
import math

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
      top_k: draw from the k likeliest (and what ties with the last of them); 0 is all.
      top_p: draw from the smallest set whose probability reaches p; 1 is all (Holtzman et al. 2019, arXiv:1904.09751).
      stop: texts that end the answer; they are not part of it.
      seed: of the draws, 0 to 2^31 - 1.
      min_p: draw from tokens at least this share as likely as the likeliest; 0 is all (arXiv:2407.01082).

    Raises:
      ConfigError: numbers out of range, all of them named.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a number >= 0"),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "a share > 0 and <= 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "texts that are not empty"),
            ("seed", 0 <= self.seed < 2**31, f"0 to {2**31 - 1}"),
            ("min_p", 0 <= self.min_p <= 1, "a share from 0 to 1"),
        )
        wrong = [f"{name}={getattr(self, name)!r}  expected {allowed}" for name, ok, allowed in ranges if not ok]
        if wrong:
            raise ConfigError("sampling", wrong)


@struct.dataclass
class SamplingArrays:
    """The numbers of `Sampling` as arrays, so that changing them compiles nothing.

    Attributes:
      temperature: above 0.
      top_k: 0 is all.
      tail: 1 - top_p, taken in double precision as transformers does; 0 is all.
      min_p: 0 is all.
    """

    temperature: jax.Array
    top_k: jax.Array
    tail: jax.Array
    min_p: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingArrays:
        """Scalars for the device."""
        s = sampling
        return cls(
            jnp.float32(max(s.temperature, 1e-6)), jnp.int32(s.top_k), jnp.float32(1 - s.top_p), jnp.float32(s.min_p)
        )


def keep(logits: jax.Array, numbers: SamplingArrays) -> jax.Array:
    """Logits over the temperature, -inf where top-k, top-p or min-p leave a token out.

    Args:
      logits: float32 [B, V].
      numbers: how.

    Returns:
      float32 [B, V]; the likeliest token always stays.
    """
    z = logits / numbers.temperature
    some = (numbers.top_k > 0) | (numbers.tail > 0) | (numbers.min_p > 0)
    return jax.lax.cond(some, lambda: _filtered(z, numbers), lambda: z)  # no sort where nothing is left out


def _filtered(z: jax.Array, numbers: SamplingArrays) -> jax.Array:
    V = z.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), z.shape)
    ascending, order = jax.lax.sort((z, ids), num_keys=1)
    k = jnp.where(numbers.top_k > 0, jnp.minimum(numbers.top_k, V), V)
    kth = jax.lax.dynamic_slice_in_dim(ascending, V - k, 1, axis=-1)
    kept = jnp.where(ascending < kth, -jnp.inf, ascending)
    below = jnp.cumsum(jax.nn.softmax(kept, axis=-1), axis=-1)
    drop = (below <= numbers.tail) & (numbers.tail > 0) & (jnp.arange(V) < V - 1)
    kept = jnp.where(drop, -jnp.inf, kept)
    p = jax.nn.softmax(kept, axis=-1)
    kept = jnp.where(p < numbers.min_p * p[:, -1:], -jnp.inf, kept)
    return jnp.put_along_axis(z, order, kept, axis=-1, inplace=False)


def draw(logits: jax.Array, keys: jax.Array, numbers: SamplingArrays) -> jax.Array:
    """One token per row, int32 [B], each row by its own key [B]."""
    return jax.vmap(jax.random.categorical)(keys, keep(logits, numbers)).astype(jnp.int32)
