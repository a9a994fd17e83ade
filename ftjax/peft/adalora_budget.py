"""AdaLoRA's budget: how many triplets all updates may keep together, and which (Zhang et al. 2023, arXiv:2303.10512, alg. 1).

I = |w g|;   M <- b1 M + (1 - b1) I;   U <- b2 U + (1 - b2) |I - M|
score of a triplet = (M U)(e) + mean of (M U)(a) + mean of (M U)(b)
budget(t) = target + (start - target) (1 - (t - hold) / (total - settle - hold))^3;   the e of all others are set to 0
loss + orth * mean ||A^T A - I||_F, ||B B^T - I||_F

    tx = allocate(tx, budget, total=hyper["total"], step=step)      # around the optimizer of the whole trainable tree

It stands around the optimizer, since it needs the gradient, the value after the step and all updates at once. The orthogonal
term enters as its gradient, after clipping, and is not part of the reported loss.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Entry = dict[str, jax.Array]
"""The arrays a [(L,) in, r], e [(L,) r] and b [(L,) r, out] of one store key."""


@dc.dataclass(frozen=True)
class Budget:
    """Numbers of the schedule.

    Attributes:
      target: triplets per weight at the end, on average.
      hold: steps before the budget falls.
      settle: last steps, at the final budget.
      every: steps from one choice to the next.
      beta1, beta2: decay of the means of sensitivity and of its uncertainty.
      orth: factor of the orthogonal term.
    """

    target: int
    hold: int
    settle: int
    every: int
    beta1: float
    beta2: float
    orth: float


def scores(mean: Entry, spread: Entry) -> jax.Array:
    """One number per triplet, [(L,) r]."""
    one = {k: mean[k] * spread[k] for k in mean}
    return one["e"] + one["a"].mean(-2) + one["b"].mean(-1)


def triplets(budget: Budget, step: jax.Array, total: jax.Array, start: int, weights: int) -> jax.Array:
    """How many triplets may stay at `step` (float32, whole)."""
    t, end, target = step.astype(jnp.float32), total - budget.settle, float(budget.target * weights)
    share = jnp.clip(1 - (t - budget.hold) / jnp.maximum(end - budget.hold, 1.0), 0.0, 1.0)
    return jnp.where(t <= budget.hold, float(start), jnp.floor((start - target) * share**3 + target))


def unlike(entries: dict[str, Entry]) -> jax.Array:
    """How far A's columns and B's rows are from orthonormal: the mean over all of them of the Frobenius norm."""
    norms = []
    for entry in entries.values():
        a, b = entry["a"], entry["b"]
        for gram in (a.mT @ a, b @ b.mT):
            apart = gram - jnp.eye(gram.shape[-1])
            norms.append(jnp.sqrt(jnp.sum(apart * apart, (-2, -1))).ravel())
    return jnp.concatenate(norms).mean()


def choose(points: dict[str, jax.Array], count: jax.Array) -> dict[str, jax.Array]:
    """Which triplets are among the best `count` of all: booleans of the same shapes. Ties at the border fall."""
    flat = jnp.sort(jnp.concatenate([x.ravel() for x in points.values()]))
    fallen = jnp.clip(flat.size - count.astype(jnp.int32), 0, flat.size)
    border = jnp.where(fallen > 0, flat[jnp.maximum(fallen - 1, 0)], -jnp.inf)
    return {k: x > border for k, x in points.items()}


def allocate(
    tx: optax.GradientTransformation, budget: Budget, *, total: jax.Array, step: jax.Array,
    entries_of: Callable[[Any], dict[str, Any]],
) -> optax.GradientTransformation:  # fmt: skip
    """An optimizer that also keeps the budget.

    Args:
      tx: of the whole trainable tree.
      budget: numbers of the schedule.
      total: steps of the run.
      step: the present one, 0 for the first.
      entries_of: from a tree like the trainable one to its deltas by store key.
    """

    def read(tree: Any) -> dict[str, Entry]:
        return {k: {name: getattr(d, name) for name in "aeb"} for k, d in entries_of(tree).items()}

    def write(tree: Any, entries: dict[str, Entry]) -> Any:
        new = {k: dc.replace(d, **entries[k]) for k, d in entries_of(tree).items()}
        return {**tree, "overlay": {**tree["overlay"], **new}}

    def init(params: Any) -> dict[str, Any]:
        zeros = jax.tree.map(jnp.zeros_like, read(params))
        keep = {k: jnp.ones(x["e"].shape, bool) for k, x in zeros.items()}
        return {"inner": tx.init(params), "mean": zeros, "spread": jax.tree.map(jnp.copy, zeros), "keep": keep}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        old = read(params)
        grads, plain = updates, read(updates)
        pull = jax.grad(unlike)(old)
        whole = jax.tree.map(lambda g, p: g + budget.orth * p, plain, pull)
        updates, inner = tx.update(write(grads, whole), state["inner"], params)
        moved = read(updates)
        new = jax.tree.map(jnp.add, old, moved)
        t = step.astype(jnp.float32)
        seen = t < total - budget.settle
        felt = jax.tree.map(lambda w, g: jnp.abs(w * g), new, whole)
        mean = jax.tree.map(lambda m, i: budget.beta1 * m + (1 - budget.beta1) * i, state["mean"], felt)
        spread = jax.tree.map(
            lambda u, i, m: budget.beta2 * u + (1 - budget.beta2) * jnp.abs(i - m), state["spread"], felt, mean
        )
        mean, spread = (
            jax.tree.map(lambda n, o: jnp.where(seen, n, o), n, state[k])
            for n, k in ((mean, "mean"), (spread, "spread"))
        )
        start, weights = sum(x["e"].size for x in new.values()), sum(x["e"][..., 0].size for x in new.values())
        count = triplets(budget, step, total, start, weights)
        best = choose({k: scores(mean[k], spread[k]) for k in new}, count)
        now = ((t > budget.hold) & seen & (step % budget.every == 0)) | (t == total - budget.settle)
        after = t > total - budget.settle  # the last choice holds
        keep = jax.tree.map(lambda b, k: jnp.where(now, b, k), best, state["keep"])
        for k, entry in moved.items():
            fallen = ~keep[k] & (now | after)
            entry["e"] = jnp.where(fallen, -old[k]["e"], entry["e"])
        return write(updates, moved), {"inner": inner, "mean": mean, "spread": spread, "keep": keep}

    return optax.GradientTransformation(init, update)
