"""A look at the very tokens that reach the loss: text in spans, each trained or masked.

for example in preview(prepared.train, tokenizer, n=2):
    for span in example.spans:
        print(span.text, "trained" if span.trained else "masked")
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftjax.data.batches import Example, Examples
from ftjax.data.labels import LabelledExamples
from ftjax.data.pairs import PairExamples
from ftjax.data.seq2seq import SeqExamples
from ftjax.data.spans import SpanExamples
from ftjax.data.tags import IGNORED, TagExamples


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are all trained, or all masked; decoded, special tokens shown."""

    text: str
    trained: bool


@dataclass(frozen=True)
class PreviewExample:
    """One example to show.

    Attributes:
      origin: place of its row.
      spans: the text; the texts joined are the whole example.
      tokens: number of tokens.
      trained: number of trained ones.
      trains_eos: an EOS is among the trained tokens, so the model can learn to stop.
    """

    origin: str
    spans: tuple[Span, ...]
    tokens: int
    trained: int
    trains_eos: bool


@singledispatch
def preview(examples: Any, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    """The first n examples, decoded; nothing where they are no texts."""
    return []


@preview.register
def _texts(examples: Examples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    return [_show(examples[i], tokenizer) for i in range(min(n, len(examples)))]


@preview.register
def _pairs(examples: PairExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    judged = examples.kind == "judged"
    found = []
    for i in range(min(n, len(examples))):
        names = ("good" if examples.labels[i] else "bad",) if judged else ("chosen", "rejected")
        for name, side in zip(names, (examples.first, examples.second), strict=False):
            shown = _show(side[i], tokenizer)
            found.append(replace(shown, origin=f"{shown.origin} ({name})"))
    return found


@preview.register
def _answered(examples: SeqExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    found = []
    for i in range(min(n, len(examples))):
        read, said = examples.sources[i].input_ids, examples.answers[i].input_ids
        source, answer = (str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)) for ids in (read, said))
        spans = (Span(source, False), Span(f" -> {answer}", True))
        stops = bool((said == tokenizer.eos_token_id).any())
        found.append(PreviewExample(examples.origin(i), spans, len(read) + len(said), len(said), stops))
    return found


@preview.register
def _labelled(examples: LabelledExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    found = []
    for i in range(min(n, len(examples))):
        ids = examples.input_ids[examples.offsets[i] : examples.offsets[i + 1]]
        text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
        spans = (Span(text, False), Span(f" -> {examples.label(i)}", True))
        found.append(PreviewExample(examples.origin(i), spans, len(ids), 1, True))
    return found


@preview.register
def _tagged(examples: TagExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    found = []
    for i in range(min(n, len(examples))):
        part = slice(examples.offsets[i], examples.offsets[i + 1])
        ids, tags = examples.input_ids[part], examples.tags[part]
        at = np.flatnonzero(tags != IGNORED)
        spans, shown = [], 0
        for t in at.tolist():
            spans.append(Span(str(tokenizer.decode(ids[shown : t + 1].tolist(), skip_special_tokens=False)), False))
            spans.append(Span(f" -> {examples.names[int(tags[t])]} ", True))
            shown = t + 1
        spans.append(Span(str(tokenizer.decode(ids[shown:].tolist(), skip_special_tokens=False)), False))
        found.append(PreviewExample(examples.origin(i), tuple(spans), len(ids), len(at), True))
    return found


@preview.register
def _asked(examples: SpanExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    found = []
    for i in range(min(n, len(examples))):
        ids = examples.input_ids[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        start, end = (int(x) for x in examples.spans[i])
        pieces = (ids[:start], ids[start : end + 1], ids[end + 1 :])
        spans = (
            Span(str(tokenizer.decode(piece, skip_special_tokens=False)), k == 1)
            for k, piece in enumerate(pieces)
            if piece
        )
        found.append(PreviewExample(examples.origin(i), tuple(spans), len(ids), end - start + 1, True))
    return found


def _show(example: Example, tokenizer: PreTrainedTokenizerBase) -> PreviewExample:
    trained = example.weights > 0
    stops = [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(example)]
    spans, shown = [], ""
    for stop in stops:  # decode the beginning up to each border: a span decoded alone loses its leading space
        text = str(tokenizer.decode(example.input_ids[:stop].tolist(), skip_special_tokens=False))
        spans.append(Span(text[len(shown) :], bool(trained[stop - 1])))
        shown = text
    stops_learnt = bool((trained & (example.input_ids == tokenizer.eos_token_id)).any())
    return PreviewExample(example.origin, tuple(spans), len(example), int(trained.sum()), stops_learnt)
