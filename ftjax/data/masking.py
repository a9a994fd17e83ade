"""Masked texts for BERT-like models: which tokens are hidden is a function of (seed, place in the run), so runs resume exactly.

    encoded = encode_masked(typed, tokenizer, Loader(max_length=128), share=0.15, whole_word=False)
    encoded.examples.build([[0, 1]], 128, key=(seed, index))         # MaskBatch

Of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay (Devlin et al. 2018, arXiv:1810.04805, 3.1);
drawn anew each time a row is built, as RoBERTa does (arXiv:1907.11692, section 4.1). Special tokens are never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import Derived, Examples, build_rows, flatten, offsets_of
from ftjax.data.encode import ENCODE_BATCH, Encoded, EncodeReport, encode
from ftjax.data.formats import DatasetType, TypedRows
from ftjax.data.rows import BadRows
from ftjax.errors import DataError

MASKED, RANDOM = 0.8, 0.1


def capacity(length: int, share: float) -> int:
    """Most tokens that are chosen in a row of `length`, so that the vocabulary's logits are needed for those alone."""
    return min(length, math.ceil(1.5 * share * length) + 4)


@struct.dataclass
class MaskBatch:
    """Rows of packed or padded texts with hidden tokens; leading axes are free: [B, T] or [accumulate, B, T].

    Attributes:
      tokens: token ids, some hidden; 0 at padding.
      targets: the ids as they were.
      positions, segments: as in `TokenBatch`.
      weights: 1 where a token was chosen.
    """

    tokens: Int32[Any, "*b t"]
    targets: Int32[Any, "*b t"]
    positions: Int32[Any, "*b t"]
    segments: Int32[Any, "*b t"]
    weights: Float32[Any, "*b t"]


@dataclass(frozen=True)
class MaskedExamples(Derived):
    """Encoded texts, and what is needed to hide some of their tokens.

    Attributes:
      texts: token ids; their weights are 0 at special tokens.
      begins: whether a token begins a word, [N]; all true when words are not kept together.
      numbers: [share of chosen tokens, mask token id, vocabulary size].
    """

    texts: Examples
    begins: np.ndarray
    numbers: np.ndarray

    @property
    def underlying(self) -> Examples:
        """See `Derived`."""
        return self.texts

    def take(self, indices: np.ndarray) -> MaskedExamples:
        """The texts at `indices`, in that order."""
        starts = self.texts.offsets
        parts = [self.begins[starts[i] : starts[i + 1]] for i in indices]
        return replace(self, texts=self.texts.take(indices), begins=np.concatenate(parts or [self.begins[:0]]))

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> MaskBatch:
        """A batch of rows that hold the texts with these indices; what is hidden depends on `key` and the row alone."""
        plain = build_rows([[self.texts[i] for i in row] for row in rows], length, count=count)
        tokens, chosen = plain.tokens.copy(), np.zeros(plain.tokens.shape, np.float32)
        starts = self.texts.offsets
        for r, row in enumerate(rows):
            n = sum(int(starts[i + 1] - starts[i]) for i in row)
            begins = np.concatenate([self.begins[starts[i] : starts[i + 1]] for i in row] or [self.begins[:0]])
            able = np.concatenate([self.texts[i].weights for i in row] or [np.zeros(0, np.float32)]) > 0
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, r))))
            hidden, hit = self._hide(plain.tokens[r, :n], able, begins, rng, capacity(length, float(self.numbers[0])))
            tokens[r, :n], chosen[r, :n] = hidden, hit
        return MaskBatch(tokens, plain.tokens, plain.positions, plain.segments, chosen)

    def _hide(
        self, ids: np.ndarray, able: np.ndarray, begins: np.ndarray, rng: np.random.Generator, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids with some hidden, which at `most` were chosen) of one row; all tokens of a word share one draw."""
        share, mask, vocab = float(self.numbers[0]), int(self.numbers[1]), int(self.numbers[2])
        word = np.maximum(np.cumsum(begins) - 1, 0)
        draws = rng.random(len(ids))[word]
        chosen = (draws < share) & able
        if chosen.sum() > most:  # whole words, those with the smallest draws
            chosen &= draws < np.sort(draws[chosen])[most]
        fate = rng.random(len(ids))[word]
        hidden = np.where(chosen & (fate < MASKED), mask, ids)
        other = chosen & (fate >= MASKED) & (fate < MASKED + RANDOM)
        return np.where(other, rng.integers(0, vocab, len(ids)), hidden).astype(np.int32), chosen.astype(np.float32)


def encode_masked(
    typed: TypedRows, tokenizer: PreTrainedTokenizerBase, loader: Loader, *, share: float = 0.15,
    whole_word: bool = False, like: Any = None, **options: Any,
) -> Encoded:  # fmt: skip
    """Tokenizes texts with the tokenizer's own special tokens.

    Args:
      typed: rows of texts.
      tokenizer: a fast tokenizer with a mask token.
      loader: see `encode`.
      share: of the tokens that are chosen.
      whole_word: choose whole words.
      like: not needed.
      options: see `encode`.

    Raises:
      DataError: the tokenizer has no mask token; see `encode`.
    """
    if tokenizer.mask_token_id is None:
        raise DataError("the tokenizer has no mask token: masked language modelling needs one (a BERT-like tokenizer)")
    if options.get("wrap") and typed.type == DatasetType("language_modeling", False):
        made = _pieces(typed, tokenizer, loader, **{k: v for k, v in options.items() if k in ("bad", "read")})
    else:
        made = encode(typed, tokenizer, loader.model_copy(update={"loss_on": "all"}), **options)
    texts: Examples = made.examples
    special = np.isin(texts.input_ids, np.asarray(tokenizer.all_special_ids))
    texts = replace(texts, weights=(~special).astype(np.float32))
    texts, made = _with_words(texts, made, bool(options.get("required", True)))
    special = texts.weights == 0
    begins = np.ones(len(texts.input_ids), bool)
    if whole_word:
        ids = np.unique(texts.input_ids)
        pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
        begins = np.isin(texts.input_ids, ids[_begin_words([str(p) for p in pieces], tokenizer)])
        begins[texts.offsets[:-1][texts.lengths > 0]] = True
        begins |= special
    numbers = np.asarray([share, int(tokenizer.mask_token_id), len(tokenizer)], np.float64)  # type: ignore[arg-type]
    warnings = tuple(w for w in made.report.warnings if "EOS" not in w)
    trained = int((~special).sum() * share)
    return Encoded(
        MaskedExamples(texts, begins, numbers), replace(made.report, warnings=warnings, trained_tokens=trained)
    )


def _with_words(texts: Examples, made: Encoded, required: bool) -> tuple[Examples, Encoded]:
    """The texts that have more than special tokens, and a report that counts the others.

    Raises:
      DataError: none is left.
    """
    found = np.asarray([bool(texts.weights[texts.part(i)].any()) for i in range(len(texts))], bool)
    if found.all():
        return texts, made
    first = texts.origin(int(np.flatnonzero(~found)[0]))
    empty = int((~found).sum())
    if required and not found.any():
        raise DataError(f"all {len(texts)} texts are empty, e.g. {first}: there is no token that could be masked")
    r, kept = made.report, texts.take(np.flatnonzero(found))
    warnings = (*r.warnings, f"{empty:,} texts are empty and are left out, e.g. {first}")
    counts = {"examples": len(kept), "tokens": len(kept.input_ids), "zero_trained": r.zero_trained + empty}
    return kept, replace(made, report=replace(r, warnings=warnings, **counts))


def _pieces(
    typed: TypedRows, tokenizer: Any, loader: Loader, *, bad: BadRows | None = None, read: int | None = None
) -> Encoded:
    """Long texts in pieces of `max_length`, each with the tokenizer's special tokens around it, as every text has them."""
    found: list[np.ndarray] = []
    rows: list[int] = []
    least = tokenizer.num_special_tokens_to_add()
    for start in range(0, len(typed.rows), ENCODE_BATCH):
        made = tokenizer(
            [r["text"] for r in typed.rows[start : start + ENCODE_BATCH]], truncation=True, max_length=loader.max_length,
            return_overflowing_tokens=True, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        for ids, row in zip(made["input_ids"], made["overflow_to_sample_mapping"], strict=True):
            if len(ids) > least:
                found.append(np.asarray(ids, np.int32))
                rows.append(start + int(row))
    flat = flatten(found)
    examples = Examples(
        input_ids=flat, weights=np.ones(len(flat), np.float32), offsets=offsets_of(map(len, found)),
        rows=np.asarray(rows, np.int64), origins=tuple(r.origin for r in typed.rows),
    )  # fmt: skip
    skipped = bad.count if bad else 0
    report = EncodeReport(
        read=len(typed.rows) + skipped if read is None else read, skipped_bad=skipped, examples=len(found),
        tokens=len(flat), longest=max(map(len, found), default=0), warnings=(bad.summary(),) if bad and skipped else (),
    )  # fmt: skip
    return Encoded(examples, report)


def _begin_words(pieces: list[str], tokenizer: Any) -> list[bool]:
    """Whether each piece begins a word: WordPiece marks what goes on, byte-level and SentencePiece mark the beginning."""
    if any(p.startswith("##") for p in tokenizer.get_vocab()):
        return [not p.startswith("##") for p in pieces]
    return [p.startswith(("\u0120", "\u010a", "\u2581", "<", "[")) or not p.isalnum() for p in pieces]
