"""What the model eats: `Example` (one encoded text), `Examples` (many, stored compactly), `TokenBatch` (rows of them).

Weights stand at the TARGET: `weights[t]` multiplies the loss of predicting token t from the tokens before it. A prompt
token has weight 0 and so has the first token of every example, so that nothing is predicted across a border.

    row = build_rows([[first, second], [third]], length=512)     # TokenBatch of [2, 512]
    num_trained_tokens(row)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32

PAD_SEGMENT = -2  # padding: attends to nothing, is attended by nothing that counts
GLOBAL_SEGMENT = -1  # visible to every segment of a row: soft prompts and other virtual tokens


@dataclass(frozen=True)
class Example:
    """One encoded text.

    Attributes:
      input_ids: token ids, [n].
      weights: loss weight of each token as a target, [n]; `weights[0]` is 0.
      row: index of the row of the data set it came from.
      origin: where that row stands, e.g. ``train.jsonl:17``.
    """

    input_ids: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    row: int = -1
    origin: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """A read-only list of examples in four flat arrays: 8 bytes a token, no Python object a token.

    Attributes:
      input_ids: all examples one after another, [N].
      weights: likewise, [N].
      offsets: example i is `[offsets[i], offsets[i + 1])`, [examples + 1].
      rows: index of the source row of each example, [examples].
      origins: place of each source row, indexed by `rows`.
    """

    input_ids: Int32[np.ndarray, " N"]
    weights: Float32[np.ndarray, " N"]
    offsets: np.ndarray
    rows: np.ndarray
    origins: tuple[str, ...]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Gathers single examples; their `row` is renumbered 0, 1, ..."""
        items = list(examples)
        return cls(
            np.concatenate([e.input_ids for e in items] or [np.zeros(0)]).astype(np.int32),
            np.concatenate([e.weights for e in items] or [np.zeros(0)]).astype(np.float32),
            np.cumsum([0, *(len(e) for e in items)], dtype=np.int64),
            np.arange(len(items)),
            tuple(e.origin for e in items),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        i = range(len(self))[index]
        part = slice(self.offsets[i], self.offsets[i + 1])
        row = int(self.rows[i])
        return Example(self.input_ids[part], self.weights[part], row, self.origins[row])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def origin(self, i: int) -> str:
        """Where the row of example i stands."""
        return self.origins[int(self.rows[i])]

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> TokenBatch:
        """A batch of rows that hold the examples with these indices (see `build_rows`)."""
        return build_rows([[self[i] for i in row] for row in rows], length, count=count)

    def take(self, indices: np.ndarray) -> Examples:
        """The examples at `indices`, in that order; `row` and `origin` stay."""
        lengths = self.lengths[indices]
        starts = np.cumsum(lengths) - lengths
        flat = np.repeat(self.offsets[:-1][indices] - starts, lengths) + np.arange(lengths.sum())
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Examples(self.input_ids[flat], self.weights[flat], offsets, self.rows[indices], self.origins)


@struct.dataclass
class TokenBatch:
    """Rows of packed or padded examples; leading axes are free: [B, T] or [accumulate, B, T].

    Attributes:
      tokens: token ids; 0 at padding.
      positions: 0, 1, ... within each example.
      segments: 0, 1, ... for the examples of a row, `PAD_SEGMENT` at padding (`GLOBAL_SEGMENT` is for virtual tokens).
      weights: loss weight of each token as a target; 0 at padding and at the first token of each example.
    """

    tokens: Int32[Any, "*b t"]
    positions: Int32[Any, "*b t"]
    segments: Int32[Any, "*b t"]
    weights: Float32[Any, "*b t"]


def build_rows(rows: Sequence[Sequence[Example]], length: int, *, count: int | None = None) -> TokenBatch:
    """Lays examples out in rows of `length` tokens.

    Args:
      rows: the examples of each row, in order; their lengths add up to at most `length`.
      length: T, tokens per row.
      count: B; rows beyond `rows` are all padding. Default: one per entry.

    Returns:
      A batch of numpy arrays, each [B, T].

    Raises:
      ValueError: the examples of a row do not fit.
    """
    shape = (len(rows) if count is None else count, length)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments, weights = np.full(shape, PAD_SEGMENT, np.int32), np.zeros(shape, np.float32)
    counter = np.arange(length, dtype=np.int32)
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            stop = start + len(example)
            if stop > length:
                raise ValueError(f"row {r} holds {sum(map(len, row))} tokens, the length is {length}")
            tokens[r, start:stop] = example.input_ids
            positions[r, start:stop] = counter[: stop - start]
            segments[r, start:stop] = segment
            weights[r, start:stop] = example.weights
            weights[r, start] = 0.0
            start = stop
    return TokenBatch(tokens, positions, segments, weights)


def num_trained_tokens(batch: TokenBatch | Example | Examples) -> int:
    """Targets with a weight above 0."""
    return int(np.count_nonzero(np.asarray(batch.weights)))
