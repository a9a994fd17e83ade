"""How the losses of several tasks become one step: as they are, by learned uncertainty, by projection, by balanced norms.

step = sum_k c_k(G) s_k f_k dL_k,   G_jk = <s_j f_j dL_j, s_k f_k dL_k> over shared weights,   f_k the task's weight and share

    objective=MultiTask(tasks=..., weighting=PCGrad())

`Static` s = c = 1; `Uncertainty` s_k = exp(-v_k) / 2 with v_k a learned log-variance (Kendall et al. 2018, arXiv:1705.07115);
`PCGrad` projects conflicting gradients (Yu et al. 2020, arXiv:2001.06782); `GradNorm` learns s so that all tasks pull equally
hard and learn equally fast (Chen et al. 2018, arXiv:1711.02257). All that a method needs of the gradients is their products G,
a matrix of tasks by tasks: every projection is a weighted sum of the same gradients.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from ftjax.registry import register
from ftjax.schema import Component

Numbers = dict[str, Any]


class Weighting(Component):
    """What the step asks of a method; the defaults do nothing. `K` tasks, in the order of the config."""

    apart: ClassVar[bool] = False
    """Whether the gradient of each task is wanted by itself: K of them in memory, one backward pass all together."""

    def start(self, tasks: int) -> Numbers:
        """State before the first step: float32 arrays, saved with the run's."""
        return {}

    def scales(self, state: Numbers) -> jax.Array | None:
        """s [K], factors of the losses in this step; None: no factors, and nothing is added to the program."""
        return None

    def project(self, gram: jax.Array, key: jax.Array) -> jax.Array | None:
        """c [K], what each task's gradient counts in shared weights, from the gradients' products [K, K]; None: 1."""
        return None

    def update(self, state: Numbers, losses: jax.Array, gram: jax.Array | None) -> Numbers:
        """The state after a step.

        Args:
          state: before it.
          losses: L_k [K], without factors.
          gram: products of the gradients, scales included [K, K]; None unless `apart`.
        """
        return state


@register("weighting")
class Static(Weighting):
    """Weights and shares of the config, nothing else: the plain single backward pass."""

    name: Literal["static"] = "static"


@register("weighting")
class Uncertainty(Weighting):
    """Learned log-variances v: sum_k f_k (exp(-v_k) L_k + v_k) / 2, at whose minimum exp(v_k) = L_k."""

    name: Literal["uncertainty"] = "uncertainty"
    rate: float = Field(0.01, gt=0, description="Learning rate (Adam) of the log-variances, which begin at 0.")

    def start(self, tasks: int) -> Numbers:
        """Variance 1 for every task."""
        v = jnp.zeros(tasks, jnp.float32)
        return {"log_variance": v, "opt": _adam(self.rate).init(v)}

    def scales(self, state: Numbers) -> jax.Array:
        """1 / (2 sigma^2)."""
        return 0.5 * jnp.exp(-state["log_variance"])

    def update(self, state: Numbers, losses: jax.Array, gram: jax.Array | None) -> Numbers:
        """One step of Adam down the gradient (1 - exp(-v) L) / 2."""
        v = state["log_variance"]
        v, opt = _descend(self.rate, 0.5 * (1 - jnp.exp(-v) * losses), state["opt"], v)
        return {"log_variance": v, "opt": opt}


@register("weighting")
class PCGrad(Weighting):
    """Of two gradients that point against each other each gives up its part along the other, in random order."""

    apart: ClassVar[bool] = True

    name: Literal["pcgrad"] = "pcgrad"

    def project(self, gram: jax.Array, key: jax.Array) -> jax.Array:
        """Algorithm 1: g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j wherever g_i . g_j < 0, for j in random order; then the sum.

        Each g_i stays a combination a_i of the K gradients, so the products are all that is needed.
        """
        n = gram.shape[0]
        total = jnp.zeros(n, jnp.float32)
        for i in range(n):
            order = jax.random.permutation(jax.random.fold_in(key, i), n)
            a = jnp.zeros(n, jnp.float32).at[i].set(1.0)
            for m in range(n):
                j = order[m]
                product, square = jnp.dot(a, gram[:, j], precision="highest"), gram[j, j]
                part = jnp.where((product < 0) & (j != i), product / jnp.where(square > 0, square, 1.0), 0.0)
                a = a.at[j].add(-part)
            total = total + a
        return total


@register("weighting")
class GradNorm(Weighting):
    """Factors s under which s_k |dL_k| follows mean(s |dL|) r_k^alpha, r_k = how far behind task k is in its training."""

    apart: ClassVar[bool] = True

    name: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(1.5, ge=0, description="How much slower tasks are favoured; 0: all gradients of equal norm.")
    rate: float = Field(0.025, gt=0, description="Learning rate (Adam) of the factors, which begin at 1.")
    smallest: float = Field(1e-3, gt=0, lt=1, description="No factor falls below this.")

    def start(self, tasks: int) -> Numbers:
        """Factor 1 for every task; the first losses are not known yet."""
        s = jnp.ones(tasks, jnp.float32)
        return {"scales": s, "first": jnp.full(tasks, -1.0, jnp.float32), "opt": _adam(self.rate).init(s)}

    def scales(self, state: Numbers) -> jax.Array:
        """s, whose mean is 1."""
        return state["scales"]

    def update(self, state: Numbers, losses: jax.Array, gram: jax.Array | None) -> Numbers:
        """Down the gradient of sum_k |s_k n_k - target_k|, whose target counts as constant; then the mean is made 1 again."""
        assert gram is not None
        s = state["scales"]
        first = jnp.where(state["first"] < 0, losses, state["first"])
        pull = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
        behind = losses / jnp.where(first > 0, first, 1.0)
        behind = behind / jnp.maximum(behind.mean(), 1e-12)
        target = pull.mean() * behind**self.alpha
        s, opt = _descend(self.rate, jnp.sign(pull - target) * pull / s, state["opt"], s)
        s = jnp.maximum(s, self.smallest)
        return {"scales": s / s.mean(), "first": first, "opt": opt}


def _adam(rate: float) -> optax.GradientTransformation:
    return optax.adam(rate)


def _descend(rate: float, grad: jax.Array, opt: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax raises its decay rates to its int32 step count
        change, opt = _adam(rate).update(grad, opt, x)
    return jnp.asarray(optax.apply_updates(x, change)), opt
