"""Two answers to each prompt: preference pairs, and single judged answers with a mismatched one beside each (KTO).

    encoded = encode_pairs(typed, tokenizer, Loader(max_length=512))        # rows: prompt, chosen, rejected[, margin]
    encoded.examples.build([[0], [1]], 512)                                 # PairBatch: [2, 2, T], chosen first

Both answers stand in one batch entry, so that they share a device, a dropout mask and one call of the policy. The mismatched
answers are chosen once, before training, as TRL's are; so what a reference says of every row can be computed once too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import Derived, Examples, build_rows
from ftjax.data.encode import Encoded, EncodeReport, encode
from ftjax.data.formats import DatasetType, TypedRows, shown
from ftjax.data.rows import BadRows, Row, number
from ftjax.errors import DataError


@struct.dataclass
class PairBatch:
    """Pairs of rows; leading axes are free: [B, 2, T] or [accumulate, B, 2, T].

    Attributes:
      tokens, positions, segments: as in `TokenBatch`; of preference pairs the chosen answer is 0, the rejected 1; of judged
        answers the row itself is 0, its prompt with another row's answer is 1.
      weights: 1 at the tokens of the answer, 0 at the prompt and at padding.
      labels: of judged answers 1 good, 0 bad; of preference pairs the margin by which the first is better, else 0. [B]
      rows: 1, or 0 for entries that only fill the batch. [B]
      reference: log-probabilities of both answers under the reference where they are known beforehand, else None. [B, 2]
    """

    tokens: Int32[Any, "*b 2 t"]
    positions: Int32[Any, "*b 2 t"]
    segments: Int32[Any, "*b 2 t"]
    weights: Float32[Any, "*b 2 t"]
    labels: Float32[Any, "*b"]
    rows: Float32[Any, "*b"]
    reference: Float32[Any, "*b 2"] | None = None


@dataclass(frozen=True)
class PairExamples(Derived):
    """Encoded pairs.

    Attributes:
      first, second: the two rows of each pair, prompt included; of judged answers `second` has another row's answer.
      labels: see `PairBatch`, [examples].
      kind: "preference" or "judged".
      reference: see `PairBatch`, [examples, 2]; None where nobody computed it.
    """

    first: Examples
    second: Examples
    labels: np.ndarray
    kind: Literal["preference", "judged"]
    reference: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer answer of each pair with its prompt, int64 [examples]."""
        return np.maximum(self.first.lengths, self.second.lengths)

    @property
    def underlying(self) -> Examples:
        """See `Derived`."""
        return self.first

    def take(self, indices: np.ndarray) -> PairExamples:
        """The pairs at `indices`, in that order."""
        known = None if self.reference is None else self.reference[indices]
        first, second = self.first.take(indices), self.second.take(indices)
        return replace(self, first=first, second=second, labels=self.labels[indices], reference=known)

    def build(
        self, rows: Sequence[Sequence[int]], length: int, *, count: int | None = None, key: tuple[int, ...] = (0,)
    ) -> PairBatch:
        """A batch with one pair per row; rows beyond `rows` are padding."""
        n = len(rows) if count is None else count
        indices = [i for (i,) in rows]
        one, two = (build_rows([[side[i]] for i in indices], length, count=n) for side in (self.first, self.second))
        real = np.zeros(n, np.float32)
        labels = np.zeros(n, np.float32)
        real[: len(indices)], labels[: len(indices)] = 1.0, self.labels[indices]
        fields = ("tokens", "positions", "segments", "weights")
        both = {f: np.stack([getattr(one, f), getattr(two, f)], axis=1) for f in fields}
        known = None
        if self.reference is not None:
            known = np.zeros((n, 2), np.float32)
            known[: len(indices)] = self.reference[indices]
        return PairBatch(**both, labels=labels, rows=real, reference=known)


def mismatched(examples: Examples) -> Examples:
    """Every prompt with the answer of another example, none used twice; as long as the longest example at most.

    Neighbours are avoided, which often are answers to one prompt: the order is a fixed shuffle, and each takes the next one's.
    """
    from ftjax.data.pipeline import permutation  # it needs this module in turn

    n, limit = len(examples), int(examples.lengths.max(initial=0))
    order = permutation(n, 0)
    other = np.zeros(n, np.int64)
    other[order] = np.roll(order, -1)
    made = Examples.of(_mixed(examples[i], examples[int(j)], limit) for i, j in enumerate(other))
    return replace(made, rows=examples.rows, origins=examples.origins)


def _mixed(prompt_of: Any, answer_of: Any, length: int) -> Any:
    """The prompt of one example with the answer of another, cut right."""
    own, other = int(np.argmax(prompt_of.weights > 0)), int(np.argmax(answer_of.weights > 0))
    ids = np.concatenate([prompt_of.input_ids[:own], answer_of.input_ids[other:]])[:length]
    weights = np.concatenate([prompt_of.weights[:own], answer_of.weights[other:]])[:length]
    return replace(prompt_of, input_ids=ids, weights=weights)


# Encoding --------------------------------------------------------------------------------------------------------------


def encode_pairs(
    typed: TypedRows, tokenizer: PreTrainedTokenizerBase, loader: Loader, *, bad: BadRows | None = None, **options: Any
) -> Encoded:
    """Preference rows as pairs; a row is left out when either answer has no token within `max_length`.

    Raises:
      DataError: these are no preference rows; an answer is empty; both answers are the same; see `encode`.
    """
    bad = bad or BadRows()
    _require(typed, "preference", "prompt, chosen, rejected")
    rows = [row for row in typed.rows if not _refused(row, ("chosen", "rejected"), bad)]
    one, two = (_answers(rows, side, typed.type, tokenizer, loader, bad, options) for side in ("chosen", "rejected"))
    both = np.intersect1d(one.examples.rows, two.examples.rows)
    first, second = _only(one.examples, both), _only(two.examples, both)
    margins = np.asarray([float(rows[i].get("margin") or 0.0) for i in both], np.float32)
    made = PairExamples(first, second, margins, "preference")
    differ = np.asarray([not np.array_equal(first[i].input_ids, second[i].input_ids) for i in range(len(both))], bool)
    if not differ.any() and options.get("required", True):
        where = f", e.g. {first.origin(0)}" if len(both) else ""
        raise DataError(
            f"no pair is left of {len(rows)}: within loader.max_length={loader.max_length} {len(both)} have answers that "
            f"are the same{where}, of the others one answer has no token. Set a larger loader.max_length"
        )
    encoded = _encoded(made.take(np.flatnonzero(differ)), one.report, two.report)
    return encoded if differ.all() else _warned(encoded, len(both) - int(differ.sum()), loader)


def _warned(encoded: Encoded, same: int, loader: Loader) -> Encoded:
    text = f"{same:,} pairs differ only behind loader.max_length={loader.max_length} and are left out"
    return replace(encoded, report=replace(encoded.report, warnings=(*encoded.report.warnings, text)))


def encode_judged(
    typed: TypedRows, tokenizer: PreTrainedTokenizerBase, loader: Loader, *, bad: BadRows | None = None, **options: Any
) -> Encoded:
    """Rows with an answer and whether it is good (prompt, completion, label).

    Raises:
      DataError: other columns; an answer is empty; all labels are the same.
    """
    bad = bad or BadRows()
    _require(typed, "unpaired_preference", "prompt, completion, label")
    rows = [row for row in typed.rows if not _refused(row, ("completion",), bad)]
    one = _answers(rows, "completion", typed.type, tokenizer, loader, bad, options)
    labels = np.asarray([float(rows[i]["label"]) for i in one.examples.rows], np.float32)
    if len(labels) and options.get("required", True) and len(set(labels.tolist())) == 1:
        raise DataError(
            f"every row has the label {bool(labels[0])}: KTO needs good and bad answers ({len(labels):,} rows, the first is "
            f"{one.examples.origin(0)}). Add rows with the label {not labels[0]}, or use objective=causal_lm with good ones"
        )
    return _encoded(PairExamples(one.examples, mismatched(one.examples), labels, "judged"), one.report, None)


def _require(typed: TypedRows, kind: str, columns: str) -> None:
    if typed.type.kind != kind:
        raise DataError(f"expected {kind} rows (columns {columns}); these are {typed.type}: {shown(typed.rows)}")


def _refused(row: Row, sides: tuple[str, ...], bad: BadRows) -> bool:
    """Whether a row is malformed; notes it."""
    empty = next((s for s in sides if not _text(row[s]).strip()), None)
    if empty:
        bad.add(f"{row.origin}: field {empty!r} is empty")
    elif len(sides) == 2 and row[sides[0]] == row[sides[1]]:
        bad.add(f"{row.origin}: chosen and rejected are the same")
    elif row.get("margin") is not None and not np.isfinite(number(row["margin"])):
        bad.add(f"{row.origin}: field 'margin' expected a finite number, got {row['margin']!r}")
    else:
        return False
    return True


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "".join(str(m.get("content") or "") for m in answer)


def _answers(
    rows: list[Row], side: str, kind: DatasetType, tokenizer: Any, loader: Loader, bad: BadRows, options: dict[str, Any]
) -> Encoded:
    """One side's answers after their prompts, as prompt-completion examples."""
    made = [Row({**row, "completion": row[side]}, row.origin) for row in rows]
    typed = TypedRows(DatasetType("prompt_completion", kind.conversational), made)
    wanted = {k: v for k, v in options.items() if k in ("template", "read", "required")}
    whole = loader.model_copy(update={"loss_on": "completion"})
    return encode(typed, tokenizer, whole, bad=bad, **wanted)


def _only(examples: Examples, rows: np.ndarray) -> Examples:
    return examples.take(np.searchsorted(examples.rows, rows))


def _encoded(examples: PairExamples, one: EncodeReport, two: EncodeReport | None) -> Encoded:
    """Counts of both sides: an example is a pair."""
    reports = [r for r in (one, two) if r]
    total: Callable[[str], int] = lambda name: sum(getattr(r, name) for r in reports)  # noqa: E731
    summed = ("truncated", "tokens", "trained_tokens", "eos_trained")
    counts = {name: total(name) for name in summed}
    lost = one.examples + one.dropped + one.zero_trained - len(examples)
    warnings = tuple(dict.fromkeys(_both(reports)))
    return Encoded(
        examples,
        replace(
            one, examples=len(examples), zero_trained=max(lost - one.dropped, 0), warnings=warnings,
            longest=max(r.longest for r in reports), **counts,
        ),
    )  # fmt: skip


def _both(reports: Iterable[EncodeReport]) -> Iterable[str]:
    for report in reports:
        yield from report.warnings
