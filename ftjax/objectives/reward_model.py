"""Reward modelling: a number per answer whose differences predict the preferences (Bradley & Terry 1952).

loss = -log sigmoid(r(chosen) - r(rejected) - margin) + c mean (r(chosen) + r(rejected))^2

    objective=RewardModel(centre=0.01)

The head is a sequence classification with one label, read at the last real token, as TRL saves it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ftjax.data.pairs import PairBatch
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count
from ftjax.objectives.preference import pair_inputs
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class RewardModel(Component):
    """Bradley-Terry on pairs; a column ``margin`` raises what the chosen answer must lead by."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = PairBatch
    heads: ClassVar[tuple[str, ...]] = ("sequence_classification",)

    name: Literal["reward_model"] = "reward_model"
    centre: float = Field(
        0.0, ge=0, description="Weight of the square of the rewards' sum, which keeps them around 0 (arXiv:2312.09244)."
    )

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """One number."""
        return HeadSpec("sequence_classification", ("reward",), "regression")

    def inputs(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Both answers of every pair."""
        return pair_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """Preference, and centring when it is on."""
        return {"bradley_terry": 1.0} | ({"centre": self.centre} if self.centre else {})

    def hyper(self) -> dict[str, float]:
        """No further numbers."""
        return {}

    def weights(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Pairs."""
        return {name: batch.rows.sum() for name in self.coefficients()}

    def __call__(self, policy: Policy, batch: PairBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the pairs; metrics by TRL's names."""
        output, mutable = policy(pair_inputs(batch), mutable)
        rewards = output.logits.reshape(-1, 2)
        good, bad, n = rewards[:, 0], rewards[:, 1], batch.rows
        sums = {"bradley_terry": (jax.nn.softplus(bad - good + batch.labels) * n).sum()}
        if self.centre:
            sums["centre"] = ((good + bad) ** 2 * n).sum()
        found = {
            "accuracy": ((good > bad).astype(jnp.float32) * n, n), "margin": ((good - bad) * n, n),
            "mean_reward": ((good + bad) / 2 * n, n),
        }  # fmt: skip
        found = {k: (a.sum(), b.sum()) for k, (a, b) in found.items()}
        found["num_tokens"] = token_count(batch.segments)
        return LossOutput(sums, mutable, found, {"rewards": rewards, "weights": n})

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Range of the rewards over the held-out pairs."""
        rewards = rows["rewards"][rows["weights"] > 0]
        return {"min_reward": float(np.min(rewards)), "max_reward": float(np.max(rewards))} if rewards.size else {}
