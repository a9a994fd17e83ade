"""Words with a label each: rows to examples to batches, for token classification.

    typed = type_tagged(rows)                                   # tokens, ner_tags (or tags, labels)
    encoded = encode_tagged(typed, tokenizer, Loader(max_length=128))
    encoded.examples.build([[0], [1]], 128)                     # TagBatch of two rows

A word may become several pieces: the first carries its label, the others none (as in transformers' example for NER). A
label of `IGNORED` in the data is none either. Classes are those of the training rows, or are named by the objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from ftjax.data.labels import class_names, odd_ones
from ftjax.data.rows import BadRows, Row
from ftjax.errors import DataError, did_you_mean

IGNORED = -100
"""Label of a token that is not trained."""
WORDS, LABELS = ("tokens", "words"), ("ner_tags", "tags", "labels")
"""Columns by the names that data sets give them; the first that is there counts."""


@struct.dataclass
class TagBatch:
    """Rows of one text each with labels on some tokens; leading axes are free: [B, T] or [accumulate, B, T].

    Attributes:
      tokens: token ids; 0 at padding.
      positions: 0, 1, ...
      segments: 0, and `PAD_SEGMENT` at padding.
      types: token types, as the tokenizer says.
      labels: class of each labelled token, else 0.
      weights: 1 at labelled tokens, else 0.
    """

    tokens: Int32[Any, "*b t"]
    positions: Int32[Any, "*b t"]
    segments: Int32[Any, "*b t"]
    types: Int32[Any, "*b t"]
    labels: Int32[Any, "*b t"]
    weights: Float32[Any, "*b t"]


@dataclass(frozen=True)
class TagExamples(Flat):
    """Encoded texts with labels on some tokens.

    Attributes:
      types: token types, [N].
      tags: class of each token, or `IGNORED`, [N].
      names: of the classes.
    """

    types: np.ndarray
    tags: np.ndarray
    names: tuple[str, ...]

    per_token: ClassVar[tuple[str, ...]] = ("input_ids", "types", "tags")

    @classmethod
    def of(
        cls, parts: Sequence[Pieces], rows: Sequence[int], names: tuple[str, ...], origins: Iterable[str]
    ) -> TagExamples:
        """Gathers single texts; `rows` says which source row each came from."""
        ids, types, tags = (flatten([p[k] for p in parts]) for k in range(3))
        return cls(
            input_ids=ids, types=types, tags=tags, offsets=offsets_of(len(p[0]) for p in parts), names=names,
            rows=np.asarray(rows, np.int64), origins=tuple(origins),
        )  # fmt: skip

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> TagBatch:
        """A batch with one text per row; rows beyond `rows` are padding."""
        p = self.padded(rows, length, count)
        told = p.real & (p.of(self.tags) != IGNORED)
        labels, weights = np.where(told, p.of(self.tags), 0), told.astype(np.float32)
        return TagBatch(p.of(self.input_ids), p.positions, p.segments, p.of(self.types), labels, weights)


Pieces = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""(token ids, token types, labels) of one text."""


# Rows ------------------------------------------------------------------------------------------------------------------


def type_tagged(rows: Sequence[Row], *, columns: Sequence[str] = (), bad: BadRows | None = None) -> TypedRows:
    """Checks that every row has words and as many labels.

    Raises:
      ConfigError: a rename is malformed.
      DataError: a column is missing, a value has the wrong type, or the numbers of words and labels differ.
    """
    bad = bad or BadRows()
    kept = []
    for row in rename(rows, columns):
        words, labels = (next((c for c in names if c in row), "") for names in (WORDS, LABELS))
        problem = _problem(row, words, labels)
        if problem:
            bad.add(f"{row.origin}: {problem}")
        else:
            kept.append(Row({"tokens": row[words], "labels": row[labels]}, row.origin))
    if not kept:
        raise DataError(f"no rows with words and labels are left of {len(rows)}: {bad.summary()}")
    return TypedRows(DatasetType("tagged", False), kept)


def _problem(row: Row, words: str, labels: str) -> str:
    for column, names in ((words, WORDS), (labels, LABELS)):
        if not column:
            return (
                f"no column {' or '.join(map(repr, names))}. Columns: {', '.join(row)}. Rows of words have tokens and "
                "ner_tags, tags or labels; rename with data.columns=('tags=pos',)"
            )
    if not _list_of(row[words], str) or not row[words]:
        return f"field {words!r} expected a list of words, got {row[words]!r}"
    if (empty := next((i for i, w in enumerate(row[words]) if not w.strip()), None)) is not None:
        return f"word {empty} of {words!r} is empty, so its label would belong to no token"
    if not _list_of(row[labels], (str, int)):
        return f"field {labels!r} expected a list of classes (numbers or texts), got {row[labels]!r}"
    if len(row[words]) != len(row[labels]):
        return f"{len(row[words])} words in {words!r}, but {len(row[labels])} labels in {labels!r}"
    return ""


def _list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, kind) and not isinstance(x, bool) for x in value)


# Encoding --------------------------------------------------------------------------------------------------------------


def encode_tagged(
    typed: TypedRows,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    *,
    names: tuple[str, ...] = (),
    bad: BadRows | None = None,
    read: int | None = None,
    required: bool = True,
    like: TagExamples | None = None,
    **_: Any,
) -> Encoded:
    """Tokenizes the words with the special tokens of the tokenizer and puts every label on its word's first piece.

    Args:
      typed: rows of words and labels.
      tokenizer: a fast tokenizer.
      loader: max_length, truncation.
      names: of the classes, in the order of the labels' numbers; empty: those of the rows.
      bad: malformed rows so far; takes those with a label that is not among the classes.
      read: rows read from the files, for the report.
      required: having no example left is an error.
      like: training examples whose classes held-out rows must have.

    Raises:
      DataError: a label is out of range, there is only one class, texts are too long, or nothing is left.
    """
    bad = bad or BadRows()
    found = typed.rows if like else odd_ones(typed.rows, lambda r: [x for x in r["labels"] if x != IGNORED], bad)
    names = like.names if like else names or class_names(x for r in found for x in r["labels"] if x != IGNORED)
    if len(names) < 2:
        where = f" ({len(found):,} rows, the first is {found[0].origin})" if found else ""
        raise DataError(
            f"every word has the label {', '.join(names) or '(none)'}: there is nothing to tell apart{where}"
        )
    rows, classes = [], []
    for row in found:
        numbers = _numbers(row, names, bad)
        if numbers is not None:
            rows.append(row)
            classes.append(numbers)
    parts, full = _pieces(rows, classes, tokenizer, loader)
    return finish(parts, full, rows, names, loader, bad=bad, read=read, required=required)


def finish(
    parts: Sequence[Pieces], full: Sequence[int], rows: Sequence[Row], names: tuple[str, ...], loader: Loader, *,
    bad: BadRows, read: int | None, required: bool,
) -> Encoded:  # fmt: skip
    """Examples and their report; texts beyond `max_length` are cut already, dropped or refused, as are those without a label.

    Args:
      parts: of each row, cut to `max_length`.
      full: tokens of each row before the cut.
      rows: the rows.
      names: of the classes.
      loader: max_length, truncation.
      bad: malformed rows.
      read: rows read from the files.
      required: having no example left is an error.

    Raises:
      DataError: a text is too long and `loader.truncation` is "error", or nothing is left.
    """
    long = [i for i, n in enumerate(full) if n > loader.max_length]
    if long and loader.truncation == "error":
        raise DataError(
            f"{len(long)} of {len(rows)} texts are longer than loader.max_length={loader.max_length}: "
            f"{', '.join(rows[i].origin for i in long[:3])}"
        )
    drop = set(long) if loader.truncation == "drop" else set()
    fits = [i for i in range(len(rows)) if i not in drop]
    kept = [i for i in fits if any(tag != IGNORED for tag in parts[i][2])]
    if not kept and required:
        what = f"the shortest has {min(full):,} tokens" if full else bad.summary()
        raise DataError(f"none of {len(rows)} texts has a label within loader.max_length={loader.max_length}: {what}")
    examples = TagExamples.of([parts[i] for i in kept], kept, names, (r.origin for r in rows))
    warnings = [bad.summary()] if bad.count else []
    if long:
        what = "left out, longer than" if drop else "cut to"
        warnings.append(f"{len(long):,} texts are {what} loader.max_length={loader.max_length}")
    if len(fits) > len(kept):
        first = rows[min(set(fits) - set(kept))].origin
        warnings.append(
            f"{len(fits) - len(kept):,} texts have no label within max_length and are left out, e.g. {first}"
        )
    report = EncodeReport(
        read=len(rows) + bad.count if read is None else read, skipped_bad=bad.count, dropped=len(drop),
        truncated=0 if drop else len(long), zero_trained=len(fits) - len(kept), examples=len(kept),
        tokens=len(examples.input_ids), trained_tokens=int((examples.tags != IGNORED).sum()),
        longest=max(full, default=0), warnings=tuple(warnings),
    )  # fmt: skip
    return Encoded(examples, report)


def _numbers(row: Row, names: tuple[str, ...], bad: BadRows) -> list[int] | None:
    """Classes by number; None, and a note in `bad`, where one is not among `names`."""
    index = {name: i for i, name in enumerate(names)}
    found = []
    for i, label in enumerate(row["labels"]):
        number = index.get(str(label))
        if label == IGNORED:
            number = IGNORED
        elif number is None and isinstance(label, int) and not _are_numbers(names):
            number = label if 0 <= label < len(names) else None
        if number is None:
            known = f"{names[0]} to {names[-1]}" if _are_numbers(names) else f"0 to {len(names) - 1}"
            what = (
                f"is out of range: {known}, or {IGNORED} for none" if isinstance(label, int)
                else f"is not among the {len(names)} classes.{did_you_mean(label, names)}"
            )  # fmt: skip
            bad.add(f"{row.origin}: label {label!r} of word {i} ({row['tokens'][i]!r}) {what}")
            return None
        found.append(number)
    return found


def _are_numbers(names: tuple[str, ...]) -> bool:
    return all(name.lstrip("-").isdigit() for name in names)


def _pieces(
    rows: Sequence[Row], classes: Sequence[Sequence[int]], tokenizer: Any, loader: Loader
) -> tuple[list[Pieces], list[int]]:
    """Token ids, types and labels of each row, cut to `max_length`; and the lengths before the cut."""
    spaced = _needs_spaces(tokenizer)
    texts = [[" " + w if i and spaced else w for i, w in enumerate(r["tokens"])] for r in rows]

    def encode(chosen: Sequence[int], **options: Any) -> dict[int, Pieces]:
        if not chosen:
            return {}
        made = tokenizer(
            [texts[i] for i in chosen], is_split_into_words=True, return_token_type_ids=True,
            return_attention_mask=False, verbose=False, **options,
        )  # fmt: skip
        pieces = zip(
            chosen, made["input_ids"], made["token_type_ids"], map(made.word_ids, range(len(chosen))), strict=True
        )
        return {i: (ids, types, _firsts(words, classes[i])) for i, ids, types, words in pieces}

    found = encode(range(len(rows)))
    full = [len(found[i][0]) for i in range(len(rows))]
    long = [i for i, n in enumerate(full) if n > loader.max_length]
    found |= encode(long, truncation=True, max_length=loader.max_length)
    return [found[i] for i in range(len(rows))], full


def _firsts(words: Sequence[int | None], classes: Sequence[int]) -> list[int]:
    """The label of each piece: its word's at the first piece, else `IGNORED`."""
    before = [None, *words[:-1]]
    return [IGNORED if w is None or w == b else classes[w] for w, b in zip(words, before, strict=True)]


def _needs_spaces(tokenizer: Any) -> bool:
    """Whether the tokenizer reads a list of words as if there were no spaces between them (byte-level, without a prefix)."""
    return tokenizer(["a", "b"], is_split_into_words=True)["input_ids"] != tokenizer("a b")["input_ids"]
