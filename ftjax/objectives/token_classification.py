"""Token classification: a class for each word, e.g. named entities (Tjong Kim Sang & De Meulder 2003, arXiv:cs/0306050).

loss = sum_t - sum_c y_tc log softmax(z_t)_c / number of labelled tokens

    objective=TokenClassification(names=("O", "B-PER", "I-PER"))

Only the first piece of a word has a label (see `ftjax.data.tags`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ftjax.data.tags import TagBatch
from ftjax.evals.entities import entity_scores, is_iob2
from ftjax.evals.labels import confusion, macro_f1
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.objectives.classification import smoothed
from ftjax.registry import register
from ftjax.schema import Component


def tag_loss(policy: Policy, batch: TagBatch, mutable: Any, smoothing: jax.Array | float = 0.0) -> LossOutput:
    """Cross entropy summed over the labelled tokens; `rows` has what was predicted [B, T]."""
    output, mutable = policy(token_inputs(batch), mutable)
    predicted = output.logits.argmax(-1)
    total = batch.weights.sum()
    found = {
        "accuracy": (jnp.where(predicted == batch.labels, batch.weights, 0.0).sum(), total),
        "num_tokens": token_count(batch.segments),
    }
    each = smoothed(output.logits, batch.labels, smoothing)
    rows = {"predicted": predicted, "labels": batch.labels, "weights": batch.weights}
    return LossOutput({"cross_entropy": jnp.where(batch.weights > 0, each, 0.0).sum()}, mutable, found, rows)


@register("objective")
class TokenClassification(Component):
    """Cross entropy over the classes of each labelled token."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = TagBatch
    heads: ClassVar[tuple[str, ...]] = ("token_classification",)

    name: Literal["token_classification"] = "token_classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread evenly over the classes.")
    names: tuple[str, ...] = Field(
        (), description="Names of the classes, where the data have numbers; empty: what the training rows have."
    )

    def data_options(self) -> dict[str, Any]:
        """Names that the data lack."""
        return {"names": self.names} if self.names else {}

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """A class of the data per output."""
        return HeadSpec("token_classification", labels)

    def inputs(self, batch: TagBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return token_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"cross_entropy": 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"label_smoothing": self.label_smoothing}

    def weights(self, batch: TagBatch) -> dict[str, jax.Array]:
        """Labelled tokens."""
        return {"cross_entropy": batch.weights.sum()}

    def __call__(self, policy: Policy, batch: TagBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the labelled tokens."""
        return tag_loss(policy, batch, mutable, hyper["label_smoothing"])

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Nothing without the names of the classes; see `examine`."""
        return {}

    def examine(self, rows: dict[str, Any], examples: Any) -> dict[str, float]:
        """Metrics of the held-out set: of whole entities where the classes are B-x, I-x, O; else macro-F1 over the classes."""
        names, real = examples.names, rows["weights"] > 0
        true, said = rows["labels"], rows["predicted"]
        if not real.any():
            return {}
        if not is_iob2(names):
            return {"macro_f1": macro_f1(confusion(said[real], true[real], len(names)))}
        word = np.asarray(names)
        sides = ([word[x[r]].tolist() for x, r in zip(side, real, strict=True)] for side in (true, said))
        return entity_scores(*sides)
