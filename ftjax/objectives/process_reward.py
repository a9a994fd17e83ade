"""Process reward modelling: whether each step of an answer is right (Uesato et al. 2022, arXiv:2211.14275).

loss = sum over steps of - log softmax(z_end of step)_label / number of steps

    objective=ProcessReward(step_separator="\\n\\n")

The head is a token classification with two labels, read at the end of each step, as TRL saves it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
from pydantic import Field

from ftjax.data.steps import RIGHT, WRONG
from ftjax.data.tags import TagBatch
from ftjax.evals.labels import confusion, macro_f1
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_inputs
from ftjax.objectives.token_classification import tag_loss
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class ProcessReward(Component):
    """Cross entropy of right and wrong at the end of each step."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = TagBatch
    rows: ClassVar[str] = "steps"
    heads: ClassVar[tuple[str, ...]] = ("token_classification",)

    name: Literal["process_reward"] = "process_reward"
    step_separator: str = Field("\n", description="Text behind every step; its last token carries the label.")
    last_step_only: bool = Field(False, description="Train on the label of the last step only (outcome supervision).")

    def data_options(self) -> dict[str, Any]:
        """How steps are put together."""
        return {"separator": self.step_separator, "last_only": self.last_step_only}

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Wrong, right."""
        return HeadSpec("token_classification", (WRONG, RIGHT))

    def inputs(self, batch: TagBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return token_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """One term."""
        return {"cross_entropy": 1.0}

    def hyper(self) -> dict[str, float]:
        """No further numbers."""
        return {}

    def weights(self, batch: TagBatch) -> dict[str, jax.Array]:
        """Steps."""
        return {"cross_entropy": batch.weights.sum()}

    def __call__(self, policy: Policy, batch: TagBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sum over the steps."""
        return tag_loss(policy, batch, mutable)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """macro-F1 over the steps, and the share of answers whose every step is judged rightly."""
        real = rows["weights"] > 0
        said, true = rows["predicted"], rows["labels"]
        if not real.any():
            return {}
        whole = ((said == true) | ~real).all(1)[real.any(1)]
        return {"macro_f1": macro_f1(confusion(said[real], true[real], 2)), "answer_accuracy": float(whole.mean())}
