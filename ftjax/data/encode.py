"""Typed rows to token ids and loss weights, for a causal language model; nothing is dropped without being counted.

    encoded = encode(typed, tokenizer, Loader(max_length=512), template="", wrap=False)
    encoded.report.lines()          # what was read, cut, dropped, trained

What is trained, as in TRL's SFT: a `text` gets an EOS and all of it is trained; of prompt and completion, tokenized
together, everything after their common beginning with the prompt alone, the EOS included; of messages what the
assistant wrote. The first token of an example is never a target. A long text is cut right, dropped or refused
(`loader.truncation`), or wrapped (plain-text corpora): pieces of `max_length` that overlap by one token, so that every
token is a target once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.batches import Examples, flatten, offsets_of
from ftjax.data.formats import DatasetType, TypedRows, is_empty, shown
from ftjax.data.rows import BadRows, Row
from ftjax.data.templates import Chat, render_chats, require_markers
from ftjax.errors import ConfigError, DataError

ENCODE_BATCH = 512  # rows given to the tokenizer at once


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows.

    Attributes:
      read: rows of the data set, malformed ones included.
      skipped_bad: malformed rows (`loader.skip_bad`).
      truncated: examples cut to `max_length`.
      dropped: examples dropped for their length.
      zero_trained: examples dropped because no token would be trained, e.g. a prompt that fills `max_length`.
      examples: examples kept.
      tokens: tokens kept.
      trained_tokens: targets with a weight.
      eos_trained: examples in which an EOS is a trained target.
      longest: tokens of the longest example before any cut.
      removed: rows that cleaning removed.
      cleaning: what cleaning did (see `ftjax.data.clean`), in words, with counts.
      cache: "off", "hit" or "miss" and why.
      warnings: texts for the user.
    """

    read: int = 0
    skipped_bad: int = 0
    truncated: int = 0
    dropped: int = 0
    zero_trained: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    eos_trained: int = 0
    longest: int = 0
    removed: int = 0
    cleaning: dict[str, int] = field(default_factory=dict)
    cache: str = "off"
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as short lines, zero counts left out."""
        reasons = {"malformed": self.skipped_bad, "cleaned away": self.removed, "too long": self.dropped}
        reasons["nothing to train"] = self.zero_trained
        lost = ", ".join(f"{n:,} {what}" for what, n in reasons.items() if n)
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [
            f"{self.read:,} rows -> {self.examples:,} examples{f' ({lost} left out)' if lost else ''}",
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained ({share:.1%}); longest example {self.longest:,}",
        ]
        if self.truncated:
            lines.append(
                f"{self.truncated:,} examples cut to max_length ({self.truncated / max(self.examples, 1):.1%})"
            )
        if self.cleaning:
            lines.append("cleaning: " + ", ".join(f"{n:,} {what}" for what, n in self.cleaning.items()))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON-like data."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """Examples (of any layout, see `ftjax.data.layouts`) and how they came about."""

    examples: Any
    report: EncodeReport


@dataclass
class _Builder:
    """Collects examples and counts."""

    loader: Loader
    wrap: bool
    eos: int | None
    mask: str = "all"
    lost: str = ""  # the first example without a trained token, and what would help
    ids: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    zero_trained: int = 0
    eos_trained: int = 0
    longest: int = 0

    def add(self, row: int, origin: str, ids: np.ndarray, weights: np.ndarray) -> None:
        """Adds one row's tokens, cut by the policy."""
        limit = self.loader.max_length
        self.longest = max(self.longest, len(ids))
        if len(ids) <= limit:
            if not self._keep(row, ids, weights):
                self._note(origin, weights)
        elif self.wrap:
            for start in range(0, len(ids) - 1, limit - 1):
                self._keep(row, ids[start : start + limit], weights[start : start + limit])
        elif self.loader.truncation == "right":
            kept = self._keep(row, ids[:limit], weights[:limit])
            self.truncated += kept
            if not kept:
                self._note(origin, weights)
        elif self.loader.truncation == "drop":
            self.dropped += 1
        else:
            self.long.append(f"{origin} ({len(ids):,} tokens)")

    def _note(self, origin: str, weights: np.ndarray) -> None:
        """Remembers the first row that nothing is learned from."""
        at, last = np.flatnonzero(weights[1:] > 0), self.mask == "assistant"
        if len(at):
            why = f"its first trained token is number {at[0] + 2:,}; set loader.max_length={at[0] + 2} or more"
        elif self.mask == "all":
            why = "it has fewer than two tokens"
        else:
            why = (
                f"it has no {'turn of the assistant' if last else 'completion'}; loader.loss_on=all trains every token"
            )
        self.lost = self.lost or f"{origin}: {why}"

    def _keep(self, row: int, ids: np.ndarray, weights: np.ndarray) -> bool:
        weights = weights.astype(np.float32)
        weights[:1] = 0.0
        if not weights.any():
            self.zero_trained += 1
            return False
        self.eos_trained += bool(((ids == self.eos) & (weights > 0)).any())
        self.ids.append(ids)
        self.weights.append(weights)
        self.rows.append(row)
        return True


def encode(
    typed: TypedRows,
    tokenizer: PreTrainedTokenizerBase,
    loader: Loader,
    *,
    template: str = "",
    wrap: bool = False,
    bad: BadRows | None = None,
    read: int | None = None,
    required: bool = True,
) -> Encoded:
    """Encodes all rows.

    Args:
      typed: rows of one type.
      tokenizer: a fast tokenizer.
      loader: max_length, truncation, loss_on.
      template: Jinja text of the chat template, for conversational rows.
      wrap: cut long texts into pieces instead of truncating them.
      bad: collects rows that the template refuses.
      read: rows read from the files, for the report.
      required: having no example left is an error (for held-out data it is a warning).

    Raises:
      ConfigError: `loader.loss_on` does not fit the type.
      DataError: the type is not for a causal language model; a row is refused; nothing is left to train.
    """
    bad = BadRows() if bad is None else bad
    mask = _mask_of(typed, loader.loss_on)
    if mask == "assistant":
        require_markers(template)
    eos: int | None = tokenizer.eos_token_id  # type: ignore[assignment]
    out = _Builder(loader, wrap and typed.type == DatasetType("language_modeling", False), eos, mask)
    step = _encoder(typed.type, mask)
    for start in range(0, len(typed.rows), ENCODE_BATCH):
        rows = typed.rows[start : start + ENCODE_BATCH]
        for i, item in enumerate(step(rows, tokenizer, template)):
            if mask == "completion" and is_empty(rows[i]["completion"]):
                bad.add(f"{rows[i].origin}: field 'completion' is empty: the row teaches no answer")
            elif isinstance(item, str):
                bad.add(f"{rows[i].origin}: {item}")
            else:
                out.add(start + i, rows[i].origin, *item)
    if out.long:
        raise DataError(
            f"{len(out.long)} of {len(typed.rows)} examples ({len(out.long) / len(typed.rows):.1%}) are longer than "
            f"loader.max_length={loader.max_length} and loader.truncation=error: {', '.join(out.long[:3])}. "
            f"The longest has {out.longest:,} tokens"
        )
    return _finish(out, typed.rows, len(typed.rows) + bad.count if read is None else read, bad, required)


def _mask_of(typed: TypedRows, loss_on: str) -> str:
    """Which tokens are trained: "all", "completion" or "assistant"."""
    kind = typed.type
    fits = {
        ("language_modeling", False): ("all",),
        ("language_modeling", True): ("assistant", "all"),
        ("prompt_completion", False): ("completion", "all"),
        ("prompt_completion", True): ("completion", "assistant", "all"),
    }.get((kind.kind, kind.conversational))
    if fits is None:
        raise DataError(
            f"a causal language model is trained on language_modeling or prompt_completion rows; these are {kind}. "
            f"Expected columns: text | messages | prompt, completion; {shown(typed.rows)}. Rename others with data.columns"
        )
    if loss_on == "auto":
        return fits[0]
    if loss_on not in fits:
        raise ConfigError(f"loader.loss_on={loss_on} does not fit {kind} rows. Allowed: auto, {', '.join(fits)}")
    return loss_on


Item = tuple[np.ndarray, np.ndarray] | str  # ids and weights, or why the row cannot be encoded
Step = Callable[[Sequence[Row], PreTrainedTokenizerBase, str], Iterator[Item]]


def _encoder(kind: DatasetType, mask: str) -> Step:
    if kind.kind == "language_modeling":
        return (lambda r, t, c: _messages(r, t, c, mask)) if kind.conversational else (lambda r, t, c: _texts(r, t))
    if kind.conversational:
        return lambda r, t, c: _chat_pairs(r, t, c, mask)
    return lambda r, t, c: _pairs(r, t, mask)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    out = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return [np.asarray(ids, np.int32) for ids in out]


def _adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    return bool(ids) and ids[-1] == tokenizer.eos_token_id


def ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends a text: the EOS token, unless the tokenizer adds it by itself or has none."""
    return "" if tokenizer.eos_token is None or _adds_eos(tokenizer) else str(tokenizer.eos_token)


def with_end(text: str, end: str) -> str:
    return text if end and text.endswith(end) else text + end


def _texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
    end = ending(tokenizer)
    for ids in _tokenize(tokenizer, [r["text"] if r.get("continues") else with_end(r["text"], end) for r in rows]):
        yield ids, np.ones(len(ids), np.float32)


def _pairs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, mask: str) -> Iterator[Item]:
    end = ending(tokenizer)
    prompts = _tokenize(tokenizer, [r["prompt"] for r in rows])
    whole = _tokenize(tokenizer, [r["prompt"] + with_end(r["completion"], end) for r in rows])
    for prompt, ids in zip(prompts, whole, strict=True):
        yield ids, _after_prompt(prompt, ids) if mask == "completion" else np.ones(len(ids), np.float32)


def _after_prompt(prompt: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Weight 1 from where the two part: not always at the prompt's end, since tokens merge across the border."""
    n = min(len(prompt), len(ids))
    differ = np.flatnonzero(prompt[:n] != ids[:n])
    weights = np.ones(len(ids), np.float32)
    weights[: differ[0] if len(differ) else n] = 0.0
    return weights


def _messages(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str, mask: str) -> Iterator[Item]:
    chats = [Chat(r["messages"], r.get("tools") or None) for r in rows]
    for rendered in render_chats(tokenizer, template, chats, mask=mask == "assistant"):
        if rendered.refusal:
            yield rendered.refusal
        else:
            ids = np.asarray(rendered.input_ids, np.int32)
            yield ids, np.ones(len(ids), np.float32) if mask == "all" else np.asarray(rendered.assistant, np.float32)


def _chat_pairs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str, mask: str) -> Iterator[Item]:
    prompts = [Chat(r["prompt"], r.get("tools") or None, prompt=True) for r in rows]
    whole = [Chat(r["prompt"] + r["completion"], r.get("tools") or None) for r in rows]
    wholes = render_chats(tokenizer, template, whole, mask=mask == "assistant")
    for prompt, both in zip(render_chats(tokenizer, template, prompts), wholes, strict=True):
        if prompt.refusal or both.refusal:
            yield prompt.refusal or both.refusal
            continue
        ids = np.asarray(both.input_ids, np.int32)
        if mask == "completion":
            yield ids, _after_prompt(np.asarray(prompt.input_ids, np.int32), ids)
        else:
            yield ids, np.ones(len(ids), np.float32) if mask == "all" else np.asarray(both.assistant, np.float32)


def _finish(out: _Builder, rows: Sequence[Row], read: int, bad: BadRows, required: bool) -> Encoded:
    examples = Examples(
        input_ids=flatten(out.ids), weights=flatten(out.weights, np.float32), offsets=offsets_of(map(len, out.ids)),
        rows=np.asarray(out.rows, np.int64), origins=tuple(r.origin for r in rows),
    )  # fmt: skip
    counts = {k: getattr(out, k) for k in ("truncated", "dropped", "zero_trained", "eos_trained", "longest")}
    report = EncodeReport(
        read=read,
        skipped_bad=bad.count,
        examples=len(examples),
        tokens=len(examples.input_ids),
        trained_tokens=int(np.count_nonzero(examples.weights)),
        **counts,
    )
    if not examples and required:
        first = "".join(f". {text}" for text in (out.lost, bad.summary()) if text)
        raise DataError(f"no token would be trained: {_reasons(report, out.loader)}{first}")
    return Encoded(examples, replace(report, warnings=tuple(_warnings(report, out, bad))))


def _reasons(report: EncodeReport, loader: Loader) -> str:
    return (
        f"of {report.read:,} rows {report.skipped_bad:,} are malformed, {report.dropped:,} are longer than "
        f"loader.max_length={loader.max_length} and dropped, {report.zero_trained:,} have no trained token within it "
        f"(the longest has {report.longest:,} tokens; loader.loss_on={loader.loss_on})"
    )


def _warnings(report: EncodeReport, out: _Builder, bad: BadRows) -> Iterator[str]:
    if bad.count:
        yield bad.summary()
    if not report.examples:
        yield f"no held-out example is left: {_reasons(report, out.loader)}"
        return
    if report.truncated:
        yield (
            f"{report.truncated:,} of {report.examples:,} examples ({report.truncated / report.examples:.1%}) "
            f"are cut to loader.max_length={out.loader.max_length}; the longest has {report.longest:,} tokens"
        )
    if report.dropped:
        yield f"{report.dropped:,} examples are longer than loader.max_length={out.loader.max_length} and dropped"
    if report.zero_trained:
        yield (
            f"{report.zero_trained:,} examples have no trained token within max_length and are left out, the first: "
            f"{out.lost}"
        )
    if out.eos is not None and not report.eos_trained:
        yield "no EOS token is ever trained: the model will not learn to stop"
    if report.trained_tokens < 0.01 * report.tokens:
        yield f"only {report.trained_tokens / report.tokens:.2%} of the tokens are trained"


def encode_prompt(
    prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str = "", *, end: bool = False
) -> np.ndarray:
    """Token ids of a prompt as it stands in front of its completion in training, int32 [n]; `end` leaves a text's EOS on.

    Raises:
      DataError: the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        ids = _tokenize(tokenizer, [prompt])[0]
        return ids[:-1] if _adds_eos(tokenizer) and not end else ids
    rendered = render_chats(tokenizer, template, [Chat(prompt, prompt=True)])[0]
    if rendered.refusal:
        raise DataError(rendered.refusal)
    return np.asarray(rendered.input_ids, np.int32)
