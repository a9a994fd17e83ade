"""Image classification: cross entropy over classes, with label smoothing (Szegedy et al. 2016, arXiv:1512.00567).

loss = sum_i [(1 - e) w_y nll_i(y) + e / C sum_c w_c nll_i(c)] / sum_i w_y,   as torch's CrossEntropyLoss with weight w

With mix-up (Zhang et al. 2018, arXiv:1710.09412) a training picture is s of one and 1 - s of another, and so is its target.

    objective=ImageClassification(label_smoothing=0.1, mixup=0.2)
"""

from __future__ import annotations

from collections.abc import Callable
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
    mixup: float = Field(
        0.0, ge=0, description="a of mix-up: training pictures are mixed in pairs by shares from Beta(a, a). 0: off."
    )

    def data_options(self) -> dict[str, Any]:
        """What the data layout must know."""
        return {"mixup": self.mixup} if self.mixup else {}

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
        if not self.class_weights:
            return {"cross_entropy": batch.weights.sum()}
        w_C = jnp.asarray(self.class_weights, jnp.float32)
        return {"cross_entropy": (batch.weights * mixed(batch, lambda labels: w_C[labels])).sum()}

    def __call__(self, policy: Policy, batch: ImageBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the images."""
        output, mutable = policy(self.inputs(batch), mutable)
        z = output.logits
        C = z.shape[-1]
        w_C = jnp.asarray(self.class_weights or (1.0,) * C, jnp.float32)
        smoothing = hyper["label_smoothing"]
        target_BC = (1 - smoothing) * mixed(batch, lambda labels: jax.nn.one_hot(labels, C)) + smoothing / C
        each = -(target_BC * w_C * jax.nn.log_softmax(z)).sum(-1)
        right = mixed(batch, lambda labels: (z.argmax(-1) == labels).astype(jnp.float32))
        found = {"accuracy": ((right * batch.weights).sum(), batch.weights.sum())}
        rows = {"logits": z, "labels": batch.labels, "weights": batch.weights}
        return LossOutput({"cross_entropy": (each * batch.weights).sum()}, mutable, found, rows)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Accuracy, macro-F1, Matthews correlation, calibration."""
        real = rows["weights"] > 0
        return metrics.classification(rows["logits"][real], rows["labels"][real])


def mixed(batch: ImageBatch, of: Callable[[Any], jax.Array]) -> jax.Array:
    """A number, or several, of each picture's class [B, ...]: of both classes by their shares where pictures are mixed."""
    one = of(batch.labels)
    if batch.others is None or batch.share is None:
        return one
    share = jnp.asarray(batch.share).reshape(-1, *(1,) * (one.ndim - 1))
    return share * one + (1 - share) * of(batch.others)
