"""Averages of the trained weights along a run: EMA, and SWA (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1).

mean <- mean + w (theta - mean);   SWA: w = 1 / n at the n-th snapshot;   EMA: w = (1 - d) / (1 - d^n) at the n-th step

    average = start("ema", trainable)
    average = moved("ema", average, trainable, hyper, step=step, taken=finite)

EMA's w is Adam's correction of the start at zero (arXiv:1412.6980, section 3), written for the corrected mean itself: after n
steps it is  sum_i d^(n-i) theta_i / sum_i d^(n-i), in which the weights before the first step have no part. The mean begins at
the first value taken, whatever it held before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.config import Optim


def numbers(optim: Optim, steps: int) -> dict[str, float]:
    """The numbers of an average, which enter the step as arrays; none where there is no average.

    Args:
      optim: settings.
      steps: of the run.
    """
    if optim.averaging == "ema":
        # The small number is exact in double precision; 1 - float32(0.9999) would be off by 1e-4 of itself.
        return {"ema_rate": 1 - optim.ema}
    return {"swa_start": swa_start(optim, steps), "swa_every": optim.swa_every} if optim.averaging else {}


def swa_start(optim: Optim, steps: int) -> int:
    """The step behind which snapshots are taken: the share `swa_from` of the run, rounded down."""
    return int(optim.swa_from * steps + 1e-9)


def start(kind: str, trainable: Any) -> dict[str, Any]:
    """Before the first step: no value taken; empty where `kind` is."""
    return {"count": jnp.zeros((), jnp.int32), "mean": jax.tree.map(jnp.copy, trainable)} if kind else {}


def moved(
    kind: str, average: dict[str, Any], trainable: Any, hyper: dict[str, Any], *, step: jax.Array, taken: jax.Array
) -> dict[str, Any]:
    """The average after a step.

    Args:
      kind: "ema", "swa" or empty.
      average: before the step.
      trainable: the weights after it.
      hyper: has `numbers`.
      step: scalar int32, the steps taken, this one included.
      taken: whether the step counts; one that was skipped does not enter the average.
    """
    if not kind:
        return average
    count = average["count"] + 1
    n = count.astype(jnp.float32)
    if kind == "swa":
        since = step.astype(jnp.float32) - hyper["swa_start"]
        taken = taken & (since > 0) & (jnp.mod(since, hyper["swa_every"]) == 0)
        share = 1 / n
    else:
        share = hyper["ema_rate"] / -jnp.expm1(n * jnp.log1p(-hyper["ema_rate"]))
    share = jnp.where(count == 1, 1.0, share)  # exactly: mean + (theta - mean) would round

    def one(mean: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(taken, jnp.where(count == 1, new, mean + share * (new - mean)), mean)

    return {"count": jnp.where(taken, count, average["count"]), "mean": jax.tree.map(one, average["mean"], trainable)}
