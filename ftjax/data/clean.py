"""Cleaning of rows before they are split into tokens: one form of Unicode, lengths, duplicates, near-duplicates, leaks.

J(A, B) = |A n B| / |A u B| of two texts' sets of k-word shingles;   P(equal minima) = J;   P(candidate) = 1 - (1 - J^r)^b
(Broder 1997, On the resemblance and containment of documents; near-duplicates of training texts: arXiv:2107.06499)

    data=Local(path="a.jsonl", clean=Clean(unicode="NFC", min_chars=20, duplicates="near", leaks="remove"))

MinHash with banding finds candidates, their exact Jaccard similarity decides. Everything is a function of the rows and of
these settings, which are part of the data's fingerprint; the counts are in the data report. Of several like rows the first
stays. Equality and similarity are of the whole row, or of `columns` where it has an id or a source that tells rows apart.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ftjax.data.rows import NEAR_LEAK, BadRows, Row, row_hash
from ftjax.schema import Component

RECALL = 0.99  # of pairs at the threshold, which the bands are chosen for
_WORD = re.compile(r"\w+")
_NO_TEXT = ("role", "from")  # keys of a conversation's turns that hold no text
_CHUNK = 2**20  # hashes of shingles under all permutations that exist at once


class Clean(Component):
    """What is done to the rows of a data set before anything else; by default nothing."""

    unicode: Literal["none", "NFC", "NFKC"] = Field(
        default="none",
        description="Unicode normalisation of every text. NFKC also folds ligatures, full-width forms and so on.",
    )
    min_chars: int = Field(default=0, ge=0, description="Rows with shorter texts, counted together, are removed.")
    max_chars: int = Field(
        default=0, ge=0, description="Rows with longer texts, counted together, are removed; 0: no limit."
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep", description="exact: of equal rows the first stays; near: and of similar ones."
    )
    leaks: Literal["warn", "near", "remove"] = Field(
        default="warn",
        description="Training rows that are held out too. warn: equal ones are counted; near: similar ones too; "
        "remove: both are removed from training.",
    )
    similarity: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity from which two texts are similar."
    )
    shingle: int = Field(default=5, gt=0, description="Words of a shingle.")
    permutations: int = Field(
        default=128, gt=0, description="Hash functions of MinHash; more of them find more at more cost."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the hash functions.")
    columns: tuple[str, ...] = Field(default=(), description="Columns that are measured and compared; empty: all.")

    def normalised(self, rows: Iterable[Row], bad: BadRows) -> list[Row]:
        """The rows with every text in one form of Unicode; before they are split, so that equal ones stay together."""
        if self.unicode == "none":
            return list(rows)
        out, changed = [], 0
        for row in rows:
            new = Row({k: _mapped(v, self.unicode) for k, v in row.items()}, row.origin)
            changed += new != row
            out.append(new)
        bad.note(f"changed by {self.unicode}", changed)
        return out

    def __call__(self, rows: Sequence[Row], bad: BadRows, held_out: Sequence[Row] = ()) -> list[Row]:
        """The rows that stay, in their order; what became of the others is noted in `bad`.

        Args:
          rows: of one split.
          bad: gets the counts.
          held_out: cleaned rows that training rows are compared with; empty for the held-out rows themselves.
        """
        kept = list(rows)
        if self.min_chars or self.max_chars:
            sizes = [sum(map(len, self._texts(row))) for row in kept]
            short = {i for i, n in enumerate(sizes) if n < self.min_chars}
            long = {i for i, n in enumerate(sizes) if self.max_chars and n > self.max_chars}
            kept = _without(kept, short | long)
            bad.note(f"shorter than {self.min_chars:,} characters", len(short), removed=True)
            bad.note(f"longer than {self.max_chars:,} characters", len(long), removed=True)
        if self.duplicates != "keep":
            seen: set[str] = set()
            keys = [self._key(row) for row in kept]
            equal = {i for i, key in enumerate(keys) if key in seen or seen.add(key)}
            kept = _without(kept, equal)
            bad.note("equal to an earlier row", len(equal), removed=True)
        if self.duplicates == "near":
            index = self.index()
            near = {i for i, row in enumerate(kept) if index.find_or_add(self._text(row)) >= 0}
            kept = _without(kept, near)
            bad.note("similar to an earlier row", len(near), removed=True)
        return self._without_leaks(kept, bad, held_out) if self.leaks != "warn" and held_out else kept

    def index(self) -> NearIndex:
        """An empty index of texts by these settings."""
        return NearIndex(self.similarity, shingle=self.shingle, permutations=self.permutations, seed=self.seed)

    def _without_leaks(self, rows: list[Row], bad: BadRows, held_out: Sequence[Row]) -> list[Row]:
        index = self.index()
        for row in held_out:
            index.add(self._text(row))
        equal = {self._key(row) for row in held_out}
        found = {i for i, row in enumerate(rows) if self._key(row) in equal or index.find(self._text(row)) >= 0}
        if self.leaks == "remove":
            bad.note("equal or similar to a held-out row", len(found), removed=True)
            return _without(rows, found)
        bad.note(NEAR_LEAK, len(found))
        return rows

    def _key(self, row: Row) -> str:
        return row_hash({c: row.get(c) for c in self.columns} if self.columns else row)

    def _texts(self, row: Row) -> Iterator[str]:
        return _strings([row.get(c) for c in self.columns] if self.columns else dict(row))

    def _text(self, row: Row) -> str:
        return "\n".join(self._texts(row))


def _without(rows: list[Row], gone: set[int]) -> list[Row]:
    return [row for i, row in enumerate(rows) if i not in gone] if gone else rows


def _mapped(value: Any, form: Literal["NFC", "NFKC"]) -> Any:
    """The same JSON-like value with its texts in a form of Unicode."""
    if isinstance(value, str):
        return unicodedata.normalize(form, value)
    if isinstance(value, dict):
        return {k: _mapped(v, form) for k, v in value.items()}
    return [_mapped(v, form) for v in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON-like value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            if k not in _NO_TEXT:
                yield from _strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v)


# Near-duplicates -------------------------------------------------------------------------------------------------------


class NearIndex:
    """Texts by the similarity of their words.

    Args:
      threshold: Jaccard similarity from which a text is found.
      shingle: words of a shingle; a shorter text is one shingle.
      permutations: hash functions, split into bands by `bands_for`.
      seed: of the hash functions.
    """

    def __init__(self, threshold: float, *, shingle: int, permutations: int, seed: int):
        self.threshold, self.shingle = threshold, shingle
        self.bands, self.rows = bands_for(threshold, permutations)
        draw = np.random.Philox(np.random.SeedSequence(seed)).random_raw(self.bands * self.rows)
        self.keys = draw.astype(np.uint64)
        self.sets: list[np.ndarray] = []
        self._buckets: list[dict[bytes, list[int]]] = [{} for _ in range(self.bands)]

    def find(self, text: str) -> int:
        """Number of the first text of the index that is similar; -1 if there is none."""
        own = shingles(text, self.shingle)
        return self._find(own, self._bands(own))

    def add(self, text: str) -> int:
        """Enters a text and returns its number; one without words is never found."""
        own = shingles(text, self.shingle)
        return self._add(own, self._bands(own))

    def find_or_add(self, text: str) -> int:
        """Number of the first similar text, else -1, and the text is entered."""
        own = shingles(text, self.shingle)
        bands = self._bands(own)
        found = self._find(own, bands)
        if found < 0:
            self._add(own, bands)
        return found

    def _bands(self, own: np.ndarray) -> list[bytes]:
        """The minima of each band, as bytes; none of a text without words."""
        if not len(own):
            return []
        minima = minhash(own, self.keys).reshape(self.bands, self.rows)
        return [band.tobytes() for band in minima]

    def _find(self, own: np.ndarray, bands: list[bytes]) -> int:
        buckets = zip(self._buckets, bands, strict=False)
        candidates = sorted({i for bucket, key in buckets for i in bucket.get(key, ())})
        return next((i for i in candidates if jaccard(own, self.sets[i]) >= self.threshold), -1)

    def _add(self, own: np.ndarray, bands: list[bytes]) -> int:
        self.sets.append(own)
        for bucket, key in zip(self._buckets, bands, strict=False):
            bucket.setdefault(key, []).append(len(self.sets) - 1)
        return len(self.sets) - 1


def bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands b, rows r of each): the largest r whose 1 - (1 - threshold^r)^b is `RECALL` or more, b r <= permutations.

    Large r means few candidates that are none. With r = 1 the recall is what it can be.
    """
    for r in range(permutations, 0, -1):
        b = permutations // r
        if 1 - (1 - threshold**r) ** b >= RECALL:
            return b, r
    return permutations, 1


def shingles(text: str, size: int) -> np.ndarray:
    """The set of hashes of all runs of `size` words, case apart, sorted, uint64 [n]; a shorter text is one run."""
    words = np.asarray([_word(w) for w in _WORD.findall(text.lower())], np.uint64)
    if not len(words):
        return words
    size = min(size, len(words))
    out = np.zeros(len(words) - size + 1, np.uint64)
    for i in range(size):  # the place of a word counts
        out = _mixed(out + words[i : len(words) - size + 1 + i])
    return np.unique(out)


@functools.lru_cache(maxsize=2**18)
def _word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every bit of the input moves every bit of the output (splitmix64's finalizer)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def minhash(own: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The smallest hash of a set [n] under each of the hash functions [P], uint64 [P]."""
    step = max(1, _CHUNK // len(keys))
    parts = [_mixed(own[i : i + step, None] ^ keys).min(0) for i in range(0, len(own), step)]
    return np.min(parts, axis=0)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A n B| / |A u B| of two sorted sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)
