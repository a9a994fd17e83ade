"""Everything between a data set and its examples: read, type, encode, check, remember.

prepared = prepare(task, Loader(max_length=512), tokenizer, seed=0, vocab_size=32000)
prepared.train, prepared.eval                # Examples
prepared.report.lines(), prepared.warnings   # for the console
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftjax.config import Loader
from ftjax.data.cache import Cache, Entry
from ftjax.data.clean import Clean
from ftjax.data.encode import Encoded, EncodeReport
from ftjax.data.formats import DatasetType, TypedRows
from ftjax.data.layouts import TEXT, Layout, arrays_of, identity, meta_of, restored
from ftjax.data.rows import NEAR_LEAK, BadRows, Row, row_hash
from ftjax.data.task import Split, Task
from ftjax.data.templates import resolve_template
from ftjax.data.tokenizer import check_vocab, tokenizer_hash, tokenizer_warnings
from ftjax.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """A data set ready for batches.

    Attributes:
      type: what its rows are.
      train: training examples, of the layout that the objective asks for.
      eval: held-out examples; may be empty.
      report: what became of the training rows.
      eval_report: what became of the held-out rows.
      template: Jinja text of the chat template in use; "" if the rows are not conversations.
      fingerprint: identity of the examples, for checkpoints (JSON-like).
      warnings: texts for the user.
    """

    type: DatasetType
    train: Any
    eval: Any
    report: EncodeReport
    eval_report: EncodeReport
    template: str
    fingerprint: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty for language data."""
        return getattr(self.train, "names", ())

    @property
    def problem(self) -> str:
        """regression, single_label_classification or multi_label_classification; empty for language data."""
        return getattr(self.train, "problem", "")


@dataclass(frozen=True)
class _Content:
    """What is worth caching."""

    type: DatasetType
    train: Encoded
    eval: Encoded
    template: str
    warnings: tuple[str, ...]


def prepare(
    task: Task,
    loader: Loader,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int = 0,
    *,
    layout: Layout = TEXT,
    options: dict[str, Any] | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Prepared:
    """Reads and encodes a data set.

    Args:
      task: the data set.
      loader: max_length, truncation, loss_on, skip_bad.
      tokenizer: a fast tokenizer; None where the layout has no tokens.
      seed: seed of the data order; enters the fingerprint only.
      layout: what batches are wanted.
      options: of the objective for its layout (`data_options`).
      vocab_size: rows of the model's embedding, to check the tokenizer against.
      use_cache: take encoded examples from the cache and store them there.

    Raises:
      ConfigError: an option does not fit the data.
      DataError: files, rows, template or tokenizer are wrong, or nothing would be trained.
    """
    warnings = tokenizer_warnings(tokenizer) if tokenizer and layout == TEXT else ()
    if tokenizer and vocab_size is not None:
        warnings += check_vocab(tokenizer, vocab_size)
    options = options or {}
    parts = _parts(task, loader, tokenizer, layout) | ({"options": options} if options else {})
    cache = Cache(task.name, parts) if use_cache else None
    entry = cache.load() if cache else None
    content = _thaw(entry, layout) if entry else _build(task, loader, tokenizer, layout, options)
    if cache and not entry:
        cache.store(*_freeze(content))
    status = cache.status if cache else "off"
    return Prepared(
        type=content.type,
        train=content.train.examples,
        eval=content.eval.examples,
        report=replace(content.train.report, cache=status),
        eval_report=replace(content.eval.report, cache=status),
        template=content.template,
        fingerprint={**_without_places(parts), "seed": seed, "examples": identity(content.train.examples)},
        warnings=warnings + content.train.report.warnings + content.warnings,
    )


def _parts(task: Task, loader: Loader, tokenizer: PreTrainedTokenizerBase | None, layout: Layout) -> dict[str, Any]:
    template = task.chat_template
    try:
        template = resolve_template(tokenizer, template) if tokenizer else ""
    except DataError:  # no template: an error only if the rows turn out to be conversations
        template = ""
    options = loader.model_dump(mode="json", include={"max_length", "truncation", "loss_on", "skip_bad"})
    described = task.model_dump(mode="json") if hasattr(task, "model_dump") else {"name": task.name}  # type: ignore[attr-defined]
    return {
        "task": _without_idle({k: v for k, v in described.items() if k != "metrics"}),
        "data": task.fingerprint(),
        "tokenizer": tokenizer_hash(tokenizer) if tokenizer else "none",
        **({} if layout == TEXT else {"layout": layout.name}),
        "template": hashlib.sha256(template.encode()).hexdigest() if template else "none",
        "loader": options,
    }


def _without_places(parts: dict[str, Any]) -> dict[str, Any]:
    """Moved data are the same data: for a checkpoint their content counts (for the cache the place does, for messages)."""
    return {**parts, "task": _placeless(parts["task"])}


def _without_idle(value: Any) -> Any:
    """Cleaning that does nothing is no part of what the data are."""
    idle = Clean().model_dump(mode="json")
    if isinstance(value, dict):
        return {k: _without_idle(v) for k, v in value.items() if k != "clean" or v != idle}
    return [_without_idle(v) for v in value] if isinstance(value, list) else value


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _placeless(v) for k, v in value.items() if k not in ("path", "eval_path")}
    return [_placeless(v) for v in value] if isinstance(value, list) else value


def _build(task: Task, loader: Loader, tokenizer: Any, layout: Layout, extra: dict[str, Any]) -> _Content:
    bad = BadRows(loader.skip_bad)
    train, read = _typed(task, "train", bad, layout)
    if train is None:
        raise DataError(f"data={task.name} has no training rows{_why_none(task, bad)}")
    template = resolve_template(tokenizer, task.chat_template) if train.type.conversational else ""
    options: dict[str, Any] = {"template": template, "wrap": task.wraps, **extra}
    encoded = _noted(layout.encode(train, tokenizer, loader, **options, bad=bad, read=read), bad)
    eval_bad = BadRows(loader.skip_bad)
    held_out, read = _typed(task, "eval", eval_bad, layout)
    if held_out is None:
        empty = encoded.examples.take(np.zeros(0, np.int64))
        return _Content(train.type, encoded, Encoded(empty, EncodeReport()), template, _no_held_out(task, eval_bad))
    if held_out.type != train.type:
        raise DataError(
            f"the held-out rows are {held_out.type}, the training rows {train.type}: the columns must agree"
        )
    encoded_eval = layout.encode(
        held_out, tokenizer, loader, **options, bad=eval_bad, read=read, required=False, like=encoded.examples
    )
    near = bad.cleaning.get(NEAR_LEAK, 0)
    warnings = leak_warnings(train.rows, held_out.rows)
    warnings += (f"{near:,} training rows are {NEAR_LEAK}: the held-out loss is too good",) if near else ()
    return _Content(train.type, encoded, _noted(encoded_eval, eval_bad), template, warnings)


def _noted(encoded: Encoded, bad: BadRows) -> Encoded:
    """With what cleaning did in the report."""
    return replace(encoded, report=replace(encoded.report, removed=bad.removed, cleaning=dict(bad.cleaning)))


def _typed(task: Task, split: Split, bad: BadRows, layout: Layout) -> tuple[TypedRows | None, int]:
    rows = task.examples(split, bad=bad)
    read = len(rows) + bad.count + bad.removed
    if not rows:
        return None, read
    typed = layout.type_rows(rows, columns=task.columns, bad=bad)
    if not typed.rows:
        if split == "train":
            raise DataError(f"no rows are left of {read}: {bad.summary()}")
        return None, read
    told = {"names": getattr(task, "labels", ()), "problem": getattr(task, "problem", "")}
    return replace(typed, **told), read


def _why_none(task: Task, bad: BadRows) -> str:
    """Where the training rows went."""
    if bad.count:
        return f": {bad.summary()}"
    held_out = task.examples("eval", bad=BadRows(10**9))
    if not held_out:
        return ""
    return f": all {len(held_out)} are held out, e.g. {held_out[0].origin}. Set data.eval_share=0, or give more rows"


def _no_held_out(task: Task, bad: BadRows) -> tuple[str, ...]:
    """A warning where a data set should have held-out rows and has none."""
    if bad.count:
        return (f"no held-out row is left, so nothing is evaluated: {bad.summary()}",)
    share = getattr(task, "eval_share", 0)
    few = f"data.eval_share={share:g} of so few different rows is none: nothing is held out and nothing evaluated"
    return (few,) if share else ()


def leak_warnings(train: Sequence[Row], held_out: Sequence[Row]) -> tuple[str, ...]:
    """A warning if held-out rows also stand, word for word, among the training rows."""
    seen = {row_hash(row) for row in train}
    leaked = [row for row in held_out if row_hash(row) in seen]
    if not leaked:
        return ()
    share = len(leaked) / len(held_out)
    return (
        f"{len(leaked):,} of {len(held_out):,} held-out rows ({share:.1%}) are also in the training data, e.g. "
        f"{leaked[0].origin}: the held-out loss is too good",
    )


def _freeze(content: _Content) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    parts = {"train": content.train, "eval": content.eval}
    arrays = {f"{s}.{k}": v for s, part in parts.items() for k, v in arrays_of(part.examples).items()}
    meta = {s: {"examples": meta_of(part.examples), "report": part.report.as_dict()} for s, part in parts.items()}
    return arrays, meta | {
        "type": asdict(content.type), "template": content.template, "warnings": content.warnings
    }  # fmt: skip


def _thaw(entry: Entry, layout: Layout) -> _Content:
    def encoded(split: str) -> Encoded:
        meta = entry.meta[split]
        report = EncodeReport(**{**meta["report"], "warnings": tuple(meta["report"]["warnings"])})
        arrays = {k.removeprefix(f"{split}."): v for k, v in entry.arrays.items() if k.startswith(f"{split}.")}
        return Encoded(restored(layout.examples, arrays, meta["examples"]), report)

    kind = DatasetType(**entry.meta["type"])
    return _Content(kind, encoded("train"), encoded("eval"), entry.meta["template"], tuple(entry.meta["warnings"]))
