"""Questions whose answers stand in a text: rows to overlapping windows to batches, for extractive question answering.

    typed = type_questions(rows)                                # question, context, answers {text, answer_start}
    encoded = encode_questions(typed, tokenizer, Loader(max_length=384), stride=128)
    encoded.examples.build([[0], [1]], 384)                     # SpanBatch of two windows

A window is the question and a part of the context; neighbouring windows of one row share `stride` context tokens, and each is
an example. Of a window without the whole answer, and of a question without one, the answer is the first token (CLS), as in
transformers' example for SQuAD. The first answer of a row is trained; held-out scores take the best of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import Flat, flatten, offsets_of
from ftjax.data.encode import Encoded, EncodeReport
from ftjax.data.formats import DatasetType, TypedRows, rename
from ftjax.data.rows import BadRows, Row
from ftjax.errors import ConfigError, DataError, did_you_mean

OUTSIDE = -1
"""Character offset of a token that does not belong to the context."""


@struct.dataclass
class SpanBatch:
    """Windows with the answer's first and last token; leading axes are free: [B, T] or [accumulate, B, T].

    Attributes:
      tokens: token ids; 0 at padding.
      positions: 0, 1, ...
      segments: 0, and `PAD_SEGMENT` at padding.
      types: 1 in the context, as the tokenizer says.
      starts, ends: places of the answer's first and last token [B]; what is not within [0, T) is not trained.
      weights: 1, or 0 for rows that only fill the batch [B].
      index: which example a row is [B]; -1 for rows that only fill the batch.
    """

    tokens: Int32[Any, "*b t"]
    positions: Int32[Any, "*b t"]
    segments: Int32[Any, "*b t"]
    types: Int32[Any, "*b t"]
    starts: Int32[Any, "*b"]
    ends: Int32[Any, "*b"]
    weights: Float32[Any, "*b"]
    index: Int32[Any, "*b"]


@dataclass(frozen=True)
class SpanExamples(Flat):
    """Encoded windows over contexts; what `Flat` calls a text is a window here.

    Attributes:
      types: token types, [N].
      chars: of each token its first character and the one after its last in the context, or `OUTSIDE`, [N, 2].
      spans: first and last token of the answer within each window, [examples, 2].
      nulls: place of the token that stands for no answer, [examples].
      context_of: which of `contexts` a row has, [rows].
      answer_offsets: answers of row r are `[answer_offsets[r], answer_offsets[r + 1])` of `answers`, [rows + 1].
      contexts, answers: texts, each context once.
      nullable: whether some training question has no answer.
    """

    types: np.ndarray
    chars: np.ndarray
    spans: np.ndarray
    nulls: np.ndarray
    context_of: np.ndarray
    answer_offsets: np.ndarray
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    nullable: bool

    per_token: ClassVar[tuple[str, ...]] = ("input_ids", "types", "chars")
    per_text: ClassVar[tuple[str, ...]] = ("rows", "spans", "nulls")

    def context(self, i: int) -> str:
        """The whole context of window i."""
        return self.contexts[int(self.context_of[self.rows[i]])]

    def answers_of(self, row: int) -> tuple[str, ...]:
        """The answers of a source row; empty where it has none."""
        return self.answers[int(self.answer_offsets[row]) : int(self.answer_offsets[row + 1])]

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> SpanBatch:
        """A batch with one window per row; rows beyond `rows` are padding."""
        p, used = self.padded(rows, length, count), [i for (i,) in rows]
        spans, index = np.zeros((len(p.real), 2), np.int32), np.full(len(p.real), -1, np.int32)
        spans[: len(used)], index[: len(used)] = self.spans[used], used
        weights = (index >= 0).astype(np.float32)
        ids, types = p.of(self.input_ids), p.of(self.types)
        return SpanBatch(ids, p.positions, p.segments, types, spans[:, 0], spans[:, 1], weights, index)


# Rows ------------------------------------------------------------------------------------------------------------------


def type_questions(rows: Sequence[Row], *, columns: Sequence[str] = (), bad: BadRows | None = None) -> TypedRows:
    """Checks that every row has a question, a context and answers that stand in it.

    Raises:
      ConfigError: a rename is malformed.
      DataError: a column is missing, a value has the wrong type, or an answer is not where it is said to be.
    """
    bad = bad or BadRows()
    kept = []
    for row in rename(rows, columns):
        problem = _problem(row)
        if problem:
            bad.add(f"{row.origin}: {problem}")
        else:
            texts, starts = (_list(row["answers"][k]) for k in ("text", "answer_start"))
            found = {"question": row["question"], "context": row["context"], "texts": texts, "starts": starts}
            kept.append(Row(found, row.origin))
    if not kept:
        raise DataError(f"no questions are left of {len(rows)} rows: {bad.summary()}")
    return TypedRows(DatasetType("question_answering", False), kept)


def _problem(row: Row) -> str:
    for column in ("question", "context", "answers"):
        if column not in row:
            return (
                f"no column {column!r}.{did_you_mean(column, row)} Columns: {', '.join(row)}. Rows have question, context "
                "and answers {text, answer_start}; rename with data.columns=('context=passage',)"
            )
    empty = next((c for c in ("question", "context") if not isinstance(row[c], str) or not row[c].strip()), None)
    if empty:
        return f"field {empty!r} expected a text, got {row[empty]!r}"
    answers = row["answers"]
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        return f"field 'answers' expected {{'text': [...], 'answer_start': [...]}}, got {answers!r}"
    texts, starts = _list(answers["text"]), _list(answers["answer_start"])
    if len(texts) != len(starts):
        return f"{len(texts)} answers in 'text', but {len(starts)} places in 'answer_start'"
    return next(
        (p for text, start in zip(texts, starts, strict=True) if (p := _misplaced(row["context"], text, start))), ""
    )


def _misplaced(context: str, text: Any, start: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        return f"field 'answers' expected texts, got {text!r}; a question without an answer has empty lists"
    if not isinstance(start, int) or isinstance(start, bool):
        return f"field 'answers' expected whole numbers as 'answer_start', got {start!r}"
    if start >= 0 and context[start : start + len(text)] == text:
        return ""
    at = context.find(text)
    where = f"it stands at {at}" if at >= 0 else "the context does not have it"
    return f"answer {text!r} is not in the context at character {start}: {where}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# Encoding --------------------------------------------------------------------------------------------------------------


def encode_questions(
    typed: TypedRows,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    *,
    stride: int,
    bad: BadRows | None = None,
    read: int | None = None,
    required: bool = True,
    like: SpanExamples | None = None,
    **_: Any,
) -> Encoded:
    """Tokenizes questions with their contexts in windows of `max_length`.

    Args:
      typed: rows of questions.
      tokenizer: a fast tokenizer.
      loader: max_length; truncation says what becomes of a question that leaves no room for its context ("right": dropped).
      stride: context tokens that neighbouring windows share.
      bad: malformed rows so far, for the report.
      read: rows read from the files, for the report.
      required: having no example left is an error.
      like: training examples, where these are held-out rows.

    Raises:
      ConfigError: `stride` leaves no room in `max_length`.
      DataError: a question is too long and `loader.truncation` is "error", or nothing is left.
    """
    bad, rows = bad or BadRows(), typed.rows
    if required and like is None and not any(r["texts"] for r in rows):
        raise DataError(
            f"none of {len(rows)} questions has an answer (the first is {rows[0].origin}): the model would learn to give "
            "none. Is 'text' in the field 'answers' empty everywhere?"
        )
    short = _crowded(rows, tokenizer, loader, stride)
    kept = sorted(set(range(len(rows))) - set(short))
    if not kept and required:
        raise DataError(
            f"all {len(rows)} questions leave no room for their context in loader.max_length={loader.max_length}"
        )
    examples, full = _windows(rows, kept, tokenizer, loader.max_length, stride, like)
    warnings = [bad.summary()] if bad.count else []
    if short:
        warnings.append(
            f"{len(short):,} questions are left out: no room for their context in {loader.max_length} tokens"
        )
    report = EncodeReport(
        read=len(rows) + bad.count if read is None else read, skipped_bad=bad.count, dropped=len(short),
        examples=len(examples), tokens=len(examples.input_ids), trained_tokens=2 * len(examples), longest=full,
        warnings=tuple(warnings),
    )  # fmt: skip
    return Encoded(examples, report)


def _crowded(rows: Sequence[Row], tokenizer: Any, loader: Loader, stride: int) -> list[int]:
    """The rows whose question leaves no room for a window that goes on.

    Raises:
      ConfigError: no question could.
      DataError: there are such rows and `loader.truncation` is "error".
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if stride + special >= loader.max_length:
        raise ConfigError(
            "objective.doc_stride", [f"{stride} shared tokens leave no room in loader.max_length={loader.max_length}"]
        )
    asked = tokenizer(
        [r["question"] for r in rows], add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    room = [loader.max_length - special - len(ids) for ids in asked["input_ids"]]
    short = [i for i, n in enumerate(room) if n <= stride]
    if short and loader.truncation == "error":
        raise DataError(
            f"{len(short)} of {len(rows)} questions leave no room for {stride} shared tokens and one more in "
            f"loader.max_length={loader.max_length}: {', '.join(rows[i].origin for i in short[:3])}"
        )
    return short


def _windows(
    rows: Sequence[Row], kept: Sequence[int], tokenizer: Any, length: int, stride: int, like: SpanExamples | None
) -> tuple[SpanExamples, int]:
    """The windows of the rows `kept`, and the tokens of the longest."""
    ids, types, chars, spans, nulls, source = [], [], [], [], [], []
    made: Any = tokenizer(
        [rows[i]["question"] for i in kept], [rows[i]["context"] for i in kept], truncation="only_second",
        max_length=length, stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        return_token_type_ids=True, return_attention_mask=False, verbose=False,
    ) if kept else {"input_ids": []}  # fmt: skip
    for w, own in enumerate(made["input_ids"]):
        row = rows[kept[made["overflow_to_sample_mapping"][w]]]
        of_context = np.asarray([s == 1 for s in made.sequence_ids(w)])
        at = np.where(of_context[:, None], np.asarray(made["offset_mapping"][w], np.int32), np.int32(OUTSIDE))
        null = own.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in own else 0
        ids.append(np.asarray(own, np.int32))
        types.append(np.asarray(made["token_type_ids"][w], np.int32))
        chars.append(at)
        nulls.append(null)
        spans.append(_span(at, row, null))
        source.append(kept[made["overflow_to_sample_mapping"][w]])
    contexts = {text: i for i, text in enumerate(dict.fromkeys(r["context"] for r in rows))}
    examples = SpanExamples(
        input_ids=flatten(ids), types=flatten(types), chars=flatten(chars).reshape(-1, 2), offsets=offsets_of(map(len, ids)),
        spans=np.asarray(spans, np.int32).reshape(-1, 2), nulls=np.asarray(nulls, np.int32),
        rows=np.asarray(source, np.int64), context_of=np.asarray([contexts[r["context"]] for r in rows], np.int64),
        answer_offsets=offsets_of(len(r["texts"]) for r in rows), contexts=tuple(contexts),
        answers=tuple(t for r in rows for t in r["texts"]),
        nullable=like.nullable if like else any(not r["texts"] for r in rows), origins=tuple(r.origin for r in rows),
    )  # fmt: skip
    return examples, max(map(len, ids), default=0)


def _span(chars: np.ndarray, row: Row, null: int) -> tuple[int, int]:
    """First and last token of the first answer within a window; twice `null` where the window lacks a part of it."""
    inside = np.flatnonzero(chars[:, 0] != OUTSIDE)
    if not row["texts"] or not len(inside):
        return null, null
    first, last = row["starts"][0], row["starts"][0] + len(row["texts"][0])
    if chars[inside[0], 0] > first or chars[inside[-1], 1] < last:
        return null, null
    return int(inside[chars[inside, 0] <= first][-1]), int(inside[chars[inside, 1] >= last][0])
