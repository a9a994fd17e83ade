"""A source and an answer each, read by two sides of a model: rows to examples to batches, for sequence to sequence.

    typed = type_rows(rows)                                      # prompt, completion
    encoded = encode_seq2seq(typed, tokenizer, Loader(max_length=512))
    encoded.examples.build([[0], [1]], 512)                      # SeqBatch of two rows

Both texts end as the tokenizer ends a text; the answer gets an EOS where it does not. Each is cut, dropped or refused by
`loader.max_length` on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import Derived, Examples, flatten, offsets_of
from ftjax.data.encode import Encoded, EncodeReport, ending, with_end
from ftjax.data.formats import DatasetType, TypedRows, is_empty, shown
from ftjax.data.labels import tokenized
from ftjax.data.rows import BadRows, Row
from ftjax.errors import DataError


@struct.dataclass
class SeqBatch:
    """Sources with their answers; leading axes are free: [B, T] or [accumulate, B, T].

    Attributes:
      tokens, positions, segments: of the sources, as in `TokenBatch`.
      labels: tokens of the answers; 0 at padding. T may be another one than that of the sources.
      weights: 1 at the tokens of the answers, 0 at padding.
    """

    tokens: Int32[Any, "*b t"]
    positions: Int32[Any, "*b t"]
    segments: Int32[Any, "*b t"]
    labels: Int32[Any, "*b t"]
    weights: Float32[Any, "*b t"]


@dataclass(frozen=True)
class SeqExamples(Derived):
    """Encoded sources and answers, one of each per row."""

    sources: Examples
    answers: Examples

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer text of each row, int64 [examples]."""
        return np.maximum(self.sources.lengths, self.answers.lengths)

    @property
    def underlying(self) -> Examples:
        """See `Derived`."""
        return self.sources

    def take(self, indices: np.ndarray) -> SeqExamples:
        """The examples at `indices`, in that order."""
        return replace(self, sources=self.sources.take(indices), answers=self.answers.take(indices))

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> SeqBatch:
        """A batch with one example per row; rows beyond `rows` are padding."""
        read, said = (x.padded(rows, length, count) for x in (self.sources, self.answers))
        tokens, answer = read.of(self.sources.input_ids), said.of(self.answers.input_ids)
        return SeqBatch(tokens, read.positions, read.segments, answer, said.real.astype(np.float32))


def encode_seq2seq(
    typed: TypedRows,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    *,
    bad: BadRows | None = None,
    read: int | None = None,
    required: bool = True,
    **_: Any,
) -> Encoded:
    """Tokenizes both texts of every row.

    Args:
      typed: rows of prompt and completion.
      tokenizer: a fast tokenizer.
      loader: max_length, truncation.
      bad: malformed rows so far, for the report.
      read: rows read from the files, for the report.
      required: having no example left is an error.

    Raises:
      DataError: other columns, or conversations; texts too long; nothing is left.
    """
    if typed.type != DatasetType("prompt_completion", False):
        raise DataError(
            f"expected plain prompt_completion rows (columns prompt, completion); these are {typed.type}: {shown(typed.rows)}"
        )
    bad = BadRows() if bad is None else bad
    typed = replace(typed, rows=_answered(typed.rows, bad))
    if not typed.rows and required:
        raise DataError(f"no row with an answer is left: {bad.summary()}")
    end = ending(tokenizer)
    sources = _texts([Row({"text": r["prompt"]}, r.origin) for r in typed.rows], tokenizer, loader)
    answers = _texts([Row({"text": with_end(r["completion"], end)}, r.origin) for r in typed.rows], tokenizer, loader)
    both = np.intersect1d(sources.rows, answers.rows)
    kept = SeqExamples(*(x.take(np.searchsorted(x.rows, both)) for x in (sources, answers)))
    if not len(both) and required:
        raise DataError(f"all {len(typed.rows)} rows are longer than loader.max_length={loader.max_length}")
    full = [max(a, b) for a, b in zip(sources.full, answers.full, strict=True)]
    long = sum(n > loader.max_length for n in full)
    warnings = [bad.summary()] if bad.count else []
    if long:
        what = "cut to" if loader.truncation == "right" else "left out, longer than"
        warnings.append(f"{long:,} rows are {what} loader.max_length={loader.max_length}")
    report = EncodeReport(
        read=len(typed.rows) + bad.count if read is None else read, skipped_bad=bad.count,
        dropped=len(typed.rows) - len(both), truncated=long if loader.truncation == "right" else 0, examples=len(both),
        tokens=len(kept.sources.input_ids) + len(kept.answers.input_ids), trained_tokens=len(kept.answers.input_ids),
        eos_trained=int((kept.answers.input_ids == tokenizer.eos_token_id).sum()), longest=max(full, default=0),
        warnings=tuple(warnings),
    )  # fmt: skip
    return Encoded(kept, report)


def _answered(rows: Sequence[Row], bad: BadRows) -> list[Row]:
    """The rows whose source and answer say something; the others go to `bad`."""
    kept = []
    for row in rows:
        empty = next((f for f in ("prompt", "completion") if is_empty(row[f])), None)
        if empty:
            bad.add(f"{row.origin}: field {empty!r} is empty")
        else:
            kept.append(row)
    return kept


@dataclass(frozen=True)
class _Texts(Examples):
    """Examples that know how long each row's text was before any cut."""

    full: tuple[int, ...] = ()


def _texts(rows: list[Row], tokenizer: Any, loader: Loader) -> _Texts:
    """All texts that fit, in flat arrays."""
    ids, _, full, kept = tokenized(rows, tokenizer, loader)
    flat = flatten([ids[i] for i in kept])
    return _Texts(
        input_ids=flat, weights=np.ones(len(flat), np.float32), offsets=offsets_of(len(ids[i]) for i in kept),
        rows=np.asarray(kept, np.int64), origins=tuple(r.origin for r in rows), full=tuple(full),
    )  # fmt: skip
