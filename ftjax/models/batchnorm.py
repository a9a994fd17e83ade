"""Batch normalisation whose running statistics are explicit state (Ioffe & Szegedy 2015, arXiv:1502.03167).

y = (x - mean) / sqrt(var + eps) * w + b, with the batch's mean and variance over all its places while training, and the
running ones elsewhere;   running = (1 - m) running + m batch, the variance unbiased.

    out = model.apply(params, inputs, train=True)
    params = params | out.mutable                       # {"stage1/block0/norm1/mean": [C], ".../var": [C]}
    params = reestimate(model, params, batches)         # the statistics of these batches, from nothing
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.errors import ConfigError, DataError
from ftjax.models.base import Model
from ftjax.params import ParamSpec, Store, leaf

STAT = "stat"
"""The collection that new statistics are written to. Asking for it is asking for training mode."""

EPS, MOMENTUM = 1e-5, 0.1
"""torch's defaults, which the families here use; their config files do not hold them."""


class BatchNorm(nn.Module):
    """Normalises x [B, ..., C] channel by channel; statistics in float32, of all rows that the call sees."""

    hf: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dims = x.shape[-1:]

        def own(name: str, kind: Any, init: Any, hf: str) -> jax.Array:
            spec = ParamSpec(dims, ("embed",), kind, init=init, hf=f"{self.hf}.{hf}")
            return leaf(self, name, spec).astype(jnp.float32)

        w, b = own("w", "norm", "ones", "weight"), own("b", "bias", "zeros", "bias")
        mean, var = own("mean", "stat", "zeros", "running_mean"), own("var", "stat", "ones", "running_var")
        x32 = x.astype(jnp.float32)
        if self.is_mutable_collection(STAT) and not self.is_initializing():
            mean, var = self.of_batch(x32, mean, var)
        return ((x32 - mean) * (jax.lax.rsqrt(var + EPS) * w) + b).astype(x.dtype)

    def of_batch(self, x32: jax.Array, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The batch's mean and variance [C]; notes how the running ones move."""
        count = x32.size // x32.shape[-1]
        if count < 2:
            raise ConfigError(
                "BatchNorm has a single value per channel to take statistics of: use a larger micro-batch "
                "(train.batch, train.accumulate), larger images, or compute.batch_norm=frozen"
            )
        within = tuple(range(x32.ndim - 1))
        now = x32.mean(within)
        spread = jnp.square(x32 - now).mean(within)
        self.put_variable(STAT, "mean", (1 - MOMENTUM) * mean + MOMENTUM * now)
        self.put_variable(STAT, "var", (1 - MOMENTUM) * var + MOMENTUM * spread * (count / (count - 1)))
        return now, spread


def reestimate(model: Model, params: Mapping[str, Any], batches: Iterable[dict[str, jax.Array]]) -> Store:
    """Parameters whose running statistics are the plain average of the batches' own, as torch's `update_bn` has it.

    For weights that the statistics did not follow: merged, averaged, or trained with ``batch_norm="frozen"``.

    Args:
      model: a family with running statistics.
      params: its store, adapters in place or not.
      batches: model inputs; batches of equal size count equally, as do unequal ones.

    Raises:
      DataError: there is no batch.
      ConfigError: the model has no running statistics.
    """
    stats = [k for k, s in model.table.items() if s.kind == "stat"]
    if not stats:
        raise ConfigError(f"{model.family} has no running statistics to estimate")
    model = dc.replace(model, numerics=dc.replace(model.numerics, batch_norm="train"))
    # From statistics of zero one update is the momentum times the batch's own; the values in training mode do not see them.
    blank = {**params, **{k: jnp.zeros(model.table[k].shape, jnp.float32) for k in stats}}
    one = jax.jit(lambda store, inputs: model.apply(store, inputs, train=True).mutable)
    total: Store | None = None
    count = 0
    for inputs in batches:
        new = one(blank, inputs)
        total, count = new if total is None else jax.tree.map(jnp.add, total, new), count + 1
    if total is None:
        raise DataError("there is no batch to estimate the running statistics from")
    return {**params, **{k: (total[k] / (MOMENTUM * count)).astype(params[k].dtype) for k in stats}}
