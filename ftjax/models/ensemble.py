"""Several models as one, for a student to learn from (Hinton et al. 2015, arXiv:1503.02531, section 5).

logits:          z = mean_i z_i                      (the geometric mean of the distributions, at every temperature)
probabilities:   z = log mean_i softmax(z_i)         (the arithmetic mean)

    model, weights = together([(first, first_weights), (second, second_weights)], "logits")
    model.apply(weights, inputs).logits

The weights are one store: those of model i are called ``m<i>_<key>``. The logits of all models exist for one chunk of tokens
at a time, as those of one would: their hidden values lie side by side, and the head takes them apart again.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.models.base import Head, Model, Output
from ftjax.params import Store, Table

Mean = Literal["logits", "probabilities"]


@struct.dataclass
class Heads:
    """The heads of several models over their hidden values side by side; `widths` are those of each."""

    heads: tuple[Head, ...]
    widths: tuple[int, ...] = struct.field(pytree_node=False)
    mean: Mean = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., sum of widths] -> float32 [..., V]."""
        parts = jnp.split(x, [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)], axis=-1)
        each = jnp.stack([head(p).astype(jnp.float32) for head, p in zip(self.heads, parts, strict=True)])
        if self.mean == "logits":
            return each.mean(0)
        return jax.nn.logsumexp(jax.nn.log_softmax(each, axis=-1), axis=0) - jnp.log(jnp.float32(len(each)))


@dc.dataclass(frozen=True)
class Ensemble:
    """Models over one vocabulary, or of one list of labels; what a teacher must have of a `Model`."""

    models: tuple[Model, ...]
    mean: Mean

    @property
    def family(self) -> str:
        """Those of its models."""
        return "+".join(m.family for m in self.models)

    @property
    def head(self) -> Any:
        """That of each of its models."""
        return self.models[0].head

    @property
    def places(self) -> int | None:
        """The fewest positions that one of the models learned; None where positions are computed."""
        found = [p for m in self.models if (p := getattr(m, "places", None)) is not None]
        return min(found, default=None)

    @cached_property
    def table(self) -> Table:
        """Every parameter of every model."""
        return {f"m{i}_{k}": s for i, m in enumerate(self.models) for k, s in m.table.items()}

    def apply(self, params: Store, inputs: dict[str, jax.Array]) -> Output:
        """The output of all; its logits are their mean."""
        outs = []
        for i, model in enumerate(self.models):
            lead = f"m{i}_"
            outs.append(model.apply({k.removeprefix(lead): v for k, v in params.items() if k.startswith(lead)}, inputs))
        heads = Heads(tuple(o.head for o in outs), tuple(o.hidden.shape[-1] for o in outs), self.mean)
        hidden = jnp.concatenate([o.hidden for o in outs], axis=-1)
        return Output(hidden, heads, chunk=outs[0].chunk)  # type: ignore[arg-type]


def together(members: Sequence[tuple[Model, Store]], mean: Mean) -> tuple[Ensemble, Store]:
    """Models and their weights as one.

    Args:
      members: (model, weights).
      mean: of what.
    """
    weights = {f"m{i}_{k}": v for i, (_, store) in enumerate(members) for k, v in store.items()}
    return Ensemble(tuple(m for m, _ in members), mean), weights
