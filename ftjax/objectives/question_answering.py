"""Extractive question answering: where the answer begins and ends in a text (Rajpurkar et al. 2016, arXiv:1606.05250).

loss = (- log softmax(s)_start - log softmax(e)_end) / 2, each averaged over the windows

    objective=QuestionAnswering(doc_stride=64)

The softmax goes over the tokens of a window; padding has no part in it, so that the loss does not depend on it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.batches import PAD_SEGMENT
from ftjax.data.spans import SpanBatch
from ftjax.evals.answers import best_spans, squad
from ftjax.headspec import HeadSpec
from ftjax.objectives.base import LossOutput, Policy, token_count, token_inputs
from ftjax.registry import register
from ftjax.schema import Component


@register("objective")
class QuestionAnswering(Component):
    """Cross entropy of the answer's first and last token."""

    needs_reference: ClassVar[bool] = False
    batch: ClassVar[type] = SpanBatch
    heads: ClassVar[tuple[str, ...]] = ("question_answering",)

    name: Literal["question_answering"] = "question_answering"
    doc_stride: int = Field(128, ge=0, description="Context tokens that neighbouring windows of a long text share.")
    max_answer: int = Field(30, ge=1, description="Tokens of a predicted answer at most.")

    def data_options(self) -> dict[str, Any]:
        """How long contexts are cut."""
        return {"stride": self.doc_stride}

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """Beginning and end."""
        return HeadSpec("question_answering", ("start", "end"))

    def inputs(self, batch: SpanBatch) -> dict[str, jax.Array]:
        """Tokens and where they stand."""
        return token_inputs(batch)

    def coefficients(self) -> dict[str, float]:
        """Beginning and end, half each."""
        return {"start": 0.5, "end": 0.5}

    def hyper(self) -> dict[str, float]:
        """No further numbers."""
        return {}

    def weights(self, batch: SpanBatch) -> dict[str, jax.Array]:
        """Windows whose beginning, or end, is within the window."""
        length = batch.tokens.shape[-1]
        places = {"start": batch.starts, "end": batch.ends}
        return {k: jnp.where(place < length, batch.weights, 0.0).sum() for k, place in places.items()}

    def __call__(self, policy: Policy, batch: SpanBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the windows."""
        output, mutable = policy(self.inputs(batch), mutable)
        logits = jnp.moveaxis(output.logits, -1, 0)
        # a finite number instead of -inf: a row that is all padding would have no softmax
        logits = jnp.where(batch.segments == PAD_SEGMENT, -1e30, logits)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        length = logits.shape[-1]
        sums, right = {}, batch.weights > 0
        for name, side, place in (("start", 0, batch.starts), ("end", 1, batch.ends)):
            # as in transformers: below 0 counts as 0, beyond the window as not there
            at = jnp.clip(place, 0, length - 1)
            nll = -jnp.take_along_axis(log_p[side], at[:, None], axis=1)[:, 0]
            sums[name] = jnp.where((place < length) & (batch.weights > 0), nll, 0.0).sum()
            right &= logits[side].argmax(-1) == place
        found = {
            "accuracy": (right.astype(jnp.float32).sum(), batch.weights.sum()),
            "num_tokens": token_count(batch.segments),
        }
        return LossOutput(sums, mutable, found, {"starts": logits[0], "ends": logits[1], "index": batch.index})

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Nothing without the texts; see `examine`."""
        return {}

    def examine(self, rows: dict[str, Any], examples: Any) -> dict[str, float]:
        """SQuAD's exact match and F1 of the best span of each question, over all its windows."""
        found = best_spans(rows["starts"], rows["ends"], examples, rows["index"], self.max_answer)
        return squad(list(found.values()), [examples.answers_of(row) for row in found])
