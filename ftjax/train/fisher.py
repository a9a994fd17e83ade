"""Which entries of the weights matter to a run's data: their empirical Fisher information, from its first batches.

F = 1/n sum_{b <= n} (dL_b / dW)^2,   L_b the loss of training batch b before the first step

the diagonal that FISH masks go by (Sung et al. 2021, arXiv:2111.09839, eq. 4), with batches in place of single examples.

    squares = fisher(program, state, frozen, batches, 16, placement)
    overlay = Sparse(choose="fisher").init(key, model.table, base, squares=squares)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ftjax.errors import ConfigError
from ftjax.params import Store, Table, unranged
from ftjax.peft.base import FROZEN
from ftjax.quant.base import Quantized

if TYPE_CHECKING:
    from ftjax.parallel.mesh import Placement
    from ftjax.train.state import Frozen, State
    from ftjax.train.step import Program


def rules_for(method: Any, table: Table, base: Store) -> list[tuple[str, str]]:
    """Labels under which just the weights that a method chooses from have gradients.

    Raises:
      ConfigError: they are quantized.
    """
    wanted = {unranged(k) for k in method.keys(table)}
    keys = [k for k in base if unranged(k) in wanted]
    if packed := next((k for k in keys if isinstance(base[k], Quantized)), None):
        raise ConfigError(
            f"peft.choose=fisher: {packed} is quantized and has no gradient; magnitude and random need none"
        )
    return [*((f"base/{k}", "fisher") for k in keys), ("base/*", FROZEN)]


def fisher(program: Program, state: State, frozen: Frozen, batches: Any, count: int, placement: Placement) -> Store:
    """Mean squared gradient of each trained weight of the base, float32.

    Args:
      program: over the base alone, its weights labelled by `rules_for`.
      state: before the first step.
      frozen: the rest.
      batches: by number of the step, [M, B, ...] leaves.
      count: how many of them.
      placement: shardings.
    """

    def add(total: Store, state: State, frozen: Frozen, batch: Any) -> Store:
        grads = program.gradient(state, frozen, batch)[0]["base"]
        return {k: v + jnp.square(grads[k].astype(jnp.float32)) for k, v in total.items()}

    total = {k: jnp.zeros(v.shape, jnp.float32) for k, v in state.trainable["base"].items() if v is not None}
    states, rest = placement.tree(state), placement.tree(frozen)
    state, frozen = jax.device_put(state, states), jax.device_put(frozen, rest)
    step = jax.jit(add, donate_argnums=0)
    for b in range(count):
        total = step(total, state, frozen, jax.device_put(batches[b], placement.batch(1)))
    return {k: v / count for k, v in total.items()}
