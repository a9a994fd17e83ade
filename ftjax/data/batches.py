"""What the model eats: `Example` (one encoded text), `Examples` (many, flat), `TokenBatch` (rows of them).

Weights stand at the TARGET: `weights[t]` multiplies the loss of predicting token t from the tokens before it. A prompt
token has weight 0 and so has the first token of every example, so that nothing is predicted across a border.

    row = build_rows([[first, second], [third]], length=512)     # TokenBatch of [2, 512]
    num_trained_tokens(row)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, overload

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
class Flat:
    """Encoded texts of any kind in flat arrays: what all kinds have in common.

    Attributes:
      input_ids: all texts one after another, [N].
      offsets: text i is `[offsets[i], offsets[i + 1])`, [examples + 1].
      rows: index of the source row of each text, [examples].
      origins: place of each source row, indexed by `rows`.
    """

    input_ids: Int32[np.ndarray, " N"]
    offsets: np.ndarray
    rows: np.ndarray
    origins: tuple[str, ...]

    per_token: ClassVar[tuple[str, ...]] = ("input_ids",)
    """Arrays with an entry for each token."""
    per_text: ClassVar[tuple[str, ...]] = ("rows",)
    """Arrays with an entry for each text."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [examples]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, i: int) -> str:
        """Where the row of text i stands."""
        return self.origins[int(self.rows[i])]

    def part(self, i: int) -> slice:
        """Where text i stands in the flat arrays."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def take(self, indices: np.ndarray) -> Self:
        """The texts at `indices`, in that order; `rows` and `origins` stay."""
        lengths = self.lengths[indices]
        starts = np.cumsum(lengths) - lengths
        flat = np.repeat(self.offsets[:-1][indices] - starts, lengths) + np.arange(lengths.sum())
        changed = {k: getattr(self, k)[flat] for k in self.per_token}
        changed |= {k: getattr(self, k)[indices] for k in self.per_text}
        return replace(self, offsets=offsets_of(lengths), **changed)

    def padded(self, rows: Sequence[Sequence[int]], length: int, count: int | None) -> Padded:
        """Text `rows[r]` in row r of [count, length]; rows beyond `rows` are all padding.

        Raises:
          ValueError: a row does not name exactly one text, or a text is longer than `length`.
        """
        chosen = [i for (i,) in rows]
        if (longest := max(self.lengths[chosen], default=0)) > length:
            raise ValueError(f"a text has {longest} tokens, the length is {length}")
        sizes = np.zeros((len(chosen) if count is None else count, 1), np.int64)
        sizes[: len(chosen), 0] = self.lengths[chosen]
        counter = np.arange(length, dtype=np.int32)
        real = counter < sizes
        place = np.zeros((len(sizes), 1), np.int64)
        place[: len(chosen), 0] = self.offsets[chosen]
        return Padded(
            real, np.where(real, counter, 0), np.where(real, 0, PAD_SEGMENT).astype(np.int32), place + counter
        )


@dataclass(frozen=True)
class Padded:
    """One text per row.

    Attributes:
      real: whether a place holds a token, [B, T].
      positions: 0, 1, ... within each text; 0 at padding.
      segments: 0, and `PAD_SEGMENT` at padding.
      place: where each token stands in the flat arrays; anything at padding.
    """

    real: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    place: np.ndarray

    def of(self, flat: np.ndarray) -> np.ndarray:
        """A flat array [N] as rows [B, T] in its dtype, 0 at padding."""
        out = np.zeros(self.real.shape, flat.dtype)
        out[self.real] = flat[self.place[self.real]]
        return out


def offsets_of(lengths: Iterable[int] | np.ndarray) -> np.ndarray:
    """Where texts of these lengths begin, and where the last one ends, int64 [texts + 1]."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def flatten(parts: Sequence[Any], dtype: Any = np.int32) -> np.ndarray:
    """Arrays or lists one after another; empty where there are none."""
    return np.concatenate([np.asarray(p, dtype) for p in parts] or [np.zeros(0, dtype)])


@dataclass(frozen=True)
class Examples(Flat, Sequence[Example]):
    """A read-only list of examples: 8 bytes a token, no Python object a token.

    Attributes:
      weights: loss weight of each token as a target, [N].
    """

    weights: Float32[np.ndarray, " N"]

    per_token: ClassVar[tuple[str, ...]] = ("input_ids", "weights")

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Gathers single examples; their `row` is renumbered 0, 1, ..."""
        items = list(examples)
        return cls(
            input_ids=flatten([e.input_ids for e in items]), weights=flatten([e.weights for e in items], np.float32),
            offsets=offsets_of(map(len, items)), rows=np.arange(len(items)), origins=tuple(e.origin for e in items),
        )  # fmt: skip

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        i = range(len(self))[index]
        part, row = self.part(i), int(self.rows[i])
        return Example(self.input_ids[part], self.weights[part], row, self.origins[row])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> TokenBatch:
        """A batch of rows that hold the examples with these indices (see `build_rows`)."""
        return build_rows([[self[i] for i in row] for row in rows], length, count=count)


class Derived:
    """Examples made of texts, whose rows and places are theirs. Subclasses give `underlying`."""

    @property
    def underlying(self) -> Examples:
        """The texts, one for each example."""
        raise NotImplementedError

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return self.underlying.lengths

    @property
    def rows(self) -> np.ndarray:
        """Index of the source row of each example."""
        return self.underlying.rows

    @property
    def origins(self) -> tuple[str, ...]:
        """Place of each source row."""
        return self.underlying.origins

    def __len__(self) -> int:
        return len(self.underlying)

    def origin(self, i: int) -> str:
        """Where the row of example i stands."""
        return self.underlying.origin(i)


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
