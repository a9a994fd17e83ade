"""Next-token prediction: supervised fine-tuning and continued pre-training, which differ in the data's weights only.

loss = sum_t w_t (nll_t + z lse_t^2) / sum_t w_t over all rows of the step;   lse_t = logsumexp of the logits at t

Token t is predicted from the tokens before it in its example. The second term (z_loss; PaLM, arXiv:2204.02311, section 5)
keeps the softmax's normalizer near 1.

    objective=CausalLM(label_smoothing=0.1, z_loss=1e-4)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.batches import TokenBatch
from ftjax.headspec import HeadSpec
from ftjax.kernels.vocab_loss import TokenNll
from ftjax.objectives.base import LossOutput, Policy, token_inputs
from ftjax.registry import register
from ftjax.rows import prompt_lengths
from ftjax.schema import Component


def shift(batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
    """Targets and their weights at the place that predicts them [B, T]: token t + 1 at place t; the last place has none.

    The first token of an example is never a target, so nothing is predicted across the border of a packed row.
    """
    pad = ((0, 0), (0, 1))
    targets = jnp.pad(batch.tokens[:, 1:], pad)
    same = batch.segments[:, 1:] == batch.segments[:, :-1]
    return targets, jnp.pad(jnp.where(same, batch.weights[:, 1:], 0.0), pad)


def model_inputs(batch: TokenBatch) -> dict[str, jax.Array]:
    """What a policy is called with."""
    return token_inputs(batch) | {"prompt_len": prompt_lengths(batch.segments, batch.weights > 0)}


def z_term(token: TokenNll, weights: jax.Array) -> dict[str, jax.Array]:
    """The weighted sum of squared logsumexps as the loss term "z_loss"; none where they were not asked for."""
    return {} if token.lse is None else {"z_loss": (token.lse**2 * weights).sum()}


@register("objective")
class CausalLM(Component):
    """Next-token cross entropy on the weighted tokens."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = TokenBatch
    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)

    name: Literal["causal_lm"] = "causal_lm"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over the vocabulary."
    )
    z_loss: float = Field(
        0.0, ge=0, description="Coefficient of the mean squared logsumexp of the logits; PaLM uses 1e-4. 0: off."
    )

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Next tokens."""
        return HeadSpec("causal_lm")

    def inputs(self, batch: TokenBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return model_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term, and the z-loss if it is on."""
        return {"nll": 1.0, **({"z_loss": self.z_loss} if self.z_loss else {})}

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}

    def weights(self, batch: TokenBatch) -> dict[str, jax.Array]:
        """Trained tokens."""
        return dict.fromkeys(self.coefficients(), shift(batch)[1].sum())

    def __call__(self, policy: Policy, batch: TokenBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum of the weighted negative log-likelihoods; metrics as TRL names them."""
        output, mutable = policy(model_inputs(batch), mutable)
        targets, weights = shift(batch)
        token = output.nll(targets, smoothing=hyper.get("label_smoothing", 0.0), lse=self.z_loss > 0)
        total = weights.sum()
        trained = (weights > 0).astype(jnp.float32)
        metrics = {"mean_token_accuracy": ((token.correct * trained).sum(), trained.sum())}
        sums = {"nll": (self.each(token) * weights).sum(), **z_term(token, weights)}
        return LossOutput(sums, mutable, metrics | {"num_tokens": (total, jnp.float32(1))})

    def each(self, token: TokenNll) -> jax.Array:
        """The loss of each token [B, T], before its weight."""
        return token.nll

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Sums over tokens say it all."""
        return {}
