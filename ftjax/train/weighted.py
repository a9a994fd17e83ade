"""The step's side of several tasks: products of their gradients, and the weighting's state (`ftjax.objectives.weighting`).

grads, gram = combined(weighting, grads, rng)         # [K, ...] leaves -> [...] leaves
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.tree import path_of

OWN = ("base/head/", "base/heads/")
"""Paths of weights that belong to one task: their gradients are added up as they are."""


def combined(weighting: Any, grads: Any, rng: jax.Array) -> tuple[Any, jax.Array]:
    """One gradient of those of K tasks, and their products over the shared weights.

    Args:
      weighting: says what each gradient counts.
      grads: [K, ...] leaves.
      rng: the step's key.

    Returns:
      ([...] leaves, [K, K] float32)
    """
    shared = [x for p, x in jax.tree_util.tree_flatten_with_path(grads)[0] if not path_of(p).startswith(OWN)]
    gram = jnp.stack([_products(x) for x in shared]).sum(0) if shared else _nothing(grads)
    counts = weighting.project(gram, rng)

    def add(path: Any, x: jax.Array) -> jax.Array:
        if counts is None or path_of(path).startswith(OWN):
            return x.sum(0)
        return jnp.tensordot(counts.astype(x.dtype), x, axes=1, precision="highest")

    return jax.tree_util.tree_map_with_path(add, grads), gram


def _products(x: jax.Array) -> jax.Array:
    axes = tuple(range(1, x.ndim))
    return jnp.tensordot(x, x, axes=(axes, axes), precision="highest").astype(jnp.float32)


def _nothing(grads: Any) -> jax.Array:
    tasks = jax.tree.leaves(grads)[0].shape[0]
    return jnp.zeros((tasks, tasks), jnp.float32)


def measured(objective: Any, scales: jax.Array | None, gram: jax.Array | None) -> dict[str, Any]:
    """Metrics of a step: the scale of each task, and the share of pairs of tasks whose gradients point against each other."""
    one, found = jnp.float32(1), {}
    if scales is not None:
        found |= {f"{t.name}/scale": (scales[i], one) for i, t in enumerate(objective.trained)}
    if gram is not None and gram.shape[0] > 1:
        n = gram.shape[0]
        found["conflicts"] = ((gram < 0).sum().astype(jnp.float32), jnp.float32(n * (n - 1)))
    return found
