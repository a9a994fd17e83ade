"""Span corruption, T5's pre-training task: spans of a text are replaced by sentinels, and the answer is what they hid.

text    Thank you for inviting me to your party last week
source  Thank you <extra_id_0> me to your party <extra_id_1> week </s>
answer  <extra_id_0> for inviting <extra_id_1> last </s>        (Raffel et al. 2020, arXiv:1910.10683, figure 2, section 3.1.4)

    encoded = encode_corrupted(typed, tokenizer, Loader(max_length=512), share=0.15, mean_span=3.0)
    encoded.examples.build([[0], [1]], 512, key=(seed, index))       # SeqBatch

Of n tokens round(share n) are hidden, in round(that / mean_span) spans; the lengths of the hidden and of the other spans are
uniform over all ways to cut them; a text begins with what is shown and ends with what is hidden, so that a short one with a
single span is always hidden at its end, unless `roll` turns the mask by a random offset. Spans are drawn anew for each row,
as a function of (seed, place in the run), so runs resume exactly. Sentinels are <extra_id_0>, <extra_id_1>, ... in the order
of the text; T5's vocabulary numbers them downwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count as numbers_from
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import PAD_SEGMENT, Derived, Examples, flatten, offsets_of
from ftjax.data.encode import ENCODE_BATCH, Encoded, EncodeReport
from ftjax.data.formats import DatasetType, TypedRows, type_rows
from ftjax.data.layouts import Layout, add_layout
from ftjax.data.preview import PreviewExample, Span, preview
from ftjax.data.rows import BadRows
from ftjax.data.seq2seq import SeqBatch
from ftjax.errors import DataError

LEAST = 2  # tokens of a text: one is hidden and one is not


@dataclass(frozen=True)
class Corruption:
    """How a text of n tokens is cut.

    Attributes:
      share: of the tokens that are hidden.
      mean_span: tokens of a hidden span on average.
      roll: turn the mask by a random offset; a span that then stands at both ends becomes two.
    """

    share: float
    mean_span: float
    roll: bool = False

    def hidden(self, n: int) -> tuple[int, int]:
        """(hidden tokens, hidden spans) of a text of n tokens."""
        tokens = min(max(round(n * self.share), 1), n - 1)
        return tokens, min(max(round(tokens / self.mean_span), 1), tokens, n - tokens)

    def lengths(self, n: int) -> tuple[int, int]:
        """Tokens of (source, answer), the end of each included; where the mask is turned, the most there can be."""
        tokens, spans = self.hidden(n)
        return n - tokens + spans + self.roll + 1, tokens + spans + self.roll + 1

    def room(self, length: int) -> int:
        """The longest text whose source and answer both have at most `length` tokens; 0 if there is none."""
        n = LEAST
        while max(self.lengths(n)) <= length:
            n += 1
        return n - 1 if n > LEAST else 0

    def mask(self, n: int, bits: np.random.Philox) -> np.ndarray:
        """Which tokens are hidden, bool [n]."""
        tokens, spans = self.hidden(n)
        shown, dark = (_cut(total, spans, bits) for total in (n - tokens, tokens))
        runs = np.stack([shown, dark], 1).ravel()
        mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.roll(mask, int(bits.random_raw()) % n) if self.roll else mask


def _cut(total: int, parts: int, bits: np.random.Philox) -> np.ndarray:
    """Lengths of `parts` parts of at least 1 that add up to `total`, all ways alike; from the raw stream, which is stable."""
    order = np.argsort(bits.random_raw(total - 1), kind="stable") if total > 1 else np.zeros(0, np.int64)
    return np.diff(np.sort(order[: parts - 1]) + 1, prepend=0, append=total)


def corrupt(ids: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, answer) of a text: in the source a sentinel stands for each hidden span, in the answer before it."""
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    which = sentinels[np.cumsum(begins)[begins] - 1]
    source = ids.copy()
    source[begins] = which
    dark = np.flatnonzero(mask)
    answer = np.insert(ids[dark], np.flatnonzero(begins[dark]), which)
    return np.append(source[~mask | begins], eos), np.append(answer, eos)


def sentinels_of(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of <extra_id_0>, <extra_id_1>, ... as far as there are any, int32.

    Raises:
      DataError: there are none.
    """
    vocab, found = tokenizer.get_vocab(), []
    for i in numbers_from():
        if (name := f"<extra_id_{i}>") not in vocab:
            break
        found.append(vocab[name])
    if not found:
        raise DataError("the tokenizer has no sentinels <extra_id_0>, <extra_id_1>, ...: span corruption needs T5's")
    return np.asarray(found, np.int32)


@dataclass(frozen=True)
class CorruptedExamples(Derived):
    """Encoded texts, and what is needed to hide some of their spans.

    Attributes:
      texts: token ids without special tokens.
      sentinels: ids of the sentinels in their order.
      numbers: [share, mean span, id of the EOS, whether masks are turned].
    """

    texts: Examples
    sentinels: np.ndarray
    numbers: np.ndarray

    @property
    def how(self) -> Corruption:
        """The shares."""
        return Corruption(float(self.numbers[0]), float(self.numbers[1]), bool(self.numbers[3]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer of source and answer, int64 [examples]; no draw makes more of them."""
        how = self.how
        return np.asarray([max(how.lengths(n)) for n in self.texts.lengths.tolist()], np.int64)

    @property
    def underlying(self) -> Examples:
        """See `Derived`."""
        return self.texts

    def take(self, indices: np.ndarray) -> CorruptedExamples:
        """The texts at `indices`, in that order."""
        return replace(self, texts=self.texts.take(indices))

    def drawn(self, i: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(source, answer) of text i, which the key decides."""
        ids = self.texts[i].input_ids
        bits = np.random.Philox(np.random.SeedSequence(key))
        return corrupt(ids, self.how.mask(len(ids), bits), self.sentinels, int(self.numbers[2]))

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> SeqBatch:
        """A batch with one text per row; what is hidden depends on `key` and the row alone.

        Answers are shorter than sources; their rows have the room that the longest text's needs, rounded up to 8.
        """
        n, how = len(rows) if count is None else count, self.how
        room = max(how.room(length), LEAST)
        width = min(length, -(-how.lengths(room)[1] // 8) * 8)
        pairs = [self.drawn(i, (*key, r)) for r, (i,) in enumerate(rows)]
        tokens, read = _padded([source for source, _ in pairs], n, length)
        labels, said = _padded([answer for _, answer in pairs], n, width)
        positions = np.where(read, np.arange(length, dtype=np.int32), 0)
        segments = np.where(read, 0, PAD_SEGMENT).astype(np.int32)
        return SeqBatch(tokens, positions, segments, labels, said.astype(np.float32))


def _padded(texts: list[np.ndarray], count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether real) [count, length] of texts, 0 at padding."""
    out, real = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for r, ids in enumerate(texts):
        if len(ids) > length:
            raise ValueError(f"a text has {len(ids)} tokens, the length is {length}")
        out[r, : len(ids)], real[r, : len(ids)] = ids, True
    return out, real


def encode_corrupted(
    typed: TypedRows, tokenizer: PreTrainedTokenizerBase, loader: Loader, *, share: float, mean_span: float,
    roll: bool = False, wrap: bool = False, bad: BadRows | None = None, read: int | None = None, required: bool = True,
    **_: Any,
) -> Encoded:  # fmt: skip
    """Tokenizes texts, so long that what becomes of them has at most `loader.max_length` tokens.

    Args:
      typed: rows of texts.
      tokenizer: a fast tokenizer with sentinels and an EOS.
      loader: max_length, truncation.
      share: of the tokens that are hidden.
      mean_span: tokens of a hidden span on average.
      roll: turn each mask by a random offset.
      wrap: cut long texts into pieces, each an example, instead of truncating them.
      bad: malformed rows so far, for the report.
      read: rows read from the files, for the report.
      required: having no example left is an error.

    Raises:
      DataError: the tokenizer has no or too few sentinels; other rows than texts; texts too long; nothing is left.
    """
    if typed.type != DatasetType("language_modeling", False):
        raise DataError(f"span corruption takes plain texts (a column text); these rows are {typed.type}")
    bad, how, sentinels = bad or BadRows(), Corruption(share, mean_span, roll), sentinels_of(tokenizer)
    room = how.room(loader.max_length)
    if not room:
        raise DataError(f"loader.max_length={loader.max_length}  no text is left at share={share:g}; make it longer")
    if (spans := how.hidden(room)[1] + roll) > len(sentinels):
        raise DataError(
            f"loader.max_length={loader.max_length}  a text of {room:,} tokens has {spans} hidden spans, the tokenizer has "
            f"{len(sentinels)} sentinels; use a smaller max_length or a larger mean_span"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, with which source and answer end")
    kept, rows, sizes = _pieces(typed, tokenizer, loader, room, wrap)
    if not kept and required:
        raise DataError(f"none of {len(sizes)} texts is left: each has fewer than {LEAST} or more than {room:,} tokens")
    flat, done, long = flatten(kept), len(set(rows)), sum(n > room for n in sizes)
    texts = Examples(
        input_ids=flat, weights=np.ones(len(flat), np.float32), offsets=offsets_of(map(len, kept)),
        rows=np.asarray(rows, np.int64), origins=tuple(r.origin for r in typed.rows),
    )  # fmt: skip
    dropped = long if loader.truncation == "drop" and not wrap else 0
    both = np.asarray([how.lengths(len(p)) for p in kept], np.int64).reshape(-1, 2)
    report = EncodeReport(
        read=len(typed.rows) + bad.count if read is None else read, skipped_bad=bad.count, dropped=dropped,
        truncated=0 if wrap or dropped else long, zero_trained=len(sizes) - done - dropped, examples=len(kept),
        tokens=int(both.sum()), trained_tokens=int(both[:, 1].sum()), eos_trained=len(kept),
        longest=max(sizes, default=0), warnings=(bad.summary(),) if bad.count else (),
    )  # fmt: skip
    numbers = np.asarray([share, mean_span, int(tokenizer.eos_token_id), roll], np.float64)  # type: ignore[arg-type]
    return Encoded(CorruptedExamples(texts, sentinels, numbers), report)


def _pieces(
    typed: TypedRows, tokenizer: Any, loader: Loader, room: int, wrap: bool
) -> tuple[list[np.ndarray], list[int], list[int]]:
    """(texts of 2 to `room` tokens, the row of each, tokens of every row before any cut).

    Raises:
      DataError: a text is too long and `loader.truncation` is "error".
    """
    kept: list[np.ndarray] = []
    rows: list[int] = []
    sizes: list[int] = []
    for i, ids in enumerate(_plain(typed, tokenizer)):
        sizes.append(len(ids))
        pieces = [ids[at : at + room] for at in range(0, len(ids), room)] if wrap else [ids[:room]]
        if len(ids) > room and not wrap and loader.truncation != "right":
            if loader.truncation == "error":
                raise DataError(
                    f"{typed.rows[i].origin}: {len(ids):,} tokens; at most {room:,} fit into "
                    f"loader.max_length={loader.max_length}, and loader.truncation=error"
                )
            pieces = []
        pieces = [p for p in pieces if len(p) >= LEAST]
        kept.extend(pieces)
        rows.extend([i] * len(pieces))
    return kept, rows, sizes


def _plain(typed: TypedRows, tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids of each text, without special tokens."""
    for start in range(0, len(typed.rows), ENCODE_BATCH):
        texts = [r["text"] for r in typed.rows[start : start + ENCODE_BATCH]]
        made = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        yield from (np.asarray(ids, np.int32) for ids in made["input_ids"])


@preview.register
def _shown(examples: CorruptedExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    found = []
    for i in range(min(n, len(examples))):
        pair = examples.drawn(i, (0, i))
        source, answer = (str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)) for ids in pair)
        spans = (Span(source, False), Span(f" -> {answer}", True))
        found.append(PreviewExample(examples.origin(i), spans, sum(map(len, pair)), len(pair[1]), True))
    return found


add_layout(SeqBatch, Layout("corrupted", CorruptedExamples, type_rows, encode_corrupted), "corrupted")
