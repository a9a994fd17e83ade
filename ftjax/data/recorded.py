"""Examples with what a teacher said of them: its likeliest tokens at every place, or its logits of every text.

    examples = recorded(encoded.examples, {"top_ids": ids, "top_log_p": log_p})         # [N, k] beside [N] tokens
    examples.build([[0, 3], [1]], 512).top_ids                                          # [2, 512, k]

The arrays are flat as the tokens are, so they go where a token goes: into any order, any row and any packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32

from ftjax.data.batches import Examples, TokenBatch
from ftjax.data.labels import LabelBatch, LabelledExamples


@struct.dataclass
class RecordedBatch(TokenBatch):
    """Rows of tokens with a teacher's likeliest next tokens.

    Attributes:
      top_ids: at each place the k tokens that the teacher held likeliest to follow; 0 at padding.
      top_log_p: their log-probabilities in its whole distribution, at temperature 1; 0 at padding.
    """

    top_ids: Int32[Any, "*b t k"]
    top_log_p: Float32[Any, "*b t k"]


@struct.dataclass
class RecordedLabelBatch(LabelBatch):
    """Rows of one text each with a teacher's logits of its labels [B, C]; 0 in rows that only fill the batch."""

    said: Float32[Any, "*b c"]


@dataclass(frozen=True)
class RecordedExamples(Examples):
    """Encoded texts with a teacher's likeliest tokens.

    Attributes:
      top_ids, top_log_p: see `RecordedBatch`, [N, k].
    """

    top_ids: Int32[np.ndarray, "N k"]
    top_log_p: Float32[np.ndarray, "N k"]

    per_token: ClassVar[tuple[str, ...]] = (*Examples.per_token, "top_ids", "top_log_p")

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> RecordedBatch:
        """A batch of rows that hold the examples with these indices, one behind another."""
        plain = super().build(rows, length, count=count, key=key)
        ids, log_p = (np.zeros((*plain.tokens.shape, x.shape[1]), x.dtype) for x in (self.top_ids, self.top_log_p))
        for r, i, at in spots(rows, self.lengths):
            ids[r, at], log_p[r, at] = self.top_ids[self.part(i)], self.top_log_p[self.part(i)]
        return RecordedBatch(plain.tokens, plain.positions, plain.segments, plain.weights, ids, log_p)


@dataclass(frozen=True)
class RecordedLabels(LabelledExamples):
    """Encoded texts with their labels and a teacher's logits `said` of them, [examples, C]."""

    said: Float32[np.ndarray, "n C"]

    per_text: ClassVar[tuple[str, ...]] = (*LabelledExamples.per_text, "said")

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> RecordedLabelBatch:
        """A batch with one text per row."""
        plain = super().build(rows, length, count=count, key=key)
        said = np.zeros((len(plain.tokens), self.said.shape[1]), self.said.dtype)
        said[: len(rows)] = self.said[[i for (i,) in rows]]
        given = {f.name: getattr(plain, f.name) for f in fields(plain)}  # pyright: ignore[reportArgumentType]
        return RecordedLabelBatch(**given, said=said)


KINDS: dict[type, type] = {Examples: RecordedExamples, LabelledExamples: RecordedLabels}
"""What examples become when a teacher's words are put beside them."""


def spots(rows: Sequence[Sequence[int]], lengths: np.ndarray) -> list[tuple[int, int, slice]]:
    """(row, example, columns) of every example in rows where they stand one behind another."""
    found = []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            stop = start + int(lengths[i])
            found.append((r, int(i), slice(start, stop)))
            start = stop
    return found


def recorded(examples: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The examples with these arrays, in place of earlier ones."""
    given = plain(examples)
    return KINDS[type(given)](**{f.name: getattr(given, f.name) for f in fields(given)}, **arrays)


def plain(examples: Any) -> Any:
    """The examples without what a teacher said."""
    kind = next((k for k, v in KINDS.items() if isinstance(examples, v)), None)
    return examples if kind is None else kind(**{f.name: getattr(examples, f.name) for f in fields(kind)})


def awaiting(examples: Any, width: int) -> dict[str, np.ndarray]:
    """Arrays for `recorded` that hold a place: NaN, so that a run which forgot to ask stops. They take no memory."""
    of = lambda value, shape: np.broadcast_to(value, (*shape, width))  # noqa: E731
    if isinstance(examples, Examples):
        shape = examples.input_ids.shape
        return {"top_ids": of(np.int32(0), shape), "top_log_p": of(np.float32(np.nan), shape)}
    return {"said": of(np.float32(np.nan), (len(examples),))}
