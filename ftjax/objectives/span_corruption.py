"""T5's pre-training task on plain texts: the spans that sentinels stand for (Raffel et al. 2020, arXiv:1910.10683, 3.1.4).

loss = sum_t nll_t / number of answer tokens;   source  x with sentinels for spans,   answer  each sentinel and what it hid

    objective=SpanCorruption(share=0.15, mean_span=3.0)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

import ftjax.data.corrupt  # noqa: F401 (makes its layout known)
from ftjax.objectives.seq2seq import Seq2Seq
from ftjax.registry import register


@register("objective")
class SpanCorruption(Seq2Seq):
    """Cross entropy on the hidden spans of plain texts; the spans are drawn anew in each epoch."""

    rows: ClassVar[str] = "corrupted"

    name: Literal["span_corruption"] = "span_corruption"  # type: ignore[assignment]
    share: float = Field(0.15, gt=0, lt=1, description="Share of the tokens that are hidden.")
    mean_span: float = Field(3.0, ge=1, description="Tokens of a hidden span on average.")
    roll: bool = Field(
        False,
        description="Turn each mask by a random offset: else a text ends hidden, a short one nowhere else (as T5's).",
    )

    def data_options(self) -> dict[str, Any]:
        """What the data layout must know."""
        return {"share": self.share, "mean_span": self.mean_span, "roll": self.roll}
