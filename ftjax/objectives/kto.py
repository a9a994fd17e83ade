"""KTO: learning from single answers that are good or bad (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7-8).

good: w+ (1 - sigmoid(beta (r - z))),   bad: w- (1 - sigmoid(beta (z - r))),   r = log pi - log ref
z = max(0, mean of r over prompts with another row's answer), not differentiated

    objective=KTO(beta=0.1)
    objective=KTO(beta=0.1, precompute=True)        # the reference runs once, before training
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.pairs import PairBatch
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count
from ftjax.objectives.preference import PRECOMPUTE, Answers, alone, answers, pair_inputs, reference_log_p
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class KTO(Component):
    """Loss on judged single answers. z is that of a micro-batch, as in TRL that of a device's batch."""

    batch: ClassVar[type] = PairBatch
    rows: ClassVar[str] = "judged"
    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)
    usual_lr: ClassVar[tuple[float, float]] = (1e-7, 1e-3)

    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="Strength of the tie to the reference.")
    loss: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="Loss type, as TRL names it.")
    good: float = Field(1.0, ge=0, description="Weight of good answers.")
    bad: float = Field(1.0, ge=0, description="Weight of bad answers.")
    precompute: bool = Field(False, description=PRECOMPUTE)

    @property
    def needs_reference(self) -> bool:
        """Whether the step runs the reference."""
        return not self.precompute

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Next tokens."""
        return HeadSpec("causal_lm")

    def inputs(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Each answer, and its prompt with another one."""
        return pair_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {self.loss: 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"beta": self.beta, "good": self.good, "bad": self.bad}

    def weights(self, batch: PairBatch) -> dict[str, jax.Array]:
        """Rows."""
        return {self.loss: batch.rows.sum()}

    def __call__(self, policy: Policy, batch: PairBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the rows."""
        inputs = pair_inputs(batch)
        output, mutable = policy(inputs, mutable)
        mine = answers(output, batch)
        ratios = mine.sums - reference_log_p(self, batch, reference, inputs)
        r, n, beta = ratios[:, 0], batch.rows, hyper["beta"]
        z = (ratios[:, 1] * n).sum() / jnp.maximum(n.sum(), 1.0)
        z = jax.lax.stop_gradient(jnp.maximum(z, 0.0)) if self.loss == "kto" else jnp.float32(0)
        liked = batch.labels > 0.5
        if self.loss == "kto":
            each = jnp.where(liked, 1 - jax.nn.sigmoid(beta * (r - z)), 1 - jax.nn.sigmoid(beta * (z - r)))
        else:
            each = jnp.where(liked, 1 - jax.nn.sigmoid(beta * r), jax.nn.sigmoid(beta * r))
        each = each * jnp.where(liked, hyper["good"], hyper["bad"])
        up, down = jnp.where(liked, n, 0.0), jnp.where(liked, 0.0, n)
        log_p = mine.sums[:, 0]
        found = {
            "rewards/chosen": ((beta * r * up).sum(), up.sum()), "rewards/rejected": ((beta * r * down).sum(), down.sum()),
            "logps/chosen": ((log_p * up).sum(), up.sum()), "logps/rejected": ((log_p * down).sum(), down.sum()),
            "kl": (z, jnp.float32(1)),
            "num_tokens": token_count(batch.segments[:, 0]),
        }  # fmt: skip
        return LossOutput({self.loss: (each * n).sum()}, mutable, found)

    def log_p(self, a: Answers) -> jax.Array:
        """log pi of both answers [B, 2]."""
        return a.sums

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over rows say it all."""
        return {}

    def check(self, run: Any) -> Iterable[str]:
        """Nothing but where the reference's pass stands."""
        return alone(self, run)
