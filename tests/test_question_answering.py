"""Questions about a text: windows, where answers stand, what is refused; SQuAD's scores by hand; through the command line."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.layouts import arrays_of, identity, meta_of, restored
from ftjax.data.preview import preview
from ftjax.data.rows import BadRows, Row
from ftjax.data.spans import SpanExamples, encode_questions, type_questions
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError, DataError
from ftjax.evals.answers import best_spans, exact, f1, normalised, squad
from ftjax.models import hf
from ftjax.models.sources import embedded_folder
from ftjax.objectives.question_answering import QuestionAnswering
from ftjax.verbs import main
from tests import tiny, tinymodels

TEXT = "The list is read first. Then the file is written to disk. In the end a class gives the value back to the user."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_folder())


def row(question, context, *answers, origin="x:1"):
    found = {"text": list(answers), "answer_start": [context.index(a) for a in answers]}
    return Row({"question": question, "context": context, "answers": found}, origin)


ROWS = [row("what is written?", TEXT, "the file", "file"), row("who?", "a user and a class", "a class", origin="x:2")]


def encoded(tokenizer, rows=ROWS, stride=4, like=None, bad=None, **loader):
    return encode_questions(
        type_questions(rows, bad=bad), tokenizer, Loader(**loader), stride=stride, like=like, bad=bad
    )


def test_one_window(tokenizer):
    made = encoded(tokenizer)
    examples = made.examples
    assert len(examples) == 2 and made.report.dropped == 0 and not examples.nullable
    for i, want in enumerate(["the file", "a class"]):
        ids = examples.input_ids[examples.offsets[i] : examples.offsets[i + 1]]
        start, end = examples.spans[i]
        assert tokenizer.decode(ids[start : end + 1].tolist()).strip() == want
        assert ids.tolist() == tokenizer(ROWS[i]["question"], ROWS[i]["context"])["input_ids"]
    assert examples.answers_of(0) == ("the file", "file") and examples.context(1) == "a user and a class"
    batch = examples.build([[1], [0]], 64, count=3)
    assert batch.index.tolist() == [1, 0, -1] and batch.weights.tolist() == [1, 1, 0]
    assert (batch.starts[0], batch.ends[0]) == tuple(examples.spans[1])
    shown = preview(examples, tokenizer, 2)[1]
    assert [s.text.strip() for s in shown.spans if s.trained] == ["a class"]


def test_windows_overlap_and_cover_the_context(tokenizer):
    examples = encoded(tokenizer, max_length=20, stride=4).examples
    mine = [i for i in range(len(examples)) if examples.rows[i] == 0]
    assert len(mine) > 2 and examples.lengths.max() == 20
    parts = []
    for i in mine:
        chars = examples.chars[examples.offsets[i] : examples.offsets[i + 1]]
        parts.append([tuple(c) for c in chars[chars[:, 0] >= 0].tolist()])
    for one, two in zip(parts, parts[1:], strict=False):
        assert one[-4:] == two[:4]
    whole = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert [c for p in parts[:1] for c in p] + [c for p in parts[1:] for c in p[4:]] == list(map(tuple, whole))
    # the answer is where its window has all of it, else the first token
    at = TEXT.index("the file"), TEXT.index("the file") + 8
    for i, part in zip(mine, parts, strict=True):
        there = part[0][0] <= at[0] and part[-1][1] >= at[1]
        ids = examples.input_ids[examples.offsets[i] : examples.offsets[i + 1]]
        start, end = examples.spans[i].tolist()
        assert tokenizer.decode(ids[start : end + 1].tolist()).strip() == ("the file" if there else "<s>")
    assert {tuple(s) for s in examples.spans[mine].tolist()} > {(0, 0)}


def test_questions_without_an_answer(tokenizer):
    rows = [*ROWS, row("why?", TEXT, origin="x:3")]
    examples = encoded(tokenizer, rows).examples
    assert examples.nullable and examples.spans[2].tolist() == [0, 0] and examples.answers_of(2) == ()
    assert encoded(tokenizer, ROWS, like=examples).examples.nullable
    assert not encoded(tokenizer, rows, like=encoded(tokenizer).examples).examples.nullable


def with_answers(**answers):
    return Row({"question": "q", "context": "one two one", "answers": answers}, "x:3")


@pytest.mark.parametrize(
    "bad_row, text",
    [
        (
            with_answers(text=["two"], answer_start=[5]),
            "x:3: answer 'two' is not in the context at character 5: it stands at 4",
        ),
        (
            with_answers(text=["six"], answer_start=[0]),
            "answer 'six' is not in the context at .*: the context does not",
        ),
        (with_answers(text=["one"], answer_start=[-3]), "answer 'one' is not in the context at character -3"),
        (with_answers(text=["two"], answer_start=[]), "1 answers in 'text', but 0 places in 'answer_start'"),
        (with_answers(text=[""], answer_start=[0]), "a question without an answer has empty lists"),
        (with_answers(text=["two"], answer_start=["4"]), "expected whole numbers as 'answer_start', got '4'"),
        (with_answers(text=["two"]), "field 'answers' expected {'text'"),
        (Row({"question": "q", "context": ""}, "x:3"), "no column 'answers'.*rename with data.columns"),
        (Row({"question": "q", "context": " ", "answers": {}}, "x:3"), "field 'context' expected a text, got ' '"),
    ],
)
def test_bad_rows(tokenizer, bad_row, text):
    with pytest.raises(DataError, match=text):
        encoded(tokenizer, [*ROWS, bad_row])
    bad = BadRows(1)
    made = encoded(tokenizer, [*ROWS, bad_row], bad=bad)
    assert len(made.examples) == 2 and made.report.skipped_bad == 1


def test_a_question_too_long(tokenizer):
    rows = [*ROWS, row("word " * 30, TEXT, "disk", origin="x:3")]
    made = encoded(tokenizer, rows, max_length=24)
    assert (
        made.report.dropped == 1 and set(made.examples.rows.tolist()) == {0, 1} and "no room" in made.report.warnings[0]
    )
    with pytest.raises(DataError, match="1 of 3 questions leave no room for 4 shared tokens.*x:3"):
        encoded(tokenizer, rows, max_length=24, truncation="error")
    with pytest.raises(ConfigError, match="24 shared tokens leave no room in loader.max_length=24"):
        encoded(tokenizer, rows, stride=24, max_length=24)


def test_the_cache_gives_the_same(tokenizer):
    examples = encoded(tokenizer, max_length=20).examples
    again = restored(SpanExamples, arrays_of(examples), meta_of(examples))
    assert identity(again) == identity(examples) and again.answers == examples.answers
    last = examples.take(np.array([len(examples) - 1]))
    assert last.origin(0) == "x:2" and last.answers_of(1) == ("a class",) and last.context(0) == "a user and a class"


# ---------------------------------------------------------------------------------------------- scores
def test_squad_scores_by_hand():
    assert normalised("The cat's hat, a  Hat!") == ["cats", "hat", "hat"]
    assert exact("the U.S.", "US") == 1.0 and exact("U S", "US") == 0.0
    assert f1("the old man", "old man sea") == pytest.approx(2 * 2 / (2 + 3))  # precision 1, recall 2/3
    assert f1("cat cat", "cat") == pytest.approx(2 / 3) and f1("cat", "dog") == 0.0
    assert f1("", "") == 1.0 and f1("", "cat") == 0.0
    found = squad(["old man", "cat", ""], [("sea", "The old man"), ("old cat",), ()])
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx((1 + 2 / 3 + 1) / 3)}


def logits_for(examples, choose, length=64, floor=-9.0):
    """Batch and logits that point at what `choose(i)` says of window i: (first, last, score)."""
    batch = examples.build([[i] for i in range(len(examples))], length, count=len(examples) + 1)
    starts = np.full((len(examples) + 1, length), floor, np.float32)
    ends = starts.copy()
    for i in range(len(examples)):
        first, last, score = choose(i)
        starts[i, first], ends[i, last] = score, score
    return {"starts": starts, "ends": ends, "index": batch.index}


def test_the_best_span_is_sought_over_all_windows(tokenizer):
    objective, examples = QuestionAnswering(), encoded(tokenizer, max_length=20).examples
    good = {i for i in range(len(examples)) if examples.spans[i, 0]}

    def choose(i):
        return (*examples.spans[i], 5.0) if i in good else (16, 17, 4.0)

    found = logits_for(examples, choose)
    assert objective.examine(found, examples) == {"exact_match": 1.0, "f1": 1.0}
    order = np.random.default_rng(0).permutation(len(examples) + 1)  # whatever the order of the windows
    assert objective.examine({k: v[order] for k, v in found.items()}, examples)["f1"] == 1.0
    worse = logits_for(examples, lambda i: (*examples.spans[i], 3.0) if i in good else (16, 17, 4.0))
    assert objective.examine(worse, examples)["exact_match"] == 0.5  # the second row has one window only


def test_what_no_span_may_be(tokenizer):
    """The question, the specials, an end before the beginning, more than max_answer tokens."""
    examples = encoded(tokenizer).examples
    found = logits_for(examples, lambda i: (*examples.spans[i], 5.0), floor=-100.0)
    found["starts"][:, 1], found["ends"][:, 2] = 50.0, 50.0  # in the question
    found["ends"][0, examples.spans[0, 0] - 1] = 40.0  # before the beginning
    for i in (0, 1):
        found["starts"][i, examples.spans[i, 1]] = 4.0  # the last word alone is second best
    parts = found["starts"], found["ends"], examples, found["index"]
    assert best_spans(*parts, 2) == {0: "the file", 1: "a class"}
    assert best_spans(*parts, 1) == {0: "file", 1: "class"}
    assert QuestionAnswering().examine(found, examples)["exact_match"] == 1.0


def test_no_answer_when_the_first_token_is_better_in_every_window(tokenizer):
    rows = [row("what?", TEXT, "the file"), row("why?", TEXT, origin="x:2")]
    examples = encoded(tokenizer, rows, max_length=20).examples
    objective = QuestionAnswering()
    sure = logits_for(examples, lambda i: (*examples.spans[i], 5.0), 20)
    assert objective.examine(sure, examples) == {"exact_match": 1.0, "f1": 1.0}
    second = np.flatnonzero(examples.rows == 1)
    sure["starts"][second[1], 0] = sure["ends"][second[1], 0] = -20.0  # one window does not say so
    sure["starts"][second[1], 16] = sure["ends"][second[1], 17] = 1.0
    assert objective.examine(sure, examples)["exact_match"] == 0.5


CONFIG = """
from ftjax.config import *
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.question_answering import QuestionAnswering
from ftjax.peft.full import Full

def get_config():
    return Run(
        name="x", model=Pretrained(path="model"), data=Local(path="train.jsonl", eval_share=0.2),
        objective=QuestionAnswering(doc_stride=4), peft=Full(), loader=Loader(max_length=16),
        optim=Optim(lr=3e-3, warmup=5), train=Train(steps=150, batch=16, log_every=75), compute=Compute(cache=""),
    )
"""


def test_through_the_command_line(tmp_path, monkeypatch):
    """A tiny BERT finds the number in a text that is longer than a window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    small = tinymodels.known()["bert"]()
    model = type(small)(type(small.config).from_hf(small.config.to_hf() | {"vocab_size": 4096, "num_hidden_layers": 1}))
    hf.save(model, tiny.weights(model), tmp_path / "model", tokenizer_from=embedded_folder())
    draw = random.Random(0)
    lines = []
    for _ in range(150):
        words = draw.choices(["file", "list", "class", "value", "name"], k=draw.randrange(6, 18))
        answer, at = draw.choice("0123456789"), draw.randrange(len(words) + 1)
        context = " ".join([*words[:at], answer, *words[at:]])
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        lines.append({"question": "number?", "context": context, "answers": answers})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "x.py").write_text(CONFIG)
    assert main(["--config", "x.py"]) == 0
    found = [json.loads(x) for x in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()]
    first, last = [[x for x in found if x["event"] == "eval"][i] for i in (0, -1)]
    assert last["exact_match"] > 0.9 > 0.5 > first["exact_match"] and last["f1"] >= last["exact_match"]
    saved = json.loads((tmp_path / "runs/x/model/config.json").read_text())
    assert saved["architectures"] == ["BertForQuestionAnswering"]
