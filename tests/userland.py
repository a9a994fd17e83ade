"""Modules as a user would write them, for test_user: a Linen CNN with BatchNorm, an NNX MLP."""

from __future__ import annotations

import jax
from flax import linen as nn
from flax import nnx


class CNN(nn.Module):
    """Two convolutions with BatchNorm, mean over the image, two dense layers."""

    features: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(32)(x.mean((1, 2))))
        return nn.Dense(self.classes)(x)


class MLP(nnx.Module):
    """Three layers."""

    def __init__(self, inputs: int, hidden: int, classes: int, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.third = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))
