r"""Reasoning in steps, each judged right or wrong: rows to examples, for process reward models.

    typed = type_rows(rows)                                     # prompt, completions, labels
    encoded = encode_steps(typed, tokenizer, Loader(max_length=512), separator="\n")
    encoded.examples.build([[0], [1]], 512)                     # TagBatch of two rows

As TRL's PRM trainer: the prompt after a BOS if the tokenizer has one, then every step with the separator behind it, each
tokenized on its own. The last token of a step with its separator carries the label; the model has read the whole step there.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.encode import Encoded
from ftjax.data.formats import DatasetType, TypedRows, shown
from ftjax.data.rows import BadRows, Row
from ftjax.data.tags import IGNORED, Pieces, TagExamples, finish
from ftjax.errors import DataError

WRONG, RIGHT = "wrong", "right"


def encode_steps(
    typed: TypedRows,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    *,
    separator: str = "",
    last_only: bool = False,
    bad: BadRows | None = None,
    read: int | None = None,
    required: bool = True,
    like: TagExamples | None = None,
    **_: Any,
) -> Encoded:
    """Tokenizes prompts and steps and puts the labels at the ends of the steps.

    Args:
      typed: rows of prompt, completions, labels.
      tokenizer: a fast tokenizer.
      loader: max_length, truncation.
      separator: text behind every step.
      last_only: of training rows only the last step is labelled.
      bad: malformed rows so far; takes those with an empty step.
      read: rows read from the files, for the report.
      required: having no example left is an error.
      like: training examples, where these are held-out rows.

    Raises:
      DataError: other columns; a row without a step, or a step without a token; texts too long; nothing is left.
    """
    if typed.type != DatasetType("stepwise_supervision", False):
        raise DataError(
            f"expected stepwise_supervision rows (columns prompt, completions, labels); these are {typed.type}: "
            f"{shown(typed.rows)}"
        )
    bad = bad or BadRows()
    rows, made = [], []
    for row in typed.rows:
        pieces = _pieces(row, tokenizer, separator, bad)
        if pieces:
            rows.append(row)
            made.append(_only_last(pieces) if last_only and like is None else pieces)
    full = [len(ids) for ids, _, _ in made]
    cut = [
        (ids[: loader.max_length], types[: loader.max_length], tags[: loader.max_length]) for ids, types, tags in made
    ]
    kinds = {tag for _, _, tags in made for tag in tags} - {IGNORED}
    if len(kinds) == 1 and required and like is None:
        raise DataError(
            f"every judged step of {len(rows)} rows is {(WRONG, RIGHT)[min(kinds)]} (the first row is {rows[0].origin}): "
            "there is nothing to tell apart. Add rows with the other label in 'labels'"
        )
    return finish(cut, full, rows, (WRONG, RIGHT), loader, bad=bad, read=read, required=required)


def _pieces(row: Row, tokenizer: Any, separator: str, bad: BadRows) -> Pieces | None:
    """Token ids, types and labels of one row; None, and a note in `bad`, where a step has no token."""
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if not row["completions"]:
        bad.add(f"{row.origin}: field 'completions' is empty")
        return None
    texts = [row["prompt"], separator, *row["completions"]]
    prompt, end, *steps = (tokenizer(t, **plain)["input_ids"] if t else [] for t in texts)
    ids = ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + prompt
    tags = [IGNORED] * len(ids)
    for i, (step, label) in enumerate(zip(steps, row["labels"], strict=True)):
        if not step:
            bad.add(f"{row.origin}: step {i} of 'completions' is empty")
            return None
        ids = ids + step + end
        tags += [IGNORED] * (len(step) + len(end) - 1) + [int(label)]
    return ids, [0] * len(ids), tags


def _only_last(pieces: Pieces) -> Pieces:
    ids, types, tags = pieces
    return ids, types, [IGNORED] * (len(tags) - 1) + [tags[-1]]
