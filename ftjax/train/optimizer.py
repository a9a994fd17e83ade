"""The optimizer as a function of arrays: built anew inside the trace, so that its numbers can differ between trials.

    tx = make_tx(spec, groups, hyper, step)          # hyper: {"lr": ..., "weight_decay": ..., ...} scalars, traced
    updates, opt = tx.update(grads, opt, trainable)

The kind of optimizer and the shape of the schedule are static; every number is an array. Schedules follow transformers'
`get_scheduler`: the rate of the first step is that of step 0, which under warm-up is 0.
"""

from __future__ import annotations

import dataclasses as dc
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.config import Optim, Run
from ftjax.train import average

NO_DECAY = "/no_decay"
_STACKED = re.compile(r"\[\d+:\d+\]/")


@dc.dataclass(frozen=True)
class OptimSpec:
    """What about the optimizer is part of the program rather than of its numbers."""

    name: str
    schedule: str
    clip: bool
    method: Any = None
    """A PEFT method that stands around the optimizer (``around(tx, hyper, step)``), or None."""
    average: str = ""
    """The average that is kept of the trained weights: "ema", "swa" or none (see `ftjax.train.average`)."""

    @classmethod
    def of(cls, optim: Optim, peft: Any = None) -> OptimSpec:
        """The static part of a config."""
        method = peft if hasattr(peft, "around") else None
        return cls(optim.name, optim.schedule, optim.clip > 0, method, optim.averaging)


def hyper_of(run: Run) -> dict[str, Any]:
    """The numbers of a run that enter the step as float32 arrays."""
    o = run.optim
    numbers = {
        "lr": o.lr, "weight_decay": o.weight_decay, "b1": o.b1, "b2": o.b2, "eps": o.eps, "clip": o.clip,
        "warmup": o.warmup, "total": run.train.steps, "final": o.final, "decay_share": o.decay_share,
        "lora_plus": o.lora_plus, **average.numbers(o, run.train.steps),
    }  # fmt: skip
    hyper: dict[str, Any] = {k: jnp.float32(v) for k, v in numbers.items()}
    hyper |= {"neftune": jnp.float32(run.train.neftune)} if run.train.neftune else {}
    hyper["coef"] = {k: jnp.float32(v) for k, v in run.objective.coefficients().items()}
    return hyper | {k: jnp.float32(v) for k, v in run.objective.hyper().items()}


def learning_rate(schedule: str, hyper: dict[str, Any], step: jax.Array) -> jax.Array:
    """The rate at `step` (0 for the first): warm-up from 0, then the schedule's shape down to final * lr."""
    t, warm, total, final = step.astype(jnp.float32), hyper["warmup"], hyper["total"], hyper["final"]
    rest = jnp.maximum(total - warm, 1.0)
    progress = jnp.clip((t - warm) / rest, 0.0, 1.0)
    if schedule == "constant":
        shape = jnp.ones(())
    elif schedule == "linear":
        shape = 1 - progress
    elif schedule == "cosine":
        shape = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:  # wsd: warm-up, stable, then a cosine decay (arXiv:2404.06395)
        decay = jnp.maximum(jnp.round(hyper["decay_share"] * total), 1.0)
        into = jnp.clip((t - (total - decay)) / decay, 0.0, 1.0)
        shape = 0.5 * (1 + jnp.cos(jnp.pi * into))
    scale = jnp.ones(()) if schedule == "constant" else final + (1 - final) * shape
    return hyper["lr"] * jnp.where(t < warm, t / jnp.maximum(warm, 1.0), scale)


def _rule(
    spec: OptimSpec, lr: jax.Array, decay: jax.Array | float, hyper: dict[str, Any]
) -> optax.GradientTransformation:
    """One group's update rule, decoupled weight decay included."""
    core = {
        "adamw": lambda: optax.scale_by_adam(hyper["b1"], hyper["b2"], hyper["eps"]),
        "lion": lambda: optax.scale_by_lion(hyper["b1"], hyper["b2"]),
        "sgd": lambda: optax.trace(hyper["b1"]),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.stateless(_clip_rms)),
    }[spec.name]()
    return optax.chain(core, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(lr))


def _clip_rms(updates: Any, _: Any) -> Any:
    """Adafactor's clip: the root mean square of each parameter's update is at most 1, layer by layer within a stack."""

    def one(path: Any, u: jax.Array) -> jax.Array:
        within = tuple(range(1 if _STACKED.search(tree.path_of(path)) else 0, u.ndim))
        return u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(u * u, axis=within, keepdims=True)))

    return jax.tree_util.tree_map_with_path(one, updates)


def make_tx(spec: OptimSpec, groups: Any, hyper: dict[str, Any], step: jax.Array) -> optax.GradientTransformation:
    """The gradient transformation at this step.

    Args:
      spec: static choices.
      groups: label tree over the trainable tree (see `decay_groups`).
      hyper: arrays, from `hyper_of`.
      step: scalar int32, 0 for the first.
    """
    lr = learning_rate(spec.schedule, hyper, step)

    def group(name: str) -> optax.GradientTransformation:
        rate = lr * hyper["lora_plus"] if name.removesuffix(NO_DECAY) == "lora_b" else lr
        return _rule(spec, rate, 0.0 if name.endswith(NO_DECAY) else hyper["weight_decay"], hyper)

    names = sorted(set(jax.tree.leaves(groups)))
    tx = optax.multi_transform({n: group(n) for n in names}, groups)
    return tx if spec.method is None else spec.method.around(tx, hyper, step)


def decay_groups(labels: Any, kinds: Any) -> Any:
    """Marks the leaves without weight decay: biases and norms, as transformers' Trainer does.

    Args:
      labels: group of each trainable leaf.
      kinds: kind of parameter of each leaf (see `ParamSpec.kind`), same structure.
    """
    return jax.tree.map(lambda g, kind: g + NO_DECAY if kind in ("bias", "norm") else g, labels, kinds)


def clip_by_norm(grads: Any, norm: jax.Array, limit: jax.Array) -> Any:
    """torch's `clip_grad_norm_`: scaled by limit / (norm + 1e-6) where that is below 1."""
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
