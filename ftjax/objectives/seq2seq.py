"""Sequence to sequence: the answer's tokens from the source and the answer so far (Sutskever et al. 2014, arXiv:1409.3215).

loss = sum_t (nll_t + z lse_t^2) / number of answer tokens; the decoder reads the answer shifted right behind a start token

    objective=Seq2Seq(label_smoothing=0.1, z_loss=1e-4)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
from pydantic import Field

from ftjax.data.seq2seq import SeqBatch
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.objectives.causal_lm import z_term
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
    z_loss: float = Field(
        0.0, ge=0, description="Coefficient of the mean squared logsumexp of the logits; PaLM uses 1e-4. 0: off."
    )

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Tokens of the answer."""
        return HeadSpec("seq2seq_lm")

    def inputs(self, batch: SeqBatch) -> dict[str, jax.Array]:
        """The source, and the answer that the model shifts."""
        return token_inputs(batch) | {"labels": batch.labels}

    def coefficients(self) -> dict[str, float]:
        """One term, and the z-loss if it is on (see `causal_lm`)."""
        return {"nll": 1.0, **({"z_loss": self.z_loss} if self.z_loss else {})}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}

    def weights(self, batch: SeqBatch) -> dict[str, jax.Array]:
        """Tokens of the answers."""
        total: jax.Array = batch.weights.sum()
        return dict.fromkeys(self.coefficients(), total)

    def __call__(self, policy: Policy, batch: SeqBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum of the negative log-likelihoods."""
        output, mutable = policy(self.inputs(batch), mutable)
        token = output.nll(batch.labels, smoothing=hyper.get("label_smoothing", 0.0), lse=self.z_loss > 0)
        total, (read, one) = batch.weights.sum(), token_count(batch.segments)
        found = {
            "mean_token_accuracy": ((token.correct * batch.weights).sum(), total),
            "num_tokens": (total + read, one),
        }
        return LossOutput({"nll": (token.nll * batch.weights).sum(), **z_term(token, batch.weights)}, mutable, found)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over tokens say it all."""
        return {}
