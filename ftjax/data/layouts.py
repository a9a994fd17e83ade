"""How the rows of a data set become the batches of an objective: one `Layout` per kind of batch.

    layout = layout_of(objective.batch)
    typed = layout.type_rows(rows, columns=task.columns, bad=bad)
    encoded = layout.encode(typed, tokenizer, loader)
    encoded.examples.build([[0], [1]], 512)              # a batch of numpy arrays

All examples offer ``len``, ``lengths``, ``rows``, ``origins``, ``origin(i)``, ``take(indices)`` and
``build(rows, length, count=, key=)``, where `key` is for what is drawn anew each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from ftjax.data.batches import Examples, TokenBatch
from ftjax.data.encode import Encoded, encode
from ftjax.data.formats import TypedRows, type_rows
from ftjax.data.labels import LabelBatch, LabelledExamples, encode_labelled, type_labelled
from ftjax.data.masking import MaskBatch, MaskedExamples, encode_masked
from ftjax.data.pairs import PairBatch, PairExamples, encode_judged, encode_pairs
from ftjax.data.seq2seq import SeqBatch, SeqExamples, encode_seq2seq
from ftjax.data.spans import SpanBatch, SpanExamples, encode_questions, type_questions
from ftjax.data.steps import encode_steps
from ftjax.data.tags import TagBatch, TagExamples, encode_tagged, type_tagged


@dataclass(frozen=True)
class Layout:
    """One kind of batch.

    Attributes:
      name: for the cache.
      examples: class of the encoded examples.
      type_rows: ``(rows, columns=, bad=) -> TypedRows``.
      encode: ``(typed, tokenizer, loader, template=, wrap=, bad=, read=, required=, like=) -> Encoded``.
      packs: whether several examples may share a row.
      tokens: whether it needs a tokenizer.
    """

    name: str
    examples: type
    type_rows: Callable[..., TypedRows]
    encode: Callable[..., Encoded]
    packs: bool = False
    tokens: bool = True


def _encode_text(*args: Any, like: Any = None, **options: Any) -> Encoded:
    return encode(*args, **options)


TEXT = Layout("text", Examples, type_rows, _encode_text, packs=True)
_LAYOUTS: dict[tuple[type, str], Layout] = {
    (TokenBatch, ""): TEXT,
    (MaskBatch, ""): Layout("masked", MaskedExamples, type_rows, encode_masked, packs=True),
    (LabelBatch, ""): Layout("labelled", LabelledExamples, type_labelled, encode_labelled),
    (TagBatch, ""): Layout("tagged", TagExamples, type_tagged, encode_tagged),
    (TagBatch, "steps"): Layout("steps", TagExamples, type_rows, encode_steps),
    (SpanBatch, ""): Layout("spans", SpanExamples, type_questions, encode_questions),
    (SeqBatch, ""): Layout("seq2seq", SeqExamples, type_rows, encode_seq2seq),
    (PairBatch, ""): Layout("pairs", PairExamples, type_rows, encode_pairs),
    (PairBatch, "judged"): Layout("judged", PairExamples, type_rows, encode_judged),
}


def layout_of(objective: Any) -> Layout:
    """The layout of an objective's batches: by its ``batch`` class, and ``rows`` where one class has several."""
    return _LAYOUTS[objective.batch, getattr(objective, "rows", "")]


def add_layout(batch: type, layout: Layout, rows: str = "") -> None:
    """Makes a further kind of batch known."""
    _LAYOUTS[batch, rows] = layout


# Arrays of examples, for the cache and for fingerprints ------------------------------------------------------------------


def arrays_of(examples: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Every array of encoded examples by dotted name."""
    found: dict[str, np.ndarray] = {}
    for f in fields(examples):
        value = getattr(examples, f.name)
        if isinstance(value, np.ndarray):
            found[prefix + f.name] = value
        elif is_dataclass(value):
            found |= arrays_of(value, f"{prefix}{f.name}.")
    return found


def meta_of(examples: Any) -> dict[str, Any]:
    """Everything else of encoded examples, JSON-like, nested as they are."""
    found: dict[str, Any] = {}
    for f in fields(examples):
        value = getattr(examples, f.name)
        if is_dataclass(value):
            found[f.name] = meta_of(value)
        elif not isinstance(value, np.ndarray):
            found[f.name] = value
    return found


def restored(kind: type, arrays: dict[str, np.ndarray], meta: dict[str, Any], prefix: str = "") -> Any:
    """Encoded examples from `arrays_of` and `meta_of`."""
    values: dict[str, Any] = {}
    for f in fields(kind):
        if prefix + f.name in arrays:
            values[f.name] = arrays[prefix + f.name]
        elif isinstance(meta[f.name], dict):
            values[f.name] = restored(Examples, arrays, meta[f.name], f"{prefix}{f.name}.")
        else:
            values[f.name] = tuple(meta[f.name]) if isinstance(meta[f.name], list) else meta[f.name]
    return kind(**values)


def identity(examples: Any) -> dict[str, Any]:
    """What says that these are the same examples in the same order (not where they came from)."""
    digest = hashlib.sha256()
    tokens = 0
    for name, array in arrays_of(examples).items():
        if name.rsplit(".", 1)[-1] == "rows":
            continue
        tokens += array.size if name.rsplit(".", 1)[-1] == "input_ids" else 0
        digest.update(np.ascontiguousarray(array).data)
    return {"count": len(examples), "tokens": tokens, "sha256": digest.hexdigest()}
