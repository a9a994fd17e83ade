"""Multiple choice by log-probability: the answer that a model finds most probable, without generating anything.

    acc:       argmax_c log p(c | prompt)
    acc_norm:  argmax_c log p(c | prompt) / characters of c        acc_bytes: / its bytes in UTF-8

    choice_scores(("acc", "acc_norm"), model, params, tokenizer, questions)      # {"acc": 0.61, "acc_norm": 0.64}

As lm-evaluation-harness 0.4.13 defines the three. While training they are metrics of ``data=multiple_choice``; on the command
line: ``python run.py eval --run DIR evals=choices path=quiz.jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ftjax.data.reader import read_rows
from ftjax.data.task import Prompt, Question
from ftjax.data.tasks.multiple_choice import asked
from ftjax.errors import ConfigError, DataError
from ftjax.evals.likelihood import Likelihood, likelihoods
from ftjax.evals.request import Measured, as_json
from ftjax.params import Store
from ftjax.registry import register
from ftjax.schema import Component

# What a choice's log-probability is divided by.
NORMS: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def choice_likelihoods(
    model: Any, params: Store, tokenizer: Any, questions: Sequence[Question], *, batch: int = 8
) -> list[list[Likelihood]]:
    """The log-likelihood of each choice of each question.

    Raises:
      DataError: a choice has no tokens, or does not fit into the model.
    """
    encode = encode_apart if model.reads_apart else encode_pair
    pairs = [encode(tokenizer, q.prompt, text) for q in questions for text in q.continuations]
    flat = iter(likelihoods(model, params, pairs, batch=batch))
    return [[next(flat) for _ in q.choices] for q in questions]


def accuracies(
    names: Sequence[str], questions: Sequence[Question], found: Sequence[Sequence[Likelihood]]
) -> dict[str, float]:
    """The share of questions whose best choice is the right one, for each way of weighing lengths."""
    right = {
        name: [
            np.argmax([one.logprob / NORMS[name](text) for one, text in zip(several, q.choices, strict=True)])
            == q.answer
            for q, several in zip(questions, found, strict=True)
        ]
        for name in names
    }
    return {name: float(np.mean(each)) for name, each in right.items() if each}


def choice_scores(
    names: Sequence[str], model: Any, params: Store, tokenizer: Any, questions: Sequence[Question], *, batch: int = 8
) -> dict[str, float]:
    """Metrics of `NORMS` over the questions."""
    found = choice_likelihoods(model, params, tokenizer, questions, batch=batch)
    return accuracies(names, questions, found)


def prompt_scores(
    names: Sequence[str], model: Any, params: Store, tokenizer: Any, prompts: Sequence[Prompt], *, batch: int
) -> dict[str, float]:
    """`choice_scores` of those held-out prompts that are questions.

    Raises:
      ConfigError: metrics are asked for, and no prompt has choices.
    """
    questions = [p.question for p in prompts if p.question is not None]
    if names and prompts and not questions:
        raise ConfigError(
            f"data.metrics={','.join(names)}  the rows have no choices; those of data=multiple_choice have"
        )
    return choice_scores(names, model, params, tokenizer, questions, batch=batch) if names else {}


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows, tokenized together; spaces at the prompt's end go to the answer."""
    if not prompt:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise DataError("the prompt is empty, and the tokenizer has neither BOS nor EOS to begin a text with")
        return [first], tokenizer.encode(answer, add_special_tokens=False)
    bare = prompt.rstrip()
    whole, context = (tokenizer.encode(text) for text in (prompt + answer, bare))
    return context, whole[len(context) :]


def encode_apart(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt for the encoder and of an answer for the decoder."""
    return tokenizer.encode(prompt), tokenizer.encode(answer, add_special_tokens=False)


@register("eval")
class Choices(Component):
    """Multiple choice from a file of rows {question, choices, answer}."""

    name: Literal["choices"] = "choices"
    path: str = Field(min_length=1, description="JSON, JSONL or Parquet file; see data=multiple_choice.")
    prompt: str = Field("{question}", min_length=1, description="The prompt; {question} or any other column in braces.")
    delimiter: str = Field(" ", description="What stands between the prompt and an answer.")
    renames: tuple[str, ...] = Field((), description="Renamed columns, each 'ours=theirs', e.g. 'answer=answerKey'.")
    limit: int = Field(0, ge=0, description="Rows; 0: all.")
    batch: int = Field(8, gt=0, description="Rows per call of the model.")

    @property
    def label(self) -> str:
        """``choices-`` and the file."""
        return f"choices-{self.path.replace('\\', '/').rpartition('/')[2].partition('.')[0]}"

    def measure(self, model: Any, params: Store, tokenizer: Any, *, template: str) -> Measured:
        """Scores every question.

        Raises:
          ConfigError: the file holds no questions.
        """
        found = asked(list(read_rows(self.path)), self.prompt, self.delimiter, self.renames)
        questions = [q for q, _ in found][: self.limit or None]
        if not questions:
            raise ConfigError(f"{self.path} holds no questions")
        scores = choice_likelihoods(model, params, tokenizer, questions, batch=self.batch)
        numbers = accuracies(tuple(NORMS), questions, scores)
        table = "\n".join(f"{name:<10} {value:.4f}" for name, value in numbers.items())
        rows = [
            {"origin": origin, "answer": q.answer, "logprobs": [one.logprob for one in several]}
            for (q, origin), several in zip(found, scores, strict=False)
        ]
        record = {"request": as_json(self), "questions": len(questions), "results": numbers, "rows": rows}
        return Measured(f"{len(questions)} questions\n{table}", record)
