"""A data set of the Hugging Face hub, or a local folder laid out like one, through the `datasets` library.

Hub(id="openai/gsm8k", config="main", columns=("prompt=question", "completion=answer"))
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ftjax.data.clean import Clean
from ftjax.data.rows import BadRows, Row, held_out_split
from ftjax.data.task import Prompt, Split, fixed_prompts
from ftjax.errors import DataError, did_you_mean
from ftjax.registry import register
from ftjax.schema import Component


@register("data")
class Hub(Component):
    """A hub data set by id."""

    name: Literal["hub"] = "hub"
    id: str = Field(min_length=1, description="owner/name on the hub, or a local folder in the same layout.")
    config: str = Field("", description="Configuration (subset) of the data set.")
    revision: str = Field("", description="Commit, tag or branch; pin a commit to repeat a run.")
    train_split: str = Field("train", min_length=1, description="Split to train on.")
    eval_split: str = Field("", description="Held-out split; empty: eval_share of the training rows.")
    eval_share: float = Field(0.05, ge=0, lt=1, description="Rows held out by hash if eval_split is empty; 0: none.")
    chat_template: str = Field("", description="Built-in name, .jinja file or Jinja text; empty: the tokenizer's own.")
    columns: tuple[str, ...] = Field((), description="Renamed columns, each 'ours=theirs', e.g. 'prompt=question'.")
    metrics: tuple[str, ...] = Field((), description="Generation metrics on held-out prompts, e.g. rouge_l, token_f1.")
    wraps: bool = Field(False, description="Cut long texts into several examples instead of truncating them.")
    clean: Clean = Field(default_factory=Clean, description="What is done to the rows first; by default nothing.")

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows of "train" or "eval", cleaned."""
        bad, aside = bad or BadRows(), BadRows(10**9)
        compared = split == "train" and self.clean.leaks != "warn"
        held_out = self.clean(self._split("eval", aside), aside) if compared else ()
        return self.clean(self._split(split, bad), bad, held_out)

    def _split(self, split: Split, bad: BadRows) -> list[Row]:
        if split == "eval" and self.eval_split:
            return self._rows(self.eval_split, bad)
        if split == "eval" and self.eval_share == 0:
            return []
        rows = self._rows(self.train_split, bad)
        return rows if self.eval_split else held_out_split(rows, self.eval_share)[split == "eval"]

    def prompts(self, n: int) -> list[Prompt]:
        """n fixed held-out prompts."""
        return fixed_prompts(self.examples("eval"), n, columns=self.columns)

    def fingerprint(self) -> dict[str, str]:
        """The fingerprint that `datasets` gives each split."""
        splits = [self.train_split, *([self.eval_split] if self.eval_split else [])]
        return {split: self._load(split)._fingerprint for split in splits}

    def _rows(self, split: str, bad: BadRows) -> list[Row]:
        rows = (Row(r, f"{self.id}[{split}]:row {i}") for i, r in enumerate(self._load(split), 1))
        return self.clean.normalised(rows, bad)

    def _load(self, split: str) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.id, self.config or None, split=split, revision=self.revision or None)
        except Exception as e:  # the library raises many kinds; the user needs what and where
            lines = [line for line in str(e).strip().splitlines() if line.strip()] or [type(e).__name__]
            known = [s for s in ("train", "validation", "test") if s in str(e)]
            hint = did_you_mean(split, known) if "split" in str(e) else ""
            config = f" (config {self.config!r})" if self.config else ""
            raise DataError(f"data set {self.id!r}{config}, split {split!r}: {lines[0]}{hint}") from None
