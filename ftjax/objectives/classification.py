"""Sequence classification: one class per text, or several (multi-label).

one class:  loss = - sum_c t_c log softmax(z)_c,  t = (1 - e) onehot(y) + e / C, weighted by class
several:    loss = mean_c BCE(sigmoid(z_c), y_c)

    objective=Classification(label_smoothing=0.1)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.labels import LabelBatch
from ftjax.evals import labels as metrics
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class Classification(Component):
    """Cross entropy over the classes of a text."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = LabelBatch
    heads: ClassVar[tuple[str, ...]] = ("sequence_classification",)

    name: Literal["classification"] = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread evenly over the classes.")
    class_weights: tuple[float, ...] = Field((), description="Weight of each class in the loss; empty: all 1.")

    def data_options(self) -> dict[str, Any]:
        """Labels are classes."""
        return {"wanted": "classes"}

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """A class of the data per output."""
        return HeadSpec("sequence_classification", labels, problem)

    def inputs(self, batch: LabelBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return token_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"cross_entropy": 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"label_smoothing": self.label_smoothing}

    def _row_weights(self, batch: LabelBatch) -> jax.Array:
        if not self.class_weights or batch.labels.ndim > batch.weights.ndim:
            return batch.weights
        return batch.weights * jnp.asarray(self.class_weights, jnp.float32)[batch.labels]

    def weights(self, batch: LabelBatch) -> dict[str, jax.Array]:
        """Rows, by the weight of their class."""
        return {"cross_entropy": self._row_weights(batch).sum()}

    def __call__(self, policy: Policy, batch: LabelBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the rows."""
        output, mutable = policy(token_inputs(batch), mutable)
        z = output.logits
        if batch.labels.ndim == 2:
            each = (jnp.logaddexp(0.0, z) - z * batch.labels).mean(-1)
            right = ((z > 0) == (batch.labels > 0.5)).all(-1)
        else:
            if self.class_weights and len(self.class_weights) != z.shape[-1]:
                raise ValueError(
                    f"objective.class_weights has {len(self.class_weights)} numbers for {z.shape[-1]} classes"
                )
            each = smoothed(z, batch.labels, hyper["label_smoothing"])
            right = z.argmax(-1) == batch.labels
        count = batch.weights.sum()
        found = {
            "accuracy": (jnp.where(right, batch.weights, 0.0).sum(), count),
            "num_tokens": token_count(batch.segments),
        }
        rows = {"logits": z, "labels": batch.labels, "weights": batch.weights}
        return LossOutput({"cross_entropy": (each * self._row_weights(batch)).sum()}, mutable, found, rows)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """accuracy, macro-F1, Matthews, calibration; or their multi-label kin."""
        real = rows["weights"] > 0
        measure = metrics.multi_label if rows["labels"].ndim == 2 else metrics.classification
        return measure(rows["logits"][real], rows["labels"][real])


def smoothed(logits: jax.Array, labels: jax.Array, smoothing: jax.Array | float) -> jax.Array:
    """Cross entropy of each row [B] with label smoothing as torch defines it: (1 - e) nll + e mean nll of all classes."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * picked - smoothing * log_p.mean(-1)
