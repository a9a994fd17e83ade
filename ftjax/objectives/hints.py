"""Hidden values of a teacher as a further target (FitNets, arXiv:1412.6550; TinyBERT, arXiv:1909.10351; DistilBERT's cosine).

mse:     H = mean over pairs (s, t) and real tokens of |h_s W - h'_t|^2 / D'
cosine:  H = mean over pairs (s, t) and real tokens of 1 - cos(h_s W, h'_t)

    objective=DistillMaskedLM(teacher=..., hidden=1.0)                          # layers evenly spread, the last with the last
    objective=DistillCausalLM(teacher=..., hidden=0.1, hidden_layers=((1, 3), (3, 11)), hidden_distance="cosine")

h_s are the student's hidden values after its layer s, h'_t the teacher's; both count from 0. Where the widths D and D'
differ, W [D, D'] is learned beside the student, one for all pairs as in TinyBERT; it is in the checkpoints and in no export.
Where they agree there is none. Families with one stack of equal blocks over tokens can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.objectives.base import token_count
from ftjax.schema import Component

Pairs = tuple[tuple[int, int], ...]

PROJECTION = "projection"
"""Name of W among the numbers that the objective is given."""


def spread(student: int, teacher: int) -> Pairs:
    """Every layer of a student with the teacher's at the same depth, the last with the last (TinyBERT's uniform mapping).

    Args:
      student: its number of layers.
      teacher: its number of layers.
    """
    return tuple((s, -(-(s + 1) * teacher // student) - 1) for s in range(student))


def squared(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference over the last axis."""
    return jnp.square(student - teacher).mean(-1)


def angle(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """One less the cosine over the last axis; lengths below 1e-8 count as that, as in torch."""
    size = lambda x: jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), 1e-16))  # noqa: E731
    return 1 - (student * teacher).sum(-1) / (size(student) * size(teacher))


DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"mse": squared, "cosine": angle}
"""Distance over the last axis of (student's, teacher's) hidden values."""


def check_pairs(term: str, share: float, pairs: Pairs, student: Any, teacher: Any) -> None:
    """Whether the layers of two models can be compared.

    Args:
      term: name of the field of its coefficient.
      share: the coefficient.
      pairs: of layers.
      student: the model that is trained.
      teacher: the one that it learns from.

    Raises:
      ConfigError: a model whose layers cannot be asked for, or a pair beyond them.
    """
    what = {"hidden": "hidden values", "attention": "attention maps"}[term]
    for model, who in ((student, "student"), (teacher, "teacher")):
        if not getattr(model, "gives_layers", False):
            raise ConfigError(f"objective.{term}={share:g}: the {who}, {model.family}, gives no {what}")
    mine, theirs = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    for s, t in pairs:
        if not (0 <= s < mine and 0 <= t < theirs):
            raise ConfigError(
                f"objective.{term}_layers: ({s}, {t}) is no pair of layers; the student has {mine}, the teacher {theirs}, "
                "both count from 0"
            )


class Hints(Component):
    """The fields and the term; `Distilled` has them too."""

    hidden: float = Field(0.0, ge=0, description="Coefficient of the distance of hidden values; 0: not computed.")
    hidden_layers: Pairs = Field(
        (), description="Pairs of a student's layer and a teacher's, from 0; empty: every layer of the student, evenly."
    )
    hidden_distance: Literal["mse", "cosine"] = Field("mse", description="Distance of two tokens' hidden values.")

    def watched(self) -> dict[str, Any]:
        """What a model is asked for beside its output."""
        return {"layers": True} if self.hidden else {}

    def hint_share(self) -> dict[str, float]:
        """Factor of the term, where there is one."""
        return {"hidden": self.hidden} if self.hidden else {}

    def hint_weight(self, batch: Any) -> dict[str, jax.Array]:
        """Its denominator: tokens that are not padding."""
        return {"hidden": token_count(batch.segments)[0]} if self.hidden else {}

    def hint(self, student: Any, teacher: Any, batch: Any, hyper: dict) -> dict[str, jax.Array]:
        """The term's sum over the real tokens of a batch.

        Args:
          student: its output, with `layers` [L, B, T, D].
          teacher: its output, with `layers` [L', B, T, D'].
          batch: with `segments` [B, T].
          hyper: holds W where the widths differ.
        """
        if not self.hidden:
            return {}
        mine, theirs = student.layers, jax.lax.stop_gradient(teacher.layers)
        real = (batch.segments >= 0).astype(jnp.float32)
        pairs = self.hidden_layers or spread(mine.shape[0], theirs.shape[0])
        total = jnp.float32(0)
        for s, t in pairs:  # few, and of each only two layers are held in float32
            h, known = mine[s].astype(jnp.float32), theirs[t].astype(jnp.float32)
            h = h @ hyper[PROJECTION] if PROJECTION in hyper else h
            total += (DISTANCES[self.hidden_distance](h, known) * real).sum()
        return {"hidden": total / len(pairs)}

    def learned(self, student: Any, teacher: Any, rng: jax.Array) -> dict[str, jax.Array]:
        """What the objective itself learns: W, where the widths differ.

        Args:
          student: the model that is trained.
          teacher: the one that it learns from.
          rng: what W is drawn with; its products have the size of the student's values.

        Raises:
          ConfigError: a model whose layers cannot be asked for, or a pair beyond them.
        """
        if not self.hidden:
            return {}
        check_pairs("hidden", self.hidden, self.hidden_layers, student, teacher)
        D, wide = student.config.hidden_size, teacher.config.hidden_size
        return {} if wide == D else {PROJECTION: jax.random.normal(rng, (D, wide), jnp.float32) * D**-0.5}

    def advise_hints(self) -> Iterator[str]:
        """Settings that have no effect."""
        if self.hidden_layers and not self.hidden:
            yield f"objective.hidden_layers={self.hidden_layers}  without objective.hidden there is no such term"
