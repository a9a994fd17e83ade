"""Texts with a label or a number each: rows to examples to batches, for classification and regression.

    typed = type_labelled(rows, columns=("label=category",))
    encoded = encode_labelled(typed, tokenizer, Loader(max_length=64))
    encoded.examples.names                      # ("activate_my_card", ...)
    encoded.examples.build([0, 1], 64)          # LabelBatch of two rows

Columns: ``text`` (and ``text_pair``), ``label``. A label is a class (a text, a number or a truth value), a list of classes
(multi-label), or a number with a fraction (regression). The classes are those that the data set names, else those of the
training rows, numbers in their order, texts alphabetically.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import Flat, flatten, offsets_of
from ftjax.data.encode import Encoded, EncodeReport
from ftjax.data.formats import DatasetType, TypedRows, rename
from ftjax.data.rows import BadRows, Row, number
from ftjax.errors import DataError, did_you_mean

REGRESSION, SINGLE, MULTI = "regression", "single_label_classification", "multi_label_classification"
"""Kinds of problem, as transformers' ``problem_type`` names them."""

_PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
)
_TEXT_NAMES = ("text", "sentence", "content")


@struct.dataclass
class LabelBatch:
    """Rows of one text each; leading axes are free: [B, T] or [accumulate, B, T].

    Attributes:
      tokens: token ids; 0 at padding.
      positions: 0, 1, ...
      segments: 0, and `PAD_SEGMENT` at padding.
      types: 1 in the second text of a pair, as the tokenizer says.
      labels: class [B] int32; value [B] float32; or classes [B, C] float32 of 0 and 1.
      weights: of each row [B]; 0 for rows that only fill the batch.
    """

    tokens: Int32[Any, "*b t"]
    positions: Int32[Any, "*b t"]
    segments: Int32[Any, "*b t"]
    types: Int32[Any, "*b t"]
    labels: Any
    weights: Float32[Any, "*b"]


@dataclass(frozen=True)
class LabelledExamples(Flat):
    """Encoded texts with their labels.

    Attributes:
      types: token types, [N].
      labels: [examples], or [examples, classes].
      names: of the classes; one name for a regression.
      problem: regression, single_label_classification or multi_label_classification.
    """

    types: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    problem: str

    per_token: ClassVar[tuple[str, ...]] = ("input_ids", "types")
    per_text: ClassVar[tuple[str, ...]] = ("rows", "labels")

    def label(self, i: int) -> str:
        """The label of example i as text."""
        value = self.labels[i]
        if self.problem == REGRESSION:
            return f"{float(value):g}"
        chosen = np.flatnonzero(value) if self.problem == MULTI else [int(value)]
        return ", ".join(self.names[j] for j in chosen) or "(none)"

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> LabelBatch:
        """A batch with one text per row; rows beyond `rows` are padding with weight 0."""
        p, used = self.padded(rows, length, count), [i for (i,) in rows]
        labels = np.zeros((len(p.real), *self.labels.shape[1:]), self.labels.dtype)
        labels[: len(used)] = self.labels[used]
        weights = (np.arange(len(p.real)) < len(used)).astype(np.float32)
        return LabelBatch(p.of(self.input_ids), p.positions, p.segments, p.of(self.types), labels, weights)


# Rows ------------------------------------------------------------------------------------------------------------------


def type_labelled(rows: Sequence[Row], *, columns: Sequence[str] = (), bad: BadRows | None = None) -> TypedRows:
    """Checks that every row has a text and a label; pairs by GLUE's column names count as text and text_pair.

    Raises:
      ConfigError: a rename is malformed.
      DataError: a column is missing, or a value has the wrong type.
    """
    bad = bad or BadRows()
    kept = []
    for row in rename(rows, columns):
        row = _named(row)
        problem = _problem(row)
        if problem:
            bad.add(f"{row.origin}: {problem}")
        else:
            kept.append(row)
    pairs = sum("text_pair" in row for row in kept)
    if 0 < pairs < len(kept):
        kept = [row for row in kept if not _odd_pair(row, pairs, len(kept), bad)]
    if not kept:
        raise DataError(f"no labelled rows are left of {len(rows)}: {bad.summary()}")
    return TypedRows(DatasetType("labelled", False), kept)


def _odd_pair(row: Row, pairs: int, rows: int, bad: BadRows) -> bool:
    """Whether a row is one text among pairs, or a pair among single texts; notes it."""
    odd = ("text_pair" in row) != (2 * pairs >= rows)
    if odd:
        has = "a pair of texts" if "text_pair" in row else "one text, no 'text_pair'"
        bad.add(f"{row.origin}: the row has {has}, but {pairs:,} of {rows:,} rows have pairs")
    return odd


def _named(row: Row) -> Row:
    pair = next((p for p in _PAIR_NAMES if all(c in row for c in p)), None)
    text = next((c for c in _TEXT_NAMES if c in row), None)
    if "text" not in row and pair:
        return Row({**row, "text": row[pair[0]], "text_pair": row[pair[1]]}, row.origin)
    return Row({**row, "text": row[text]}, row.origin) if text and text != "text" else row


def _problem(row: Row) -> str:
    for column in ("text", "label"):
        if column not in row:
            hint = did_you_mean(column, row)
            return (
                f"no column {column!r}.{hint} Columns: {', '.join(row)}. Labelled rows have text (or a pair such as "
                "premise, hypothesis) and label; rename with data.columns=('label=category',)"
            )
    for column in ("text", "text_pair"):
        if column in row and not isinstance(row[column], str):
            return f"field {column!r} expected a string, got {row[column]!r}"
    if not row["text"].strip() and not row.get("text_pair", "").strip():
        return "field 'text' is empty: there is nothing to read"
    label = row["label"]
    parts = label if isinstance(label, list) else [label]
    if label is None or not all(isinstance(x, str | int | float) for x in parts):
        return f"field 'label' expected a class, a number or a list of classes, got {label!r}"
    if any(isinstance(x, float) and not math.isfinite(x) for x in parts):
        return f"field 'label' expected a class or a finite number, got {label!r}"
    return "field 'label' is empty" if any(isinstance(x, str) and not x.strip() for x in parts) else ""


def problem_of(labels: Sequence[Any]) -> str:
    """Which kind of problem the labels pose."""
    if any(isinstance(x, list) for x in labels):
        return MULTI
    numbers = [x for x in (_number(x) for x in labels) if x is not None]
    fractions = len(numbers) == len(labels) and any(not float(x).is_integer() for x in numbers)
    return REGRESSION if fractions else SINGLE


def _number(x: Any) -> float | None:
    try:
        return float(x)
    except (TypeError, ValueError):
        return None


def class_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """Every class once: whole numbers in their order, anything else alphabetically."""
    found = {class_of(y) for x in labels for y in (x if isinstance(x, list) else [x])}
    whole = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int) if whole else sorted(found))


def class_of(label: Any) -> str:
    """The name of a class: 1.0 is the class 1."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


_KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list"}


def odd_ones(rows: Sequence[Row], labels: Callable[[Row], Iterable[Any]], bad: BadRows) -> list[Row]:
    """The rows whose labels are of the kind that most have (texts, numbers, truth values, lists); the others go to `bad`."""
    kinds = [{_KINDS[type(x)] for x in labels(row)} for row in rows]
    counts = Counter(k for found in kinds for k in found)
    if len(counts) < 2:
        return list(rows)
    usual = counts.most_common(1)[0][0]
    example = next(row for row, found in zip(rows, kinds, strict=True) if found == {usual})
    kept = []
    for row, found in zip(rows, kinds, strict=True):
        if found <= {usual}:
            kept.append(row)
        else:
            bad.add(
                f"{row.origin}: mixed labels: this row has {' and '.join(sorted(found - {usual}))}, "
                f"{counts[usual]:,} of {len(rows):,} have {usual}, e.g. {example.origin}"
            )
    return kept


# Encoding --------------------------------------------------------------------------------------------------------------


def encode_labelled(
    typed: TypedRows,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    *,
    wanted: Literal["", "classes", "number"] = "",
    bad: BadRows | None = None,
    read: int | None = None,
    required: bool = True,
    like: LabelledExamples | None = None,
    **_: Any,
) -> Encoded:
    """Tokenizes the texts with the special tokens of the tokenizer and numbers the labels.

    Args:
      typed: labelled rows.
      tokenizer: a fast tokenizer.
      loader: max_length, truncation.
      wanted: what the objective learns; empty: as the labels look.
      bad: malformed rows so far; takes those whose label does not fit.
      read: rows read from the files, for the report.
      required: having no example left is an error.
      like: training examples whose classes held-out rows must have.

    Raises:
      DataError: a label that the training rows do not have, only one class, texts too long, nothing is left.
    """
    bad = bad or BadRows()
    problem = like.problem if like else _problem_for(typed, wanted)
    rows = typed.rows if like or typed.names else _fitting(typed.rows, problem, bad)
    labels = [r["label"] for r in rows]
    names = like.names if like else typed.names or (("value",) if problem == REGRESSION else class_names(labels))
    rows, values = _values(
        rows, names, problem, bad, where=f"the {len(names)} {'of the training rows' if like else 'classes'}"
    )
    if not rows and required:
        raise DataError(f"no labelled rows are left of {len(typed.rows)}: {bad.summary()}")
    if like is None:
        _check_apart(rows, values, names, problem)
    ids, types, full, kept = tokenized(rows, tokenizer, loader)
    long = [i for i, n in enumerate(full) if n > loader.max_length]
    dropped = len(rows) - len(kept)
    if not kept and required:
        raise DataError(
            f"all {len(rows)} texts are longer than loader.max_length={loader.max_length}, and loader.truncation=drop. The "
            f"shortest has {min(full):,} tokens, the longest {max(full):,}"
        )
    examples = LabelledExamples(
        input_ids=flatten([ids[i] for i in kept]), types=flatten([types[i] for i in kept]), labels=values[kept],
        offsets=offsets_of(len(ids[i]) for i in kept), rows=np.asarray(kept, np.int64), names=names, problem=problem,
        origins=tuple(r.origin for r in rows),
    )  # fmt: skip
    report = EncodeReport(
        read=len(rows) + bad.count if read is None else read, skipped_bad=bad.count, dropped=dropped,
        truncated=len(long) if loader.truncation == "right" else 0, examples=len(kept), tokens=len(examples.input_ids),
        trained_tokens=len(examples.input_ids), longest=max(full, default=0),
        warnings=tuple(_warnings(examples, bad, long, loader)),
    )  # fmt: skip
    return Encoded(examples, report)


def tokenized(rows: Sequence[Row], tokenizer: Any, loader: Loader) -> tuple[list, list, list[int], list[int]]:
    """(token ids, token types, lengths before any cut, rows kept); what is too long is cut, dropped or refused.

    Raises:
      DataError: a text is too long and `loader.truncation` is "error".
    """
    pairs = [r["text_pair"] for r in rows] if all("text_pair" in r for r in rows) else None

    def encode(chosen: Sequence[int], **options: Any) -> tuple[list, list]:
        second = None if pairs is None else [pairs[i] for i in chosen]
        first = [rows[i]["text"] for i in chosen]
        made = tokenizer(
            first, second, return_token_type_ids=True, return_attention_mask=False, verbose=False, **options
        )
        return made["input_ids"], made["token_type_ids"]

    kept = list(range(len(rows)))
    ids, types = encode(kept) if rows else ([], [])
    full = [len(x) for x in ids]
    long = [i for i, n in enumerate(full) if n > loader.max_length]
    if long and loader.truncation == "error":
        raise DataError(
            f"{len(long)} of {len(rows)} texts are longer than loader.max_length={loader.max_length}: "
            f"{', '.join(rows[i].origin for i in long[:3])}"
        )
    if long and loader.truncation == "drop":
        return ids, types, full, [i for i in kept if full[i] <= loader.max_length]
    if long:
        cut = encode(long, truncation=True, max_length=loader.max_length)
        for i, cut_ids, cut_types in zip(long, *cut, strict=True):
            ids[i], types[i] = cut_ids, cut_types
    return ids, types, full, kept


def _problem_for(typed: TypedRows, wanted: str) -> str:
    """The kind of problem: as the data set says, else what the objective learns, else as the labels look."""
    labels = [r["label"] for r in typed.rows]
    if wanted == "number":
        return typed.problem or REGRESSION
    if wanted == "classes" and not typed.problem:
        return MULTI if any(isinstance(x, list) for x in labels) else SINGLE
    return typed.problem or problem_of(labels)


def _fitting(rows: Sequence[Row], problem: str, bad: BadRows) -> list[Row]:
    """The rows whose labels are classes of one kind; the others go to `bad`. Numbers are looked at later."""
    if problem == REGRESSION:
        return list(rows)
    kept, numbers = [], all(_number(r["label"]) is not None for r in rows)
    for row in rows:
        whole = (float(x).is_integer() for x in [row["label"]] if numbers or isinstance(x, float))
        if all(whole):
            kept.append(row)
        else:
            bad.add(
                f"{row.origin}: label {row['label']!r} is a number that is not whole, and a class is a whole number or a text. "
                "Numbers are learned with objective=regression"
            )
    return odd_ones(kept, lambda row: [row["label"]], bad)


def _check_apart(rows: Sequence[Row], values: np.ndarray, names: tuple[str, ...], problem: str) -> None:
    """Raises a `DataError` where all rows have one label: nothing can be learned from them."""
    if problem == REGRESSION:
        if len(rows) > 1 and len(np.unique(values)) == 1:
            raise DataError(
                f"every row has the number {values[0]:g} ({len(rows):,} rows, the first is {rows[0].origin}): there is "
                "nothing to learn. Is another column meant? Rename it with data.columns=('label=score',)"
            )
    elif len(names) < 2:
        raise DataError(
            f"every row has the label {', '.join(names) or '(none)'}: there is nothing to tell apart ({len(rows):,} rows, "
            f"the first is {rows[0].origin}). Is another column meant? Rename it with data.columns=('label=category',)"
        )


def _values(
    rows: Sequence[Row], names: tuple[str, ...], problem: str, bad: BadRows, *, where: str
) -> tuple[list[Row], np.ndarray]:
    """The rows whose labels fit, and these as numbers; the others go to `bad`."""
    index = {name: i for i, name in enumerate(names)}
    kept, values = [], np.zeros((len(rows), 1 if problem == REGRESSION else len(names)), np.float32)
    for row in rows:
        given = row["label"] if problem != REGRESSION and isinstance(row["label"], list) else [row["label"]]
        unknown = next((x for x in given if problem != REGRESSION and class_of(x) not in index), None)
        if problem == REGRESSION and not math.isfinite(number(row["label"])):
            bad.add(f"{row.origin}: field 'label' expected a finite number, got {row['label']!r}")
        elif unknown is not None:
            bad.add(f"{row.origin}: label {unknown!r} is not among {where}.{_known(unknown, names)}")
        else:
            at = [0] if problem == REGRESSION else [index[class_of(x)] for x in given]
            values[len(kept), at] = number(row["label"]) if problem == REGRESSION else 1.0
            kept.append(row)
    values = values[: len(kept)]
    if problem == REGRESSION:
        return kept, values[:, 0]
    return kept, values if problem == MULTI else values.argmax(1).astype(np.int32)


def _known(label: Any, names: tuple[str, ...]) -> str:
    """The classes that there are, for an error."""
    return did_you_mean(str(label), names) or f" Known: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"


def _warnings(examples: LabelledExamples, bad: BadRows, long: list[int], loader: Loader) -> Iterable[str]:
    if bad.count:
        yield bad.summary()
    if long:
        what = "cut to" if loader.truncation == "right" else "left out, longer than"
        yield f"{len(long):,} texts are {what} loader.max_length={loader.max_length}"
    if examples.problem == SINGLE and len(examples):
        counts = Counter(examples.labels.tolist())
        most, least = max(counts.values()), min(counts.get(i, 0) for i in range(len(examples.names)))
        if most > 20 * max(least, 1):
            yield f"the classes are uneven: the largest has {most:,} rows, the smallest {least:,}"
