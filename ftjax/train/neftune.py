"""NEFTune: uniform noise on the embedded tokens while training (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

h' = h + a / sqrt(T D) u,   u ~ Uniform(-1, 1) for each number of h [B, T, D]

    train=Train(neftune=5.0)

T is the length of a row, padding and packed neighbours included, as in transformers' ``neftune_noise_alpha``; the paper's is
each text's own. The noise is on what the table of tokens gives, before factors, positions and norms, where transformers
hooks it too; soft prompts get none. Nothing is stored: it is a wrapper around the table in the step's bound weights, drawn
from the step's key, so that evaluation, references, checkpoints and adapter files know nothing of it and a resumed run
draws the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ftjax import ops
from ftjax.errors import ConfigError
from ftjax.params import Store

TABLE = "embed/w"


@struct.dataclass
class NoisyTable:
    """A table of tokens whose lookups are noisy; the head that is tied to it is not.

    Attributes:
      table: array or `Weight`, adapters in place.
      alpha: a, float32 scalar.
      key: of the micro-batch.
    """

    table: Any
    alpha: jax.Array
    key: jax.Array

    def embed(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows for ids [B, T] with noise, [B, T, D]."""
        h = ops.embed(ids, self.table, dtype)
        # by what is looked up, so that two lookups of one pass (T5's two sides, several tasks) have noise of their own
        key = jax.random.fold_in(self.key, ids.astype(jnp.uint32).sum())
        size = self.alpha / jnp.sqrt(jnp.float32(h.shape[-2] * h.shape[-1]))
        return h + (size * jax.random.uniform(key, h.shape, jnp.float32, -1.0, 1.0)).astype(dtype)

    def unembed(self, x: jax.Array) -> jax.Array:
        """The tied head."""
        return ops.unembed(x, self.table)

    def materialize(self) -> jax.Array:
        """The table."""
        return ops.materialize(self.table)


def noisy(params: Store, alpha: jax.Array, rng: jax.Array) -> Store:
    """The parameters that a model sees in a training step.

    Raises:
      ConfigError: the model has no table of tokens.
    """
    if TABLE not in params:
        raise ConfigError("train.neftune  is noise on embedded tokens, and this model has none; set it to 0")
    return params | {TABLE: NoisyTable(params[TABLE], alpha, jax.random.fold_in(rng, 0x4E4546))}
