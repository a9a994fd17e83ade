"""What a data set is to the rest: `Task`. One file under `tasks/` each.

@register("data")
class MyData(Component):
    name: Literal["my_data"] = "my_data"
    ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ftjax.data.formats import TypedRows, type_rows
from ftjax.data.rows import BadRows, Row, row_hash

Split = Literal["train", "eval"]
TEXT_PROMPT_CHARS = 120  # of a held-out text, when there are no prompts of its own


@dataclass(frozen=True)
class Question:
    """A prompt with given answers.

    Attributes:
      prompt: text before the answer.
      choices: the answers, bare.
      answer: number of the right one.
      delimiter: what stands between the prompt and an answer.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str = " "

    @property
    def continuations(self) -> tuple[str, ...]:
        """The choices as they follow the prompt."""
        return tuple(self.delimiter + c for c in self.choices)


@dataclass(frozen=True)
class Prompt:
    """A held-out question to the model.

    Attributes:
      prompt: text, or messages that end before the answer.
      reference: the expected answer.
      origin: place of the row.
      question: the same with its choices, where there are any.
    """

    prompt: str | list[dict[str, Any]]
    reference: str
    origin: str = ""
    question: Question | None = None


class Task(Protocol):
    """A data set: rows of a split, and how they are to be read.

    Attributes:
      name: registered name.
      chat_template: see `templates.resolve_template`.
      columns: renames ``"ours=theirs"``.
      metrics: names of generation metrics for `prompts`, e.g. ``("rouge_l", "token_f1")``.
      wraps: long texts are cut into pieces rather than truncated (corpora for continued pre-training).

    A labelled one may also have ``labels`` (names of its classes in their order), ``problem`` (as transformers'
    ``problem_type``) and ``scored(rows)``: metrics of its own over the rows of the held-out set, see `LossOutput.rows`.
    """

    name: str

    @property
    def chat_template(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def wraps(self) -> bool: ...

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows with their origin; "eval" may be empty. Malformed ones go to `bad`."""
        ...

    def prompts(self, n: int) -> list[Prompt]:
        """The same n held-out prompts every time; fewer if there are not so many."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What decides the rows: file hashes, versions. Cheap next to reading them."""
        ...


class Plain:
    """What most data sets have: rows with our names, no chat template, texts that are truncated."""

    @property
    def chat_template(self) -> str:
        """None."""
        return ""

    @property
    def columns(self) -> tuple[str, ...]:
        """None: the rows have our names already."""
        return ()

    @property
    def wraps(self) -> bool:
        """Texts are never cut into pieces."""
        return False


class Silent(Plain):
    """A plain data set of which nothing is generated."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """None of generated texts."""
        return ()


def fixed_prompts(rows: Sequence[Row], n: int, *, columns: Sequence[str] = ()) -> list[Prompt]:
    """Prompts from held-out rows: the n with the smallest hashes, so that a longer data set keeps most of them."""
    if not rows or n <= 0:
        return []
    typed = type_rows(rows, columns=columns, bad=BadRows(len(rows)))
    unique = {row_hash(r): r for r in typed.rows}
    found = (_prompt(typed, unique[key]) for key in sorted(unique))
    return [p for p in found if p is not None][:n]


def _prompt(typed: TypedRows, row: Row) -> Prompt | None:
    if "messages" in row:
        messages = row["messages"]
        last = next((i for i in range(len(messages) - 1, 0, -1) if messages[i]["role"] == "assistant"), None)
        return None if last is None else Prompt(messages[:last], _text(messages[last : last + 1]), row.origin)
    if "prompt" in row:
        return Prompt(row["prompt"], _text(row.get("completion", row.get("chosen", ""))), row.origin)
    text = row["text"].strip()
    cut = text.rfind(" ", 1, TEXT_PROMPT_CHARS)
    if len(text) <= TEXT_PROMPT_CHARS or cut < 1:
        return None
    return Prompt(text[:cut], text[cut : 3 * TEXT_PROMPT_CHARS], row.origin)


def _text(answer: str | list[dict[str, Any]]) -> str:
    return (
        answer
        if isinstance(answer, str)
        else "".join(m["content"] for m in answer if isinstance(m.get("content"), str))
    )
