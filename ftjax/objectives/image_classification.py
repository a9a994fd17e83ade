"""Image classification: cross entropy over classes, with label smoothing (Szegedy et al. 2016, arXiv:1512.00567).

loss = sum_i [(1 - e) w_y nll_i(y) + e / C sum_c w_c nll_i(c)] / sum_i w_y,   as torch's CrossEntropyLoss with weight w

    objective=ImageClassification(label_smoothing=0.1)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.images import ImageBatch
from ftjax.errors import ConfigError
from ftjax.evals import labels as metrics
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class ImageClassification(Component):
    """Cross entropy over the classes of an image."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = ImageBatch
    heads: ClassVar[tuple[str, ...]] = ("image_classification",)

    name: Literal["image_classification"] = "image_classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread evenly over the classes.")
    class_weights: tuple[float, ...] = Field((), description="Weight of each class in the loss; empty: all 1.")

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """A class of the data per output.

        Raises:
          ConfigError: the class weights are not as many as the classes.
        """
        if self.class_weights and len(self.class_weights) != len(labels):
            raise ConfigError(
                f"objective.class_weights has {len(self.class_weights)} numbers for {len(labels)} classes"
            )
        return HeadSpec("image_classification", labels)

    def inputs(self, batch: ImageBatch) -> dict[str, jax.Array]:
        """Pixels."""
        return {"pixel_values": batch.pixels}

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"cross_entropy": 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"label_smoothing": self.label_smoothing}

    def weights(self, batch: ImageBatch) -> dict[str, jax.Array]:
        """Images, by the weight of their class."""
        of_class = jnp.asarray(self.class_weights, jnp.float32)[batch.labels] if self.class_weights else 1.0
        return {"cross_entropy": (batch.weights * of_class).sum()}

    def __call__(self, policy: Policy, batch: ImageBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the images."""
        output, mutable = policy(self.inputs(batch), mutable)
        z = output.logits
        C = z.shape[-1]
        w_C = jnp.asarray(self.class_weights or (1.0,) * C, jnp.float32)
        smoothing = hyper["label_smoothing"]
        target_BC = (1 - smoothing) * jax.nn.one_hot(batch.labels, C) + smoothing / C
        each = -(target_BC * w_C * jax.nn.log_softmax(z)).sum(-1)
        right = (z.argmax(-1) == batch.labels).astype(jnp.float32)
        found = {"accuracy": ((right * batch.weights).sum(), batch.weights.sum())}
        rows = {"logits": z, "labels": batch.labels, "weights": batch.weights}
        return LossOutput({"cross_entropy": (each * batch.weights).sum()}, mutable, found, rows)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Accuracy, macro-F1, Matthews correlation, calibration."""
        real = rows["weights"] > 0
        return metrics.classification(rows["logits"][real], rows["labels"][real])
