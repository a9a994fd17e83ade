"""Masked language modelling: hidden tokens are predicted from both sides (Devlin et al. 2018, arXiv:1810.04805).

loss = sum over the chosen tokens of -log p(token) / number of chosen tokens; a row has at most `capacity` of them

    objective=MaskedLM(share=0.15, whole_word=True)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.masking import MaskBatch, capacity
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class MaskedLM(Component):
    """Cross entropy on the hidden tokens."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = MaskBatch
    heads: ClassVar[tuple[str, ...]] = ("masked_lm",)

    name: Literal["masked_lm"] = "masked_lm"
    share: float = Field(0.15, gt=0, lt=1, description="Share of the tokens that are chosen.")
    whole_word: bool = Field(False, description="Choose whole words rather than pieces of them.")

    def data_options(self) -> dict[str, Any]:
        """What the data layout must know."""
        return {"share": self.share, "whole_word": self.whole_word}

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Hidden tokens."""
        return HeadSpec("masked_lm")

    def inputs(self, batch: MaskBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return token_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"nll": 1.0}

    def hyper(self) -> dict[str, float]:
        """No further numbers."""
        return {}

    def weights(self, batch: MaskBatch) -> dict[str, jax.Array]:
        """Chosen tokens."""
        return {"nll": self._chosen(batch)[0].sum()}

    def __call__(self, policy: Policy, batch: MaskBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the chosen tokens."""
        output, mutable = policy(self.inputs(batch), mutable)
        # The chosen tokens' hidden values alone meet the vocabulary: its logits are most of a small model's work.
        weights, at = self._chosen(batch)
        token = output.at(at).nll(jnp.take_along_axis(batch.targets, at, axis=1))
        found = {
            "mean_token_accuracy": ((token.correct * weights).sum(), weights.sum()),
            "num_tokens": token_count(batch.segments),
        }
        return LossOutput({"nll": (token.nll * weights).sum()}, mutable, found)

    def _chosen(self, batch: MaskBatch) -> tuple[jax.Array, jax.Array]:
        """(weights, columns) [B, K] of the chosen tokens, filled up with others of weight 0."""
        return jax.lax.top_k(batch.weights, capacity(batch.weights.shape[-1], self.share))

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over tokens say it all."""
        return {}
