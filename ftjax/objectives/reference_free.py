"""Preference losses without a reference: ORPO, CPO, SimPO.

ORPO (arXiv:2403.07691): nll(prompt and chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds of mean log p
CPO (arXiv:2401.08417):  -log sigmoid(beta (log pi(chosen) - log pi(rejected))) + alpha nll(chosen)
SimPO (arXiv:2405.14734): -log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma)

    objective=SimPO(beta=2.0, gamma=0.5)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.pairs import PairBatch
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy
from ftjax.objectives.preference import Answers, answer_mask, answers, flat, pair_inputs, reward_metrics
from ftjax.registry import register
from ftjax.schema import Component


class PairObjective(Component):
    """What the three have in common."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = PairBatch
    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)
    usual_lr: ClassVar[tuple[float, float]] = (1e-7, 1e-3)

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Next tokens."""
        return HeadSpec("causal_lm")

    def inputs(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Both answers of every pair."""
        return pair_inputs(batch)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over pairs say it all."""
        return {}

    def pair_loss(self, mine: Answers, hyper: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(loss of each pair [B], log-probabilities that count as rewards [B, 2])."""
        raise NotImplementedError

    def imitation(self, mine: Answers) -> jax.Array:
        """Negative log-likelihood of the chosen answers, summed over the tokens that count [B]."""
        return -mine.token[:, 0].sum(-1)

    def __call__(self, policy: Policy, batch: PairBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the pairs."""
        output, mutable = policy(pair_inputs(batch), mutable)
        mine = answers(output, batch)
        each, log_p = self.pair_loss(mine, hyper)
        pair, *rest = self.coefficients()  # type: ignore[attr-defined]
        sums = {pair: (each * batch.rows).sum()} | {k: (self.imitation(mine) * batch.rows).sum() for k in rest}
        return LossOutput(sums, mutable, reward_metrics(hyper["beta"] * log_p, log_p, mine, batch))


@register("objective")
class ORPO(PairObjective):
    """Odds ratio of the mean probabilities, beside the likelihood of prompt and chosen answer."""

    name: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="Weight of the odds ratio.")

    def coefficients(self) -> dict[str, float]:
        """Odds ratio and likelihood."""
        return {"odds_ratio": 1.0, "nll_chosen": 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"beta": self.beta}

    def weights(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Pairs, and all real tokens of the chosen rows but the first."""
        rows = flat(batch)
        real = ((rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] >= 0)).sum(-1)
        chosen = real.reshape(-1, 2)[:, 0].astype(jnp.float32)
        return {"odds_ratio": batch.rows.sum(), "nll_chosen": (chosen * batch.rows).sum()}

    def imitation(self, mine: Answers) -> jax.Array:
        """Prompt and answer."""
        return -mine.context[:, 0].sum(-1)

    def pair_loss(self, mine: Answers, hyper: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """-beta log sigmoid of the log odds ratio."""
        mean = mine.sums / mine.lengths
        log_odds = mean - jnp.log(-jnp.expm1(mean))
        return hyper["beta"] * jax.nn.softplus(log_odds[:, 1] - log_odds[:, 0]), mean


@register("objective")
class CPO(PairObjective):
    """DPO with a uniform reference, beside the likelihood of the chosen answer."""

    name: Literal["cpo"] = "cpo"
    beta: float = Field(0.1, gt=0, description="Temperature of the preference.")
    alpha: float = Field(1.0, ge=0, description="Weight of the likelihood of the chosen answer.")
    loss: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="Loss type, as TRL names it.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Probability of a flipped label.")

    def coefficients(self) -> dict[str, float]:
        """Preference and likelihood."""
        return {self.loss: 1.0} | ({"nll_chosen": self.alpha} if self.alpha else {})

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"beta": self.beta, "smoothing": self.label_smoothing}

    def weights(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Pairs, and the chosen answers' tokens."""
        tokens = {"nll_chosen": (answer_mask(batch)[:, 0] * batch.rows[:, None]).sum()} if self.alpha else {}
        return {self.loss: batch.rows.sum()} | tokens

    def pair_loss(self, mine: Answers, hyper: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """See the module; ipo works on mean log-probabilities."""
        log_p = mine.sums / mine.lengths if self.loss == "ipo" else mine.sums
        gap, beta, e = log_p[:, 0] - log_p[:, 1], hyper["beta"], hyper["smoothing"]
        if self.loss == "hinge":
            return jax.nn.relu(1 - beta * gap), log_p
        if self.loss == "ipo":
            return (gap - 1 / (2 * beta)) ** 2, log_p
        return (1 - e) * jax.nn.softplus(-beta * gap) + e * jax.nn.softplus(beta * gap), log_p


@register("objective")
class SimPO(PairObjective):
    """Mean log-probabilities compared with a margin."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="Temperature of the preference.")
    gamma: float = Field(0.5, ge=0, description="Margin, in units of the loss's argument.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Probability of a flipped label.")

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"simpo": 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"beta": self.beta, "gamma": self.gamma, "smoothing": self.label_smoothing}

    def weights(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Pairs."""
        return {"simpo": batch.rows.sum()}

    def pair_loss(self, mine: Answers, hyper: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """-log sigmoid(beta gap - gamma)."""
        mean = mine.sums / mine.lengths
        x, e = hyper["beta"] * (mean[:, 0] - mean[:, 1]) - hyper["gamma"], hyper["smoothing"]
        return (1 - e) * jax.nn.softplus(-x) + e * jax.nn.softplus(x), mean
