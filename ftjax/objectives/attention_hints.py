"""A teacher's attention as a target: scores (TinyBERT, arXiv:1909.10351, eq. 7) or distributions (MiniLM, arXiv:2002.10957).

mse:  A = mean over pairs (s, t), heads, real queries q of   mean over keys k that q sees of (a_s[q, k] - a'_t[q, k])^2
kl:   A = mean over pairs (s, t), heads, real queries q of   KL(softmax a'_t[q] || softmax a_s[q])

    objective=DistillMaskedLM(teacher=..., hidden=1.0, attention=1.0)                 # TinyBERT: every layer, evenly spread
    objective=DistillCausalLM(teacher=..., attention=1.0, attention_layers=((3, 11),), attention_distance="kl")       # MiniLM

a are the scores before the softmax, scaled (and capped) as the model does; TinyBERT found them to teach more than the
probabilities. Padding is no query and no key, nor is what a query may not see: TinyBERT's code counts those places as zeros
instead, so that its term shrinks with the padding of a batch. Keys that only one of the models sees (a window) are left out of
both, and so are the virtual ones of a soft prompt or prefix. Heads meet by number, and there must be as many of them. Scores
exist for the layers that are compared and for no others: [pairs, B, heads, T, T] in float32, of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.objectives.base import token_count
from ftjax.objectives.hints import Hints, Pairs, check_pairs, spread

UNSEEN = -1e29
"""Models give lower scores than this to keys that a query does not see."""


def score_distance(student: jax.Array, teacher: jax.Array, seen: jax.Array) -> jax.Array:
    """Mean squared difference of the scores [..., S] that are seen."""
    apart = jnp.where(seen, student - teacher, 0.0)
    return jnp.square(apart).sum(-1) / jnp.maximum(seen.sum(-1).astype(jnp.float32), 1.0)


def distribution_distance(student: jax.Array, teacher: jax.Array, seen: jax.Array) -> jax.Array:
    """KL(teacher || student) of the softmax over the scores [..., S] that are seen."""
    s, t = (jax.nn.log_softmax(jnp.where(seen, x, 2 * UNSEEN), axis=-1) for x in (student, teacher))
    return jnp.where(seen, jnp.exp(t) * (t - s), 0.0).sum(-1)


DISTANCES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "mse": score_distance,
    "kl": distribution_distance,
}
"""Distance of (student's, teacher's) scores of one query, over the keys that both see."""


class AttentionHints(Hints):
    """The fields and the term, beside those of hidden values; `Distilled` has both."""

    attention: float = Field(0.0, ge=0, description="Coefficient of the distance of attention maps; 0: not computed.")
    attention_layers: Pairs = Field(
        (), description="Pairs of a student's layer and a teacher's, from 0; empty: every layer of the student, evenly."
    )
    attention_distance: Literal["mse", "kl"] = Field(
        "mse", description="mse: of scores before the softmax (TinyBERT); kl: of distributions (MiniLM)."
    )

    def watched(self, *, teacher: bool = False) -> dict[str, Any]:
        """What a model is asked for beside its output."""
        named = self._layers(teacher)
        return super().watched() | ({"attentions": named or True} if self.attention else {})

    def _layers(self, teacher: bool) -> tuple[int, ...]:
        """The layers of one model that are named, each once, as the model gives them."""
        return tuple(sorted({pair[teacher] for pair in self.attention_layers}))

    def hint_share(self) -> dict[str, float]:
        """Factors of the terms that there are."""
        return super().hint_share() | ({"attention": self.attention} if self.attention else {})

    def hint_weight(self, batch: Any) -> dict[str, jax.Array]:
        """Their denominators: tokens that are not padding."""
        mine = {"attention": token_count(batch.segments)[0]} if self.attention else {}
        return super().hint_weight(batch) | mine

    def hint(self, student: Any, teacher: Any, batch: Any, hyper: dict) -> dict[str, jax.Array]:
        """The terms' sums over the real tokens of a batch.

        Args:
          student: its output, with `attentions` [P, B, N, T, T] of the layers that `watched` names.
          teacher: its output, likewise.
          batch: with `segments` [B, T].
          hyper: see `Hints.hint`.
        """
        found = super().hint(student, teacher, batch, hyper)
        if not self.attention:
            return found
        mine, theirs = student.attentions, jax.lax.stop_gradient(teacher.attentions)
        real = (batch.segments >= 0).astype(jnp.float32)
        total = jnp.float32(0)
        pairs = self._places(mine.shape[0], theirs.shape[0])
        for s, t in pairs:
            seen = (mine[s] > UNSEEN) & (theirs[t] > UNSEEN)
            each = DISTANCES[self.attention_distance](mine[s], theirs[t], seen)
            total += (each.mean(1) * real).sum()
        return found | {"attention": total / len(pairs)}

    def _places(self, student: int, teacher: int) -> Pairs:
        """Pairs among the maps that the models gave, so many of each."""
        if not self.attention_layers:
            return spread(student, teacher)
        mine, theirs = self._layers(False), self._layers(True)
        return tuple((mine.index(s), theirs.index(t)) for s, t in self.attention_layers)

    def learned(self, student: Any, teacher: Any, rng: jax.Array) -> dict[str, jax.Array]:
        """What the objective itself learns: nothing for attention (see `Hints.learned`).

        Raises:
          ConfigError: a model whose layers cannot be asked for, a pair beyond them, or other numbers of heads.
        """
        if self.attention:
            check_pairs("attention", self.attention, self.attention_layers, student, teacher)
            mine, theirs = (m.config.num_attention_heads for m in (student, teacher))
            if mine != theirs:
                raise ConfigError(
                    f"objective.attention={self.attention:g}: the student has {mine} heads, the teacher {theirs}; maps are "
                    "compared head by head, so there must be as many"
                )
        return super().learned(student, teacher, rng)

    def advise_hints(self) -> Iterator[str]:
        """Settings that have no effect."""
        yield from super().advise_hints()
        if self.attention_layers and not self.attention:
            yield f"objective.attention_layers={self.attention_layers}  without objective.attention there is no such term"
