"""What stands on top of a model, as data: an objective asks for it, a family builds it, files name it."""

from __future__ import annotations

import dataclasses as dc

VOCABULARY = ("causal_lm", "masked_lm", "seq2seq_lm")
"""Heads that predict tokens. They come with the pretrained weights; all others are new and always trained."""


@dc.dataclass(frozen=True)
class HeadSpec:
    """What stands on top of a model.

    Attributes:
      kind: one of the family's `heads`: causal_lm, masked_lm, sequence_classification, token_classification,
        question_answering, value (a number per token), image_classification, ...; empty: the family's first.
      labels: names of the outputs, in order; empty for language models.
      problem: of a sequence classification, as transformers' ``problem_type``: regression,
        single_label_classification, multi_label_classification; empty: not said.
    """

    kind: str = ""
    labels: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_vocabulary(self) -> bool:
        """Whether it predicts tokens; such a head is pretrained, others are new and always trained."""
        return self.kind in VOCABULARY


def label_names(n: int) -> tuple[str, ...]:
    """transformers' names of outputs that have none."""
    return tuple(f"LABEL_{i}" for i in range(n))
