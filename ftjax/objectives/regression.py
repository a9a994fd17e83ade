"""Regression: a number per text.

loss = mean over rows of (z - y)^2, |z - y|, or Huber's: d^2 / 2 within delta, delta (|d| - delta / 2) beyond

    objective=Regression(loss="huber", delta=1.0)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.labels import REGRESSION, LabelBatch
from ftjax.evals import labels as metrics
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class Regression(Component):
    """Squared, absolute or Huber error of a number per text."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = LabelBatch
    heads: ClassVar[tuple[str, ...]] = ("sequence_classification",)

    name: Literal["regression"] = "regression"
    loss: Literal["mse", "mae", "huber"] = Field("mse", description="Error that is minimised.")
    delta: float = Field(1.0, gt=0, description="huber: where the square turns into a line.")

    def data_options(self) -> dict[str, Any]:
        """Labels are numbers, whole ones too."""
        return {"wanted": "number"}

    def head(self, labels: tuple[str, ...], problem: str = REGRESSION) -> HeadSpec:
        """One output."""
        return HeadSpec("sequence_classification", ("value",), REGRESSION)

    def inputs(self, batch: LabelBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return token_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {self.loss: 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"delta": self.delta} if self.loss == "huber" else {}

    def weights(self, batch: LabelBatch) -> dict[str, jax.Array]:
        """Rows."""
        return {self.loss: batch.weights.sum()}

    def __call__(self, policy: Policy, batch: LabelBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the rows."""
        output, mutable = policy(token_inputs(batch), mutable)
        z = output.logits[..., 0]
        gap = z - batch.labels.astype(jnp.float32)
        size = jnp.abs(gap)
        if self.loss == "mse":
            each = gap * gap
        elif self.loss == "mae":
            each = size
        else:
            delta = hyper["delta"]
            each = jnp.where(size <= delta, 0.5 * gap * gap, delta * (size - 0.5 * delta))
        found = {
            "mae": ((size * batch.weights).sum(), batch.weights.sum()),
            "num_tokens": token_count(batch.segments),
        }
        rows = {"predictions": z, "labels": batch.labels, "weights": batch.weights}
        return LossOutput({self.loss: (each * batch.weights).sum()}, mutable, found, rows)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Pearson, Spearman, errors."""
        real = rows["weights"] > 0
        return metrics.regression(rows["predictions"][real], rows["labels"][real])
