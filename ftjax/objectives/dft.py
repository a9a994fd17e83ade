"""Dynamic fine-tuning: next-token prediction in which unlikely tokens weigh less (Wu et al. 2025, arXiv:2508.05629).

loss_t = - stop_gradient(p_t) log p_t,   so that a token's gradient is that of its probability, not of its logarithm

    objective=DFT()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ftjax.kernels.vocab_loss import TokenNll
from ftjax.objectives.causal_lm import CausalLM
from ftjax.registry import register


@register("objective")
class DFT(CausalLM):
    """Next-token cross entropy, each token weighted by its own probability."""

    name: Literal["dft"] = "dft"  # type: ignore[assignment]

    def check(self, run: Any) -> Iterator[str]:
        """The weight is a probability only where the target is not smoothed."""
        if self.label_smoothing:
            yield f"objective.label_smoothing={self.label_smoothing:g}  dft weighs tokens by their probability; set it to 0"

    def each(self, token: TokenNll) -> jax.Array:
        """-p log p, with p held fixed."""
        return token.nll * jax.lax.stop_gradient(jnp.exp(-token.nll))
