"""Questions with given answers, one of which is right: trained as prompt and completion, judged by log-probability.

    {"question": "What barks?", "choices": ["a cat", "a dog"], "answer": 1}          # one line of quiz.jsonl

    data=MultipleChoice(path="quiz.jsonl", prompt="Question: {question}\\nAnswer:")

`answer` is the number of the choice from 0, its letter or its text. Choices may also be ``{"text": [...], "label": [...]}``,
as in ARC, with a label as the answer. Metrics: see `ftjax.evals.choices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ftjax.data.formats import rename
from ftjax.data.rows import BadRows, Row, row_hash
from ftjax.data.task import Plain, Prompt, Question, Split
from ftjax.data.tasks.local import Local
from ftjax.errors import DataError
from ftjax.registry import register
from ftjax.schema import Component


@register("data")
class MultipleChoice(Plain, Component):
    """Local files of questions with choices: JSON, JSONL (.gz), Parquet."""

    name: Literal["multiple_choice"] = "multiple_choice"
    path: str = Field(min_length=1, description="Data file, or a folder with train, validation or test files.")
    eval_path: str = Field("", description="File with held-out rows; empty: the folder's, else eval_share of the rows.")
    eval_share: float = Field(
        0.05, ge=0, lt=1, description="Rows held out by hash if there is no held-out file; 0: none."
    )
    prompt: str = Field("{question}", min_length=1, description="The prompt; {question} or any other column in braces.")
    delimiter: str = Field(" ", description="What stands between the prompt and an answer.")
    renames: tuple[str, ...] = Field((), description="Renamed columns, each 'ours=theirs', e.g. 'answer=answerKey'.")
    metrics: tuple[str, ...] = Field(("acc", "acc_norm"), description="Metrics on held-out questions.")

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows ``{"prompt", "completion"}`` of "train" or "eval", the right answer as the completion."""
        found = self.questions(split, bad=bad)
        return [Row({"prompt": q.prompt, "completion": q.continuations[q.answer]}, origin) for q, origin in found]

    def questions(self, split: Split, *, bad: BadRows | None = None) -> list[tuple[Question, str]]:
        """Questions of "train" or "eval" with their origins."""
        return asked(self._files.examples(split, bad=bad), self.prompt, self.delimiter, self.renames, bad=bad)

    def prompts(self, n: int) -> list[Prompt]:
        """n fixed held-out questions."""
        rows = {row_hash(r): r for r in self._files.examples("eval", bad=BadRows(10**9))}
        fixed = [rows[key] for key in sorted(rows)]
        found = asked(fixed, self.prompt, self.delimiter, self.renames, bad=BadRows(10**9))[:n]
        return [Prompt(q.prompt, q.continuations[q.answer], origin, q) for q, origin in found]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return self._files.fingerprint()

    @property
    def _files(self) -> Local:
        return Local(path=self.path, eval_path=self.eval_path, eval_share=self.eval_share)


def asked(
    rows: Sequence[Row], prompt: str, delimiter: str, renames: Sequence[str] = (), *, bad: BadRows | None = None
) -> list[tuple[Question, str]]:
    """Rows as questions, with their origins.

    Args:
      rows: with the columns question, choices and answer, and whatever `prompt` names.
      prompt: text with columns in braces.
      delimiter: what stands between the prompt and an answer.
      renames: each ``"ours=theirs"``.
      bad: collects rows that are none.

    Raises:
      DataError: a row is no such question, and `bad` takes no more.
    """
    bad = bad or BadRows()
    out = []
    for row in rename(rows, renames) if rows else []:
        try:
            choices, labels = _choices(row)
            text = prompt
            for key, value in row.items():
                text = text.replace("{" + key + "}", str(value))
            out.append((Question(text, choices, _answer(row.get("answer"), choices, labels), delimiter), row.origin))
        except DataError as e:
            bad.add(f"{row.origin}: {e}")
    return out


def _choices(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and labels (there may be none) of a row's choices."""
    if lacking := [c for c in ("question", "choices", "answer") if c not in row]:
        raise DataError(
            f"no column {lacking[0]!r}: expected the columns question, choices, answer; there are {', '.join(row)}. Others can "
            "be renamed, e.g. data.renames=('answer=answerKey',)"
        )
    given: Any = row.get("choices")
    labels: Any = ()
    if isinstance(given, dict):
        given, labels = given.get("text"), given.get("label") or ()
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(c, str) and c for c in given):
        raise DataError(f"expected choices: a list of two or more texts, got {given!r:.60}")
    return tuple(given), tuple(map(str, labels))


def _answer(given: Any, choices: tuple[str, ...], labels: tuple[str, ...]) -> int:
    """The number of the right choice, from its label, its text, its letter or its number."""
    names = [str(i) for i in range(len(choices))]
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    text = str(given).strip()
    if isinstance(given, int) and not isinstance(given, bool):
        known = [labels, names]
    elif isinstance(given, str):
        known = [labels, choices, letters, names]
    else:
        known = []
    for several in known:
        if text in several:
            return several.index(text)
    raise DataError(f"answer {given!r} is none of the {len(choices)} choices: {', '.join(labels or choices):.80}")
