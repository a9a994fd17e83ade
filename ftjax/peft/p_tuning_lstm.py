"""The LSTM encoder of P-tuning (Liu et al. 2021, arXiv:2103.10385, section 3.2): each virtual token sees those around it.

tokens = W2 relu(W1 [h_forward; h_backward] + b1) + b2,   h = LSTM(E)
cell   i, f, g, o = x W + b + h U + c;   s = sig(f) s + sig(i) tanh(g);   h = sig(o) tanh(s)

    peft=PTuning(tokens=16, hidden=128, encoder="lstm")

Shapes and numbers are those of torch's bidirectional LSTM, as PEFT has it, whose two biases do the same.
"""

from __future__ import annotations

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.params import ParamSpec, key_of
from ftjax.peft.soft import SITE, in_front


@struct.dataclass
class LSTMTap:
    """Inputs and the network; the second dimension of the LSTM's arrays is the direction, onwards and back.

    Attributes:
      e: [n, D].
      first: weights of the first layer [2, D, 4 hidden].
      rest: those of the others [layers - 1, 2, 2 hidden, 4 hidden]; None where there are none.
      u: weights of the hidden values [layers, 2, hidden, 4 hidden].
      b: [layers, 2, 4 hidden].
      c: likewise.
      w1, b1, w2, b2: the two layers behind it, [2 hidden, 2 hidden] and [2 hidden, D].
    """

    e: jax.Array
    first: jax.Array
    rest: jax.Array | None
    u: jax.Array
    b: jax.Array
    c: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array

    @property
    def shift(self) -> int:
        """By how much the tokens' positions are moved on."""
        return self.e.shape[0]

    def tokens(self) -> jax.Array:
        """The virtual tokens [n, D]."""
        h = self.e
        for layer in range(self.u.shape[0]):
            w = self.first if self.rest is None or layer == 0 else self.rest[layer - 1]
            u, b = self.u[layer], self.b[layer] + self.c[layer]
            h = jnp.concatenate([run(h, w[0], u[0], b[0]), run(h[::-1], w[1], u[1], b[1])[::-1]], axis=-1)
        return jax.nn.relu(h @ self.w1 + self.b1) @ self.w2 + self.b2

    def __call__(self, seq: Any, _: Any) -> Any:
        """The sequence with the virtual tokens in front."""
        return in_front(seq, self.tokens())

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Small: not split."""
        names = ("e", "first", "rest", "u", "b", "c", "w1", "b1", "w2", "b2")
        return {k: (None,) * x.ndim for k in names if (x := getattr(self, k)) is not None}

    @classmethod
    def begin(cls, key: jax.Array, e: jax.Array, hidden: int, layers: int) -> Self:
        """Drawn as torch draws: uniform within the root of 1 / hidden, and of 1 / inputs behind the LSTM."""
        dim = e.shape[1]

        def draw(name: str, inputs: int, *shape: int) -> jax.Array:
            bound = 1 / math.sqrt(inputs)
            return jax.random.uniform(key_of(key, f"{SITE}/{name}"), shape, jnp.float32, -bound, bound)

        both, gates = 2 * hidden, 4 * hidden
        return cls(
            e, draw("first", hidden, 2, dim, gates),
            draw("rest", hidden, layers - 1, 2, both, gates) if layers > 1 else None,
            draw("u", hidden, layers, 2, hidden, gates), draw("b", hidden, layers, 2, gates),
            draw("c", hidden, layers, 2, gates), draw("w1", both, both, both), jnp.zeros((both,), jnp.float32),
            draw("w2", both, both, dim), jnp.zeros((dim,), jnp.float32),
        )  # fmt: skip


def run(x: jax.Array, w: jax.Array, u: jax.Array, b: jax.Array) -> jax.Array:
    """One direction of one layer: x [n, in] -> hidden values [n, hidden]. Gates stand in torch's order."""
    hidden = u.shape[0]

    def step(state: tuple[jax.Array, jax.Array], inner: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, s = state
        i, f, g, o = jnp.split(inner + h @ u, 4)
        s = jax.nn.sigmoid(f) * s + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(s)
        return (h, s), h

    zeros = jnp.zeros((hidden,), x.dtype)
    return jax.lax.scan(step, (zeros, zeros), x @ w + b)[1]
