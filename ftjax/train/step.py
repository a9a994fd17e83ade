"""The one train step: any model, any method, any objective, no names.

    program = Program(model, objective, spec, groups)
    state, metrics = jax.jit(program.train, donate_argnums=0)(state, frozen, batch)

Only the trainable tree is differentiated; gradients of micro-batches are summed with each loss term's denominator taken over
the whole step, so that any split gives the gradient of the large batch. Population training is `jax.vmap` of this step.
"""

from __future__ import annotations

import dataclasses as dc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.objectives.base import LossOutput
from ftjax.peft.base import bind
from ftjax.train import average
from ftjax.train.neftune import noisy
from ftjax.train.optimizer import OptimSpec, clip_by_norm, learning_rate, make_tx
from ftjax.train.state import Frozen, State
from ftjax.train.weighted import combined, measured

Metrics = dict[str, Any]


@dc.dataclass(frozen=True, eq=False)
class Program:
    """The pure functions of a run.

    Attributes:
      model: architecture and numerics.
      objective: the loss.
      optim: static choices of the optimizer.
      groups: optimizer group of each trainable leaf.
      teacher: the model whose weights are `Frozen.teacher`, which the objective gets as its reference; None: no teacher.
    """

    model: Any
    objective: Any
    optim: OptimSpec
    groups: Any
    teacher: Any = None

    def params(self, trainable: Any, state: State, frozen: Frozen, rng: jax.Array | None) -> Any:
        """The bound store of the present policy, but for its running statistics."""
        store = tree.combine(trainable, state.const, frozen.store)
        bound = bind(store["base"], store["overlay"], rng)
        alpha = state.hyper.get("neftune")
        return bound if alpha is None or rng is None else noisy(bound, alpha, rng)

    def output(self, trainable: Any, mutable: Any, state: State, frozen: Frozen, batch: Any, rng: Any) -> LossOutput:
        """The objective on one micro-batch."""
        bound = self.params(trainable, state, frozen, rng)

        def policy(inputs: Any, mutable: Any, task: str = "", **options: Any) -> tuple[Any, Any]:
            out = self._applied(bound | mutable, inputs, task, train=rng is not None, **options)
            return out, mutable | out.mutable

        reference = None
        if self.objective.needs_reference:
            past = tree.combine(frozen.reference, state.const, frozen.store)
            reference = partial(self._applied, bind(past["base"], past["overlay"]) | (frozen.mutable or {}))
        elif self.teacher is not None:
            reference = partial(self.teacher.apply, bind(frozen.teacher, {}))
        hyper = state.hyper | trainable.get("objective", {})  # its numbers, and what it learns itself
        return self.objective(policy, batch, reference=reference, mutable=mutable, hyper=hyper)

    def _applied(self, bound: Any, inputs: Any, task: str = "", **options: Any) -> Any:
        model, seen = self.model.view(task, bound)
        return model.apply(seen, inputs, **options)

    def train(self, state: State, frozen: Frozen, batches: Any) -> tuple[State, Metrics]:
        """One optimizer step.

        Args:
          state: donated by the caller.
          frozen: everything that stays.
          batches: micro-batches, [M, B, ...] leaves.

        Returns:
          The next state and scalars: each loss term and metric as (sum, weight), "grad_norm", "lr", "finite". A step whose
          loss or gradient is not finite changes nothing but the step count.
        """
        return self._update(state, *self.gradient(state, frozen, batches))

    def gradient(self, state: State, frozen: Frozen, batches: Any) -> tuple[Any, ...]:
        """What a step goes by.

        Returns:
          The gradient like `state.trainable`; what changes without one (running statistics, weights of tasks); the loss; each
          term's sum; further metrics; each term's weight.
        """
        weights = jax.tree.map(lambda w: w.sum(0), jax.vmap(self.objective.weights)(batches))
        inverse = {k: jnp.where(w > 0, 1 / jnp.where(w > 0, w, 1), 0.0) for k, w in weights.items()}
        rng = jax.random.fold_in(state.rng, state.step)
        weighting = getattr(self.objective, "weighting", None)  # of several tasks; a plain objective has none
        coef = state.hyper["coef"] if weighting is None else self.objective.scaled(state.hyper["coef"], state.weighting)

        def loss(trainable: Any, mutable: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, LossOutput]:
            out = self.output(trainable, mutable, state, frozen, batch, rng)
            return jnp.stack([coef[k] * v * inverse[k] for k, v in out.sums.items()]).sum(), out

        grad = jax.value_and_grad(loss, has_aux=True)
        apart = weighting is not None and weighting.apart
        grad = self.objective.apart(grad) if apart else grad

        def micro(carry: Any, xs: Any) -> tuple[Any, Any]:
            total, mutable = carry
            i, batch = xs
            (value, out), g = grad(state.trainable, mutable, batch, jax.random.fold_in(rng, i))
            return (jax.tree.map(jnp.add, total, g), out.mutable), (value, out.sums, out.metrics)

        M = jax.tree.leaves(batches)[0].shape[0]
        if M == 1:
            first = jax.tree.map(lambda x: x[0], batches)
            (value, out), grads = grad(state.trainable, state.mutable, first, jax.random.fold_in(rng, 0))
            mutable, sums, extra = out.mutable, out.sums, out.metrics
        else:
            lead = (len(self.objective.trained),) if apart else ()
            zero = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), state.trainable)
            (grads, mutable), stacked = jax.lax.scan(micro, (zero, state.mutable), (jnp.arange(M), batches))
            value, sums, extra = jax.tree.map(lambda x: x.sum(0), stacked)
        learned = state.weighting
        if weighting is not None:
            grads, gram = combined(weighting, grads, rng) if apart else (grads, None)
            losses = self.objective.losses(state.hyper["coef"], {k: v * inverse[k] for k, v in sums.items()})
            extra = extra | measured(self.objective, weighting.scales(learned), gram)
            learned = weighting.update(learned, losses, gram)
        return grads, (mutable, learned), value, sums, extra, weights

    def _update(
        self, state: State, grads: Any, moved: Any, value: Any, sums: Any, extra: Any, weights: Any
    ) -> tuple[State, Metrics]:
        mutable, learned = moved
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        if self.optim.clip:
            grads = clip_by_norm(grads, norm, state.hyper["clip"])
        tx = make_tx(self.optim, self.groups, state.hyper, state.step)
        with jax.numpy_dtype_promotion("standard"):  # optax raises our float32 decay rates to its int32 step count
            updates, opt = tx.update(grads, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        step, trainable = state.step + 1, keep(trainable, state.trainable)
        kind = self.optim.average
        nxt = dc.replace(
            state,
            step=step,
            trainable=trainable,
            average=average.moved(kind, state.average, trainable, state.hyper, step=step, taken=finite),
            opt=keep(opt, state.opt),
            mutable=keep(mutable, state.mutable),
            weighting=keep(learned, state.weighting),
        )
        terms = {k: (v, weights[k]) for k, v in sums.items()}
        lr = learning_rate(self.optim.schedule, state.hyper, state.step)
        return nxt, {"loss": value, "terms": terms, "metrics": extra, "grad_norm": norm, "lr": lr, "finite": finite}

    def evaluate(self, state: State, frozen: Frozen, batch: Any) -> Metrics:
        """Loss terms and metrics of one batch [B, ...] as (sum, weight), without dropout."""
        out = self.output(state.trainable, state.mutable, state, frozen, batch, None)
        weights = self.objective.weights(batch)
        return {"terms": {k: (v, weights[k]) for k, v in out.sums.items()}, "metrics": out.metrics, "rows": out.rows}
