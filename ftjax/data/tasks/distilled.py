"""Sequence-level distillation: another data set's prompts with the answers of a teacher (Kim and Rush 2016, arXiv:1606.07947).

loss = - log q(y | x),   y = argmax_y p(y | x), found greedily, or drawn from p: the student learns what the teacher would say

    data=Distilled(source=Local(path="asked.jsonl"), teacher=Pretrained(path="my/large"), max_new_tokens=256)

The teacher answers once: answers are kept in the cache of the data, found again by the teacher's files, the prompts' tokens,
the settings and the code, and written beside it as JSON lines for people. The teacher has a tokenizer and a chat template of
its own, so its vocabulary may be another than the student's. Held-out rows keep the completions of the source, so that the
held-out numbers of students and of plain fine-tuning compare; rows that have none are left out there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from pydantic import Field

from ftjax.data.cache import Cache
from ftjax.data.encode import encode_prompt
from ftjax.data.formats import DatasetType, TypedRows, is_empty, is_messages, shown, type_rows
from ftjax.data.reader import file_sha256
from ftjax.data.rows import BadRows, Row, row_hash
from ftjax.data.task import Plain, Prompt, Split
from ftjax.data.templates import BUILTIN, Chat, render_chats, resolve_template
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError, DataError
from ftjax.generate.bulk import Answer, answer_all
from ftjax.generate.sampling import Sampling
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.registry import register
from ftjax.safefiles import read_json
from ftjax.schema import Component, Default, Slot

PROMPTED = ("prompt_only", "prompt_completion", "preference", "unpaired_preference")
WEIGHTS = (".safetensors", ".json", ".model", ".txt", ".jinja")
CODE = ("generate", "models", "kernels", "quant", "params.py", "ops.py", "tree.py", "rows.py")


@dataclass(frozen=True)
class Answers:
    """What the teacher said.

    Attributes:
      by_prompt: answers by `key_of` the prompt; none where its template refuses the prompt or its context has no room.
      status: of the cache.
      file: the JSON lines; None where there are none.
    """

    by_prompt: dict[str, list[Answer]]
    status: str
    file: Path | None


@register("data")
class Distilled(Plain, Component):
    """The prompts of a data set, answered by a teacher."""

    name: Literal["distilled"] = "distilled"
    source: Annotated[Any, Slot("data"), Field(description="The data set that has the prompts.")]
    teacher: Annotated[Any, Slot("model"), Field(description="The model that answers them.")] = Default(
        "model", "pretrained"
    )
    max_new_tokens: int = Field(256, gt=0, description="Longest answer, in the teacher's tokens.")
    temperature: float = Field(0.0, ge=0, description="Of the teacher's draws; 0 takes the likeliest token each time.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the smallest set whose probability reaches this; 1: all."
    )
    samples: int = Field(1, gt=0, description="Answers to each prompt, a row each.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the draws.")
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="Answers cut at max_new_tokens; keep: the student learns to stop there."
    )
    batch: int = Field(32, gt=0, description="Answers that are generated together.")
    teacher_template: str = Field(
        "", description="Chat template of the teacher: built-in name, .jinja file or text; empty: its tokenizer's own."
    )
    file: str = Field("", description="Where the answers are written as JSON lines; empty: beside the cache.")

    @property
    def chat_template(self) -> str:
        """That of the source, which the student is trained with."""
        return self.source.chat_template

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of the source: held-out rows are its own."""
        return self.source.metrics

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows ``{"prompt", "completion"}``: of "train" the teacher's completions, of "eval" the source's.

        Raises:
          DataError: the rows have no prompts, a template is missing, or no answer is left.
        """
        typed = self._asked(split, bad or BadRows())
        if split == "eval":
            return [row for row in typed.rows if not is_empty(row.get("completion") or "")]
        answers, kept = self._answers(), []
        for row in typed.rows:
            for i, answer in enumerate(a for a in answers.by_prompt[key_of(row)] if self._keeps(a)):
                said: Any = (
                    [{"role": "assistant", "content": answer.text}] if is_messages(row["prompt"]) else answer.text
                )
                origin = f"{row.origin} answer {i + 1}" if self.samples > 1 else row.origin
                kept.append(Row({**row, "completion": said}, origin))
        if typed.rows and not kept:
            raise DataError(
                f"no answer of the teacher is left: {self._report(answers)[0]}. Set a larger data.max_new_tokens, or "
                "data.unfinished=keep for answers that were cut"
            )
        return kept

    def prompts(self, n: int) -> list[Prompt]:
        """n fixed held-out prompts of the source."""
        return self.source.prompts(n)

    def fingerprint(self) -> dict[str, str]:
        """Those of the source, and a hash of the answers, which are made for it where there are none yet."""
        content = {k: [(a.text, a.ended) for a in v] for k, v in self._answers().by_prompt.items()}
        found = {f"source.{k}": v for k, v in self.source.fingerprint().items()}
        return found | {"answers": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}

    def describe(self) -> Iterator[str]:
        """Who answers, and what became of it."""
        yield from getattr(self.source, "describe", list)()
        yield f"the prompts of data.source={self.source.name} are answered by {self.teacher.label}"
        yield from self._report(self._answers())

    def check(self, run: Any) -> Iterator[str]:
        """A source of prompts and a teacher that was trained."""
        if not hasattr(self.teacher, "path"):
            yield f"data.teacher={self.teacher.name}  a teacher is a model that was trained; use pretrained"
        if self.source.name == "tasks":
            yield "data.source=tasks  has no rows of its own"
        if self.samples > 1 and self.temperature == 0:
            yield f"data.samples={self.samples}, data.temperature=0  the answers would all be the same; set a temperature"

    def advise(self, run: Any) -> Iterator[str]:
        """Settings that are probably not meant."""
        if self.teacher == run.model:
            yield f"data.teacher.path={self.teacher.path}  is the model that is trained: it learns from its own answers"
        if self.unfinished == "keep":
            yield "data.unfinished=keep  an end is put behind answers that were cut: the student learns to stop there"

    # The answers -----------------------------------------------------------------------------------------------------------

    def _asked(self, split: Split, bad: BadRows) -> TypedRows:
        """The source's rows as prompt, with a completion where they have one."""
        rows = self.source.examples(split, bad=bad)
        if not rows:
            return TypedRows(DatasetType("prompt_only", False), [])
        typed = type_rows(rows, columns=self.source.columns, bad=bad)
        talks = typed.type.kind == "language_modeling" and typed.type.conversational
        if typed.type.kind not in PROMPTED and not talks:
            raise DataError(
                f"data.source={self.source.name} has no prompts for a teacher to answer: its rows are {typed.type}; "
                f"{shown(typed.rows)}. Expected prompt (with any answers), or messages"
            )
        return TypedRows(typed.type, [_prompt_of(row) for row in typed.rows])

    def _keeps(self, answer: Answer) -> bool:
        return bool(answer.text.strip()) and (answer.ended or self.unfinished == "keep")

    def _answers(self) -> Answers:
        """The teacher's answers, from memory, from the cache, or made now."""
        files = (self.source.fingerprint(), teacher_files(self.teacher.folder))
        return _answers_of(self, json.dumps(files, sort_keys=True))  # pyright: ignore[reportArgumentType]

    def _report(self, answers: Answers) -> list[str]:
        """Lines for the console."""
        said = [a for found in answers.by_prompt.values() for a in found]
        empty = sum(not a.text.strip() for a in said)
        cut = sum(bool(a.text.strip()) and not a.ended for a in said)
        silent = sum(not found for found in answers.by_prompt.values())
        n = max(len(said), 1)
        counts = {
            "empty and dropped": empty,
            "unfinished and " + {"drop": "dropped", "keep": "kept"}[self.unfinished]: cut,
            "prompts refused by the teacher's template or too long for its context": silent,
        }
        lost = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        lines = [
            f"{len(said):,} answers to {len(answers.by_prompt):,} prompts: {sum(a.tokens for a in said) / n:.1f} new tokens on "
            f"average, {sum(a.ended for a in said) / n:.1%} ended with EOS{lost}; cache: {answers.status}"
        ]
        return lines + ([f"to read: {answers.file}"] if answers.file else [])


def key_of(row: Row) -> str:
    """What of a row the teacher sees."""
    return row_hash({k: row[k] for k in ("prompt", "tools") if row.get(k)})


def _prompt_of(row: Row) -> Row:
    """A row's prompt, its true completion if there is one, and its tools."""
    if "messages" in row:
        talk = row["messages"]
        last = next((i for i in range(len(talk) - 1, 0, -1) if talk[i]["role"] == "assistant"), len(talk))
        found = {"prompt": talk[:last], "completion": talk[last : last + 1]}
    else:
        true = row.get("completion") if row.get("label", True) else None
        found = {"prompt": row["prompt"], "completion": row.get("chosen", true)}
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return Row({**{k: v for k, v in found.items() if v}, **tools, "prompt": found["prompt"]}, row.origin)


# Asking --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _answers_of(task: Distilled, files: str) -> Answers:
    """The answers to all training prompts; `files` are the hashes of everything that is read, so that a change is seen."""
    rows = {key_of(r): r for r in task._asked("train", BadRows(10**9)).rows}
    tokenizer: Any = load_tokenizer(task.teacher.folder)
    apart = _reads_apart(task)
    prompts = {k: ids for k, row in rows.items() if len(ids := _ids(row, task, tokenizer, end=apart))}
    digest = hashlib.sha256()
    for ids in prompts.values():
        digest.update(f"{len(ids)}:".encode() + ids.tobytes())
    settings = ("max_new_tokens", "temperature", "top_p", "samples", "seed")
    parts = {
        "teacher": {**teacher_files(task.teacher.folder), **task.teacher.model_dump(mode="json", exclude={"path"})},
        "prompts": digest.hexdigest(),
        "settings": {k: getattr(task, k) for k in settings},
        "program": _program(),
    }
    cache = Cache(f"distilled-{task.source.name}", parts)
    entry = cache.load()
    if entry:
        found = {k: [Answer(*a) for a in said] for k, said in zip(prompts, entry.meta["answers"], strict=True)}
    else:
        found = dict(zip(prompts, _ask(task, tokenizer, [*prompts.values()]), strict=True))
        cache.store({}, {"answers": [[(a.text, a.tokens, a.ended) for a in said] for said in found.values()]})
    file = (
        Path(task.file).expanduser() if task.file else cache.folder and cache.folder / f"{cache.name}-{cache.key}.jsonl"
    )
    everything = {k: found.get(k, []) for k in rows}
    return Answers(everything, cache.status, file and _written(file, rows, everything))


def _ids(row: Row, task: Distilled, tokenizer: Any, *, end: bool) -> np.ndarray:
    """The prompt as the teacher reads it, int32 [n]; empty where its template refuses it. `end`: a text keeps its EOS."""
    if isinstance(row["prompt"], str):
        ids = encode_prompt(row["prompt"], tokenizer, end=end)
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return ids if len(ids) else np.asarray(begin, np.int32)
    try:
        template = resolve_template(tokenizer, task.teacher_template)
    except DataError:
        raise DataError(
            f"data.teacher={task.teacher.label}: its tokenizer has no chat template, and the prompts are conversations, e.g. "
            f"{row.origin}. Set data.teacher_template to one of {', '.join(BUILTIN)} or to a .jinja file, or use a chat model"
        ) from None
    rendered = render_chats(tokenizer, template, [Chat(row["prompt"], row.get("tools") or None, prompt=True)])[0]
    return np.asarray(rendered.input_ids, np.int32)


def _reads_apart(task: Distilled) -> bool:
    """Whether the teacher reads the prompt apart from what it writes.

    Raises:
      ConfigError: it is no model that writes.
    """
    config = read_json(task.teacher.folder / "config.json")
    outline = hf.model_of(config, Numerics())
    kind = hf.head_of(type(outline), config).kind
    if kind not in ("causal_lm", "seq2seq_lm"):
        raise ConfigError(f"data.teacher={task.teacher.label}  has a head {kind!r}; answers need a language model")
    return bool(getattr(outline, "reads_apart", False))


def _ask(task: Distilled, tokenizer: Any, prompts: list[np.ndarray]) -> list[list[Answer]]:
    """The teacher's answers; its weights are in memory for as long as this takes."""
    if not prompts:
        return []
    model: Any  # one that answers: `_reads_apart` has looked
    model, params = task.teacher.load(Numerics(dtype=task.teacher.dtype), seed=0, vocab=len(tokenizer))
    sampling = Sampling(task.max_new_tokens, task.temperature, top_p=task.top_p, seed=task.seed)
    return answer_all(model, params, tokenizer, prompts, sampling, samples=task.samples, batch=task.batch)


def _written(file: Path, rows: dict[str, Row], answers: dict[str, list[Answer]]) -> Path | None:
    """Writes prompts and answers as JSON lines for people; a full or read-only disk only costs this file."""
    lines = [
        {"prompt": row["prompt"], "completion": a.text, "tokens": a.tokens, "ended": a.ended, "origin": row.origin}
        for key, row in rows.items() for a in answers[key]
    ]  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".partial-")
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        os.replace(temporary, file)
    except OSError:
        return None
    return file


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, int]) -> str:
    return file_sha256(path)


def teacher_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a model folder that decide what it says; a file is read again when it has changed."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in WEIGHTS and p.is_file())
    return {p.name: _sha256(p, (p.stat().st_size, p.stat().st_mtime_ns)) for p in files}


@functools.cache
def _program() -> str:
    """A hash of the code that generates and of jax's version."""
    found, root = hashlib.sha256(jax.__version__.encode()), Path(__file__).parents[2]
    for name in CODE:
        for path in sorted((root / name).rglob("*.py")) or [root / name]:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
