"""Sequence to sequence: the answer's tokens from the source and the answer so far (Sutskever et al. 2014, arXiv:1409.3215).

loss = sum_t nll_t / number of answer tokens; the decoder reads the answer shifted right behind a start token

    objective=Seq2Seq(label_smoothing=0.1)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
from pydantic import Field

from ftjax.data.seq2seq import SeqBatch
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class Seq2Seq(Component):
    """Cross entropy on the answer's tokens."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = SeqBatch
    heads: ClassVar[tuple[str, ...]] = ("seq2seq_lm",)

    name: Literal["seq2seq"] = "seq2seq"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over the vocabulary."
    )

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Tokens of the answer."""
        return HeadSpec("seq2seq_lm")

    def inputs(self, batch: SeqBatch) -> dict[str, jax.Array]:
        """The source, and the answer that the model shifts."""
        return token_inputs(batch) | {"labels": batch.labels}

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"nll": 1.0}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}

    def weights(self, batch: SeqBatch) -> dict[str, jax.Array]:
        """Tokens of the answers."""
        return {"nll": batch.weights.sum()}

    def __call__(self, policy: Policy, batch: SeqBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum of the negative log-likelihoods."""
        output, mutable = policy(self.inputs(batch), mutable)
        token = output.nll(batch.labels, smoothing=hyper.get("label_smoothing", 0.0))
        total, (read, one) = batch.weights.sum(), token_count(batch.segments)
        found = {
            "mean_token_accuracy": ((token.correct * batch.weights).sum(), total),
            "num_tokens": (total + read, one),
        }
        return LossOutput({"nll": (token.nll * batch.weights).sum()}, mutable, found)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over tokens say it all."""
        return {}
