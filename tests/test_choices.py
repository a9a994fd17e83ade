"""Multiple choice: what a row may look like, the metrics by hand, log-likelihoods against a plain pass, in training."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ftjax import registry
from ftjax.config import Evaluate, Loader, Run, Train
from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import BadRows, Row
from ftjax.data.task import Prompt, Question
from ftjax.data.tasks.multiple_choice import MultipleChoice, asked
from ftjax.errors import ConfigError, DataError
from ftjax.evals import likelihood
from ftjax.evals.choices import accuracies, choice_likelihoods, encode_pair, prompt_scores
from ftjax.evals.likelihood import Likelihood, likelihoods
from ftjax.evals.request import requested
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.train.session import Evaluator
from ftjax.train.setup import prepare
from tests import tiny


def one(row: dict, prompt: str = "{question}", **options) -> Question:
    return asked([Row(row, "x.jsonl:1")], prompt, " ", **options)[0][0]


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"choices": ["a", "b"], "answer": 1}, 1),
        ({"choices": ["a", "b"], "answer": "B"}, 1),
        ({"choices": ["a", "b"], "answer": "1"}, 1),
        ({"choices": ["a", "b"], "answer": " b "}, 1),
        ({"choices": ["B", "A"], "answer": "A"}, 1),  # the text before the letter
        ({"choices": ["2", "1"], "answer": "1"}, 1),  # and before the number
        ({"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answer": "3"}, 2),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "A"}, 0),
    ],
)
def test_answers(row, answer):
    assert one({"question": "?", **row}).answer == answer


def test_prompts_and_renames():
    row = {"ctx": "He", "endings": ["ran", "sat"], "label": "1", "subject": "sport"}
    renames = ("question=ctx", "choices=endings", "answer=label")
    q = one(row, "{subject}: {question} {oops}", renames=renames)
    assert q == Question("sport: He {oops}", ("ran", "sat"), 1) and q.continuations == (" ran", " sat")


@pytest.mark.parametrize(
    "row, text",
    [
        ({"question": "?", "choices": ["a"], "answer": 0}, "two or more texts"),
        ({"question": "?", "choices": "ab", "answer": 0}, "two or more texts"),
        ({"question": "?", "choices": ["a", ""], "answer": 0}, "two or more texts"),
        ({"choices": ["a", "b"], "answer": 0}, "expected the columns question"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "answer 2 is none of the 2 choices: a, b"),
        ({"question": "?", "choices": ["a", "b"], "answer": -1}, "answer -1 is none"),
        ({"question": "?", "choices": ["a", "b"], "answer": True}, "answer True is none"),
        ({"question": "?", "choices": ["a", "b"]}, "no column 'answer': expected the columns question"),
    ],
)
def test_what_is_no_question(row, text):
    with pytest.raises(DataError, match=f"x.jsonl:1: .*{text}"):
        one(row)
    bad = BadRows(1)
    assert asked([Row(row, "x.jsonl:1")], "{question}", " ", bad=bad) == [] and bad.count == 1


def test_metrics_by_hand():
    questions = [Question("?", ("a", "bbbb"), 1), Question("?", ("éé", "xyz"), 0)]
    found = [[Likelihood(x, False) for x in row] for row in ([-1.0, -2.0], [-3.0, -4.0])]
    # sums -1 > -2 and -3 > -4; per character -1 < -0.5 and -1.5 < -1.33; per byte -1 < -0.5 and -0.75 > -1.33
    assert accuracies(("acc", "acc_norm", "acc_bytes"), questions, found) == {
        "acc": 0.5, "acc_norm": 0.5, "acc_bytes": 1.0,
    }  # fmt: skip
    assert accuracies(("acc",), [], []) == {}


def test_likelihoods_are_those_of_a_plain_pass():
    model = tiny.llama()
    params, rng = tiny.weights(model), np.random.default_rng(0)
    sizes = [(1, 1), (5, 3), (30, 8), (17, 1), (60, 5), (63, 1), (64, 1), (80, 20), (2, 64)]
    pairs = [([int(x) for x in rng.integers(3, 96, n)], [int(x) for x in rng.integers(3, 96, m)]) for n, m in sizes]
    compiled: Any = likelihood._sums
    before = compiled._cache_size()
    found = likelihoods(model, params, pairs, batch=4)
    assert compiled._cache_size() - before <= 3  # widths 16, 32, 64
    assert found == likelihoods(model, params, pairs, batch=4)
    logits = jax.jit(
        lambda ids: model.apply(params, {"input_ids": ids}).logits
    )  # padding behind changes nothing before

    def plain(ids: list[int]) -> np.ndarray:
        return np.asarray(jax.nn.log_softmax(logits(np.array([ids + [0] * (64 - len(ids))], np.int32))))[0]

    for (context, answer), ours in zip(pairs, found, strict=True):
        row = [*context, *answer][-65:]
        picked = plain(row[:-1])[np.arange(len(row) - 1), row[1:]][-len(answer) :]
        assert ours.logprob == pytest.approx(float(picked.sum()), abs=1e-4)
    start, greedy = pairs[1][0], []
    for _ in range(3):
        greedy.append(int(plain([*start, *greedy])[len(start) + len(greedy) - 1].argmax()))
    assert [x.greedy for x in likelihoods(model, params, [(start, greedy), (start, [*greedy[:2], 5])])] == [True, False]


def test_what_cannot_be_scored():
    model = tiny.llama()
    params = tiny.weights(model)
    for pair, text in ((([1], []), "continuation is empty"), (([], [1]), "context is empty")):
        with pytest.raises(DataError, match=f"pair 2 of 2: {text}"):
            likelihoods(model, params, [([1], [1]), pair])
    with pytest.raises(DataError, match="a continuation of 65 tokens does not fit into 64"):
        likelihoods(model, params, [([1], [1] * 65)])
    classifier = tiny.llama(head=HeadSpec("sequence_classification", ("a", "b")))
    with pytest.raises(ConfigError, match="need a language model"):
        likelihoods(classifier, tiny.weights(classifier), [([1], [1])])
    with pytest.raises(ConfigError, match="the rows have no choices"):
        prompt_scores(("acc",), model, params, None, [Prompt("a", "b")], batch=2)


class Letters:
    """A token per character; BOS first."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [3 + ord(c) % 90 for c in text]


def test_pairs_of_tokens():
    tokens = Letters()
    assert encode_pair(tokens, "ab", " c") == (tokens.encode("ab"), tokens.encode(" c", False))
    assert encode_pair(tokens, "ab  ", "c") == (tokens.encode("ab"), tokens.encode("  c", False))
    assert encode_pair(tokens, "", "c") == ([1], tokens.encode("c", False))


def quiz(folder: Path) -> Path:
    path = folder / "quiz.jsonl"
    rows = [{"question": f"{i} is", "choices": ["odd", "even"], "answer": 1 - i % 2} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_data_set(tmp_path):
    data = MultipleChoice(path=str(quiz(tmp_path)), eval_share=0.3)
    train, held_out = data.examples("train"), data.examples("eval")
    assert len(train) + len(held_out) == 40 and len(held_out) > 3
    assert {r["completion"] for r in train} == {" odd", " even"} and train[0].origin.endswith("quiz.jsonl:1")
    prompts = data.prompts(3)
    assert prompts == data.prompts(5)[:3] and {p.prompt for p in prompts} < {r["prompt"] for r in held_out}
    assert all(p.question and p.reference == p.question.continuations[p.question.answer] for p in prompts)


def test_requests():
    found = requested(["evals=choices", "path=a/quiz.v2.jsonl", "limit=3", "delimiter=\n"])
    assert found.label == "choices-quiz"
    for words, text in (
        (["evals=choises"], "unknown eval 'choises'. Did you mean 'choices'"),
        (["evals=choices"], "path  "),
        (["evals=choices", "path=x", "limmit=3"], "limmit  unknown field. Did you mean 'limit'"),
        (["evals=choices", "path=x", "batch=0"], "batch=0  "),
        (["evals=choices", "path=x", "path=y"], "given twice"),
        (["evals=choices", "path"], "expected field=value"),
    ):
        with pytest.raises(ConfigError, match=text):
            requested(words)


def test_metrics_while_training(tmp_path):
    data = MultipleChoice(path=str(quiz(tmp_path)), eval_share=0.5, metrics=("acc", "rouge_l"))
    train_tokenizer("bpe", data.examples("train"), 300, tmp_path / "base")
    vocab = len(json.loads((tmp_path / "base/tokenizer.json").read_text())["model"]["vocab"])
    model = tiny.llama(vocab_size=vocab)
    hf.save(model, tiny.weights(model), tmp_path / "base")
    run = Run(
        out=str(tmp_path / "run"), model=registry.get("model", "pretrained")(path=str(tmp_path / "base")), data=data,
        evaluate=Evaluate(generate=2, metric_examples=12, max_new_tokens=4), train=Train(batch=16, accumulate=2),
        loader=Loader(max_length=32),
    )  # fmt: skip
    setup = prepare(run, say=lambda _: None)
    evaluator = Evaluator(setup, lambda _: contextlib.nullcontext())
    shown, numbers = evaluator.answers(setup.state)
    assert len(shown) == 2 and set(numbers) == {"acc", "rouge_l"}
    prompts = data.prompts(12)
    questions = [p.question for p in prompts if p.question]
    found = choice_likelihoods(setup.model, evaluator.policy(setup.state), setup.tokenizer, questions, batch=3)
    right = [x[q.answer].logprob > x[1 - q.answer].logprob for x, q in zip(found, questions, strict=True)]
    assert len(right) == 12 and numbers["acc"] == pytest.approx(np.mean(right)) and 0 < numbers["acc"] < 1
