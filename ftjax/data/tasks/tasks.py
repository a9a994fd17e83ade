"""The data of a run whose tasks each bring their own (``objective=multi_task``): how they are mixed.

proportional  p_k = n_k / sum n;   temperature  p_k ~ n_k^(1/T) (Raffel et al. 2020, arXiv:1910.10683);   fixed  p_k ~ share_k

    data=Tasks(mixing="temperature", temperature=2.0)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from ftjax.data.rows import BadRows, Row
from ftjax.data.task import Prompt, Silent, Split
from ftjax.registry import register
from ftjax.schema import Component

Mixing = Literal["proportional", "temperature", "fixed"]


@register("data")
class Tasks(Silent, Component):
    """The data sets of the tasks of objective=multi_task, mixed."""

    name: Literal["tasks"] = "tasks"
    mixing: Mixing = Field(
        "proportional",
        description="Shares of the tasks. proportional: by examples; temperature: by n^(1/T); fixed: as the tasks say.",
    )
    temperature: float = Field(2.0, gt=0, description="T of mixing=temperature; 1: proportional, larger: more even.")

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """None of its own."""
        return []

    def prompts(self, n: int) -> list[Prompt]:
        """None of its own."""
        return []

    def fingerprint(self) -> dict[str, str]:
        """Nothing beyond the settings."""
        return {}

    def check(self, run: Any) -> Iterator[str]:
        """It is nothing without tasks."""
        if run.data is self and not hasattr(run.objective, "tasks"):
            yield f"data=tasks, objective={run.objective.name}  there are no tasks; use objective=multi_task or other data"

    def advise(self, run: Any) -> Iterator[str]:
        """Settings without effect."""
        default = type(self).model_fields["temperature"].default
        if self.mixing != "temperature" and self.temperature != default:
            yield f"data.temperature={self.temperature:g}  has no effect with mixing={self.mixing}"
