"""The reparameterisation of prefix tuning: a network makes the keys and values while training (arXiv:2101.00190, section 4.3).

[k_1 v_1 k_2 v_2 ...] = W2 tanh(W1 E + b1) + b2,   E [n, D] learned, D as wide as the keys of all heads

    peft=Prefix(tokens=16, projection=True)

One network makes those of all layers. Only what it makes is exported, as PEFT does: read back, it is a plain prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.params import ParamSpec, key_of
from ftjax.peft.prefix_tap import PrefixTap


@struct.dataclass
class ProjectedPrefix:
    """The network, held once for a stack of L layers; `spread` makes each layer's keys and values of it.

    Attributes:
      e: [n, D].
      w1, b1: [D, hidden] and [hidden].
      w2, b2: [hidden, L, 2, K, H] and [L, 2, K, H].
    """

    e: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array

    def spread(self, overlay: Mapping[str, Any]) -> PrefixTap:
        """Keys and values of all layers."""
        h = jnp.tanh(self.e @ self.w1 + self.b1)
        both = jnp.einsum("nm,mlckh->lcnkh", h, self.w2) + self.b2[:, :, None]
        return PrefixTap(both[:, 0], both[:, 1])

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Small but for the last layer, which is split by heads."""
        heads = (spec.axes[0], None, *spec.axes[-2:])
        return {"e": (None, None), "w1": (None, None), "b1": (None,), "w2": (None, *heads), "b2": heads}

    @classmethod
    def begin(cls, key: jax.Array, path: str, spec: ParamSpec, tokens: int, hidden: int) -> Self:
        """Drawn as torch draws: E normal, weights uniform within the root of 1 / inputs; biases zero."""
        L, K, H = spec.shape
        dim = K * H
        hidden = hidden or dim

        def draw(name: str, inputs: int, *shape: int) -> jax.Array:
            bound = 1 / math.sqrt(inputs)
            return jax.random.uniform(key_of(key, f"{path}/{name}"), shape, jnp.float32, -bound, bound)

        return cls(
            jax.random.normal(key_of(key, f"{path}/e"), (tokens, dim), jnp.float32), draw("w1", dim, dim, hidden),
            jnp.zeros((hidden,), jnp.float32), draw("w2", hidden, hidden, L, 2, K, H),
            jnp.zeros((L, 2, K, H), jnp.float32),
        )  # fmt: skip
