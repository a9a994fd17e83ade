"""Direct preference optimisation and its kin (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

loss = -log sigmoid(beta * ((log pi - log ref)(chosen) - (log pi - log ref)(rejected)))

    objective=DPO(beta=0.1)
    objective=DPO(loss=("sigmoid", "sft"), loss_weights=(1.0, 0.2))
    objective=DPO(precompute=True)                  # the reference runs once, before training

The reference is the same base with the overlay as it was before the first step: nothing of it is held twice. The losses
are those of TRL's DPOTrainer, by its names; which combine, each with its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from ftjax.data.pairs import PairBatch
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy
from ftjax.objectives.preference import (
    PRECOMPUTE,
    Answers,
    alone,
    answer_mask,
    answers,
    pair_inputs,
    reference_log_p,
    reward_metrics,
)  # fmt: skip
from ftjax.registry import register
from ftjax.schema import Component

LossName = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft"
]  # fmt: skip


@struct.dataclass
class Terms:
    """What a loss is made of, all [B] but `lengths` [B, 2].

    Attributes:
      good, bad: log ratios of policy and reference.
      delta: difference of the scores, which are the log ratios for the reverse KL divergence.
      scores: both scores [B, 2].
      policy, reference: chosen minus rejected log-probabilities.
      lengths: tokens of the answers.
      beta, smoothing, tau: scalars.
    """

    good: jax.Array
    bad: jax.Array
    delta: jax.Array
    scores: jax.Array
    policy: jax.Array
    reference: jax.Array
    lengths: jax.Array
    beta: jax.Array
    smoothing: jax.Array
    tau: jax.Array


def _log_sigmoid(x: jax.Array) -> jax.Array:
    return -jax.nn.softplus(-x)


def _smoothed(x: jax.Array, e: jax.Array) -> jax.Array:
    return -(1 - e) * _log_sigmoid(x) - e * _log_sigmoid(-x)


def _ipo(t: Terms) -> jax.Array:
    """(mean score difference - 1 / (2 beta))^2 (arXiv:2310.12036, eq. 17), per token as its authors advise."""
    good, bad = jnp.moveaxis(t.scores / t.lengths, -1, 0)
    return (good - bad - 1 / (2 * t.beta)) ** 2


def _sigmoid_norm(t: Terms) -> jax.Array:
    good, bad = jnp.moveaxis(t.scores / t.lengths, -1, 0)
    return -_log_sigmoid(t.beta * (good - bad))


def _exo_pair(t: Terms) -> jax.Array:
    """KL from the policy's choice to the smoothed label (arXiv:2402.00856, eq. 16)."""
    x = t.beta * t.delta
    good, bad = jax.nn.sigmoid(x), jax.nn.sigmoid(-x)
    return good * (_log_sigmoid(x) - jnp.log1p(-t.smoothing)) + bad * (_log_sigmoid(-x) - jnp.log(t.smoothing))


def _nca_pair(t: Terms) -> jax.Array:
    good, bad = t.beta * t.good, t.beta * t.bad
    return -_log_sigmoid(good) - 0.5 * _log_sigmoid(-good) - 0.5 * _log_sigmoid(-bad)


def _robust(t: Terms) -> jax.Array:
    """Unbiased under a share of flipped labels (arXiv:2403.00409)."""
    x = t.beta * t.delta
    return (-(1 - t.smoothing) * _log_sigmoid(x) + t.smoothing * _log_sigmoid(-x)) / (1 - 2 * t.smoothing)


def _sppo_hard(t: Terms) -> jax.Array:
    return (t.good - 0.5 / t.beta) ** 2 + (t.bad + 0.5 / t.beta) ** 2


def _discopop(t: Terms) -> jax.Array:
    x = t.beta * t.delta
    share = jax.nn.sigmoid(x / t.tau)
    return -_log_sigmoid(x) * (1 - share) + jnp.exp(-x) * share


LOSSES: dict[str, Callable[[Terms], jax.Array]] = {
    "sigmoid": lambda t: -_log_sigmoid(t.beta * t.delta),
    "hinge": lambda t: jax.nn.relu(1 - t.beta * t.delta),
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda t: -_log_sigmoid(t.beta * t.good) - _log_sigmoid(-t.beta * t.bad),
    "sppo_hard": _sppo_hard,
    "aot": lambda t: _smoothed(t.beta * (jnp.sort(t.policy) - jnp.sort(t.reference)), t.smoothing),
    "aot_unpaired": lambda t: _smoothed(t.beta * (jnp.sort(t.good) - jnp.sort(t.bad)), t.smoothing),
    "apo_zero": lambda t: 1 - jax.nn.sigmoid(t.beta * t.good) + jax.nn.sigmoid(t.beta * t.bad),
    "apo_down": lambda t: jax.nn.sigmoid(t.beta * t.good) + 1 - jax.nn.sigmoid(t.beta * (t.good - t.bad)),
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
"""Loss of each pair [B] by TRL's names; ``sft`` is a loss of tokens and handled apart."""


@register("objective")
class DPO(Component):
    """Preference loss on pairs against the frozen starting point."""

    batch: ClassVar[type] = PairBatch
    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)
    usual_lr: ClassVar[tuple[float, float]] = (1e-7, 1e-3)

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="Strength of the tie to the reference.")
    loss: tuple[LossName, ...] = Field(("sigmoid",), min_length=1, description="Loss types, as TRL names them.")
    loss_weights: tuple[float, ...] = Field((), description="Weight of each loss type; empty: all 1.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability of a flipped label (robust, exo_pair, aot)."
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="Divergence from the reference that turns log ratios into scores (arXiv:2309.16240)."
    )
    alpha: float = Field(0.5, description="alpha_divergence: its alpha; 1 is the reverse KL.")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411)."
    )
    discopop_tau: float = Field(0.05, gt=0, description="discopop: temperature of its mixture.")
    precompute: bool = Field(False, description=PRECOMPUTE)

    @property
    def needs_reference(self) -> bool:
        """Whether the step runs the reference."""
        return not self.precompute

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Next tokens."""
        return HeadSpec("causal_lm")

    def inputs(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Both answers of every pair."""
        return pair_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """Weight of each loss type."""
        return dict(zip(self.loss, self.loss_weights or (1.0,) * len(self.loss), strict=True))

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"beta": self.beta, "smoothing": self.label_smoothing, "tau": self.discopop_tau}

    def weights(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Pairs, or for ``sft`` the chosen answers' tokens."""
        tokens = (answer_mask(batch)[:, 0] * batch.rows[:, None]).sum()
        return {name: tokens if name == "sft" else batch.rows.sum() for name in self.loss}

    def __call__(self, policy: Policy, batch: PairBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the pairs."""
        inputs = pair_inputs(batch)
        output, mutable = policy(inputs, mutable)
        mine = answers(output, batch)
        terms = self.terms(mine, reference_log_p(self, batch, reference, inputs), hyper)
        sums = {name: (LOSSES[name](terms) * batch.rows).sum() for name in self.loss if name != "sft"}
        if "sft" in self.loss:
            sums["sft"] = -(mine.token[:, 0] * batch.rows[:, None]).sum()
        rewards = hyper["beta"] * jnp.stack([terms.good, terms.bad], -1)
        return LossOutput(sums, mutable, reward_metrics(rewards, self.log_p(mine), mine, batch))

    def terms(self, mine: Answers, ref: jax.Array, hyper: dict[str, jax.Array]) -> Terms:
        """What the losses are made of, from the policy's answers and the reference's log-probabilities [B, 2]."""
        own = self.log_p(mine)
        ratios = own - ref
        scores = self.scores(ratios)
        return Terms(
            good=ratios[:, 0], bad=ratios[:, 1], delta=scores[:, 0] - scores[:, 1], scores=scores,
            policy=own[:, 0] - own[:, 1], reference=ref[:, 0] - ref[:, 1], lengths=mine.lengths,
            beta=hyper["beta"], smoothing=hyper["smoothing"], tau=hyper["tau"],
        )  # fmt: skip

    def log_p(self, a: Answers) -> jax.Array:
        """log pi of both answers [B, 2]; with `ld_alpha` the tokens beyond the shorter one's length count less."""
        if self.ld_alpha is None:
            return a.sums
        place = jnp.cumsum(a.mask, -1)
        shared = place <= a.mask.sum(-1).min(1)[:, None, None]
        return (a.token * jnp.where(shared, 1.0, self.ld_alpha)).sum(-1)

    def scores(self, ratios: jax.Array) -> jax.Array:
        """f'(pi / ref) of the divergence, from log ratios."""
        if self.f_divergence == "forward_kl":
            return 1 - jnp.exp(-ratios)
        if self.f_divergence == "js_divergence":
            return math.log(2) + _log_sigmoid(ratios)
        power = self.alpha - 1
        if self.f_divergence == "alpha_divergence" and abs(power) > 1e-6:
            return (jnp.exp(jnp.minimum(power * ratios, 80.0)) - 1) / power
        return ratios

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over pairs say it all."""
        return {}

    def check(self, run: Any) -> Iterable[str]:
        """Loss types and their weights fit each other."""
        if self.loss_weights and len(self.loss_weights) != len(self.loss):
            yield (
                f"objective.loss_weights={self.loss_weights}  one number per loss type is needed; "
                f"there are {len(self.loss)}: {', '.join(self.loss)}"
            )
        yield from alone(self, run)
        if "exo_pair" in self.loss and self.label_smoothing == 0:
            yield "objective.label_smoothing=0.0  exo_pair takes its logarithm; use a value above 0, e.g. 1e-3"
