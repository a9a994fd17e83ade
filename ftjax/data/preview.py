"""A look at the very tokens that reach the loss: text in spans, each trained or masked.

for example in preview(prepared.train, tokenizer, n=2):
    for span in example.spans:
        print(span.text, "trained" if span.trained else "masked")
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftjax.data.batches import Example, Examples


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


def preview(examples: Examples, tokenizer: PreTrainedTokenizerBase, n: int = 2) -> list[PreviewExample]:
    """The first n examples, decoded."""
    return [_show(examples[i], tokenizer) for i in range(min(n, len(examples)))]


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
