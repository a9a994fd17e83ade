"""Bad data of every kind, for every objective: one row of a table for each, through `prepare`, as a run reads its data.

What a whole file has wrong ends the run with a text that says what is wrong, where, what was expected and what would help.
What single rows have wrong ends it likewise, and is dropped, counted and reported where `loader.skip_bad` tolerates it.

Tested elsewhere already: files that are missing, folders, not UTF-8, cut off or of an unknown format (test_data_reader);
fields of the wrong type, mixed types of rows, renames (test_data_formats); templates and what they refuse
(test_data_templates); truncation policies and `loss_on` that does not fit (test_data_encode); held-out rows with labels that
training does not have (test_data_labels, test_token_classification, test_vision); answers beside their place in the context,
questions without room (test_question_answering); steps and labels of unequal number (test_process_reward); choices and answers
that are none (test_choices); GLUE's files (test_glue); span corruption (test_span_corruption); mixtures (test_mixture).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax import registry
from ftjax.config import Loader
from ftjax.data.images import Picture
from ftjax.data.layouts import layout_of
from ftjax.data.prepare import Prepared, prepare
from ftjax.data.rows import BadRows, Row
from ftjax.data.task import Silent
from ftjax.data.tasks.local import Local
from ftjax.data.tasks.multiple_choice import MultipleChoice
from ftjax.data.tasks.tasks import Tasks
from ftjax.data.together import prepare_tasks
from ftjax.errors import DataError
from ftjax.objectives.multi_task import SubTask
from ftjax.verbs import main
from tests.test_data_helpers import tiny_tokenizer, write_jsonl

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PAIRS = [{"prompt": f"{p} ", "completion": c} for p, c in ("ab", "cd", "ef")]
CLASSES = [{"text": t, "label": y} for t, y in (("a", "x"), ("b", "y"), ("c", "x"))]
SEVERAL = [{"text": t, "label": [*y]} for t, y in (("a", "x"), ("b", "xy"), ("c", ""))]
NUMBERS = [{"text": t, "label": y} for t, y in (("a", 0.5), ("b", 1), ("c", 2.5))]
PREFERENCES = [{"prompt": "a ", "chosen": "b", "rejected": "c"}, {"prompt": "d ", "chosen": "e", "rejected": "f"}]
JUDGED = [{**row, "label": i == 0} for i, row in enumerate(PAIRS)]
WORDS = [{"tokens": ["a", "b"], "ner_tags": [0, 1]}, {"tokens": ["c"], "ner_tags": [1]}]
QUESTION = {"question": "q", "context": "one two", "answers": {"text": ["two"], "answer_start": [4]}}
STEPS = [{"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}]
TEXTS = [{"text": "hello world"}, {"text": "the quick"}]

GOOD: dict[str, list[dict[str, Any]]] = {
    "causal_lm": PAIRS, "dft": PAIRS, "distill_causal_lm": PAIRS, "seq2seq": PAIRS, "classification": CLASSES,
    "distill_classification": CLASSES, "regression": NUMBERS, "token_classification": WORDS,
    "question_answering": [QUESTION], "reward_model": PREFERENCES, "process_reward": STEPS, "dpo": PREFERENCES,
    "orpo": PREFERENCES, "simpo": PREFERENCES, "cpo": PREFERENCES, "kto": JUDGED, "masked_lm": TEXTS,
    "distill_masked_lm": TEXTS,
}  # fmt: skip
LANGUAGE = ("causal_lm", "dft", "distill_causal_lm")
LABELLED = ("classification", "distill_classification")
COMPARED = ("reward_model", "dpo", "orpo", "simpo", "cpo")
MASKED = ("masked_lm", "distill_masked_lm")
OPTIONS: dict[str, dict[str, Any]] = {"question_answering": {"doc_stride": 2}}


def read(path: Path, objective: str, *, task: dict[str, Any] | None = None, **loader: Any) -> Prepared:
    """The data of a run of this objective."""
    chosen: Any = registry.get("objective", objective)(**OPTIONS.get(objective, {}))
    reading: dict[str, Any] = {"max_length": 32} | loader
    return prepare(
        Local(path=str(path), **({"eval_share": 0.0} | (task or {}))), Loader(**reading),
        tiny_tokenizer(cls_token="<s>", mask_token="<pad>"), layout=layout_of(chosen),
        options=getattr(chosen, "data_options", dict)(), use_cache=False,
    )  # fmt: skip


def refusal(path: Path, objective: str, **how: Any) -> str:
    """The text of the error that ends the run."""
    with pytest.raises(DataError) as error:
        read(path, objective, **how)
    return str(error.value)


@pytest.mark.parametrize("objective", GOOD)
def test_good_rows_are_read_in_silence(tmp_path: Path, objective: str):
    made = read(write_jsonl(tmp_path / "rows.jsonl", GOOD[objective]), objective)
    assert len(made.train) == len(GOOD[objective]) and made.report.skipped_bad == 0 and made.warnings == ()


# Files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", GOOD)
def test_an_empty_file(tmp_path: Path, objective: str):
    assert "rows.jsonl: no rows. The file holds no data." in refusal(
        write_jsonl(tmp_path / "rows.jsonl", []), objective
    )


@pytest.mark.parametrize("objective", GOOD)
def test_a_held_out_file_without_rows(tmp_path: Path, objective: str):
    path, held_out = write_jsonl(tmp_path / "rows.jsonl", GOOD[objective]), write_jsonl(tmp_path / "eval.jsonl", [])
    assert "eval.jsonl: no rows. The file holds no data." in refusal(path, objective, task={"eval_path": str(held_out)})


@pytest.mark.parametrize("objective", GOOD)
def test_a_line_that_is_not_json(tmp_path: Path, objective: str):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD[objective])
    path.write_text(path.read_text() + '{"prompt": "a", \n')
    line = len(GOOD[objective]) + 1
    text = refusal(path, objective)
    assert f"rows.jsonl:{line}:1: not JSON: " in text and "set loader.skip_bad to how many are tolerable" in text
    assert read(path, objective, skip_bad=1).report.skipped_bad == 1


def test_nothing_is_held_out_of_one_row(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS[:1] * 3)
    made = read(path, "causal_lm", task={"eval_share": 1e-9})
    assert (
        "nothing is held out and nothing evaluated" in made.warnings[-1]
        and "data.eval_share=1e-09" in made.warnings[-1]
    )
    text = refusal(path, "causal_lm", task={"eval_share": 0.999999999})
    assert "has no training rows: all 3 are held out, e.g." in text and "Set data.eval_share=0" in text


def test_held_out_rows_that_are_all_malformed_are_reported(tmp_path: Path):
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "a", "completion": 5}])
    task = {"eval_path": str(held_out)}
    made = read(write_jsonl(tmp_path / "rows.jsonl", PAIRS), "causal_lm", task=task, skip_bad=1)
    assert len(made.eval) == 0 and "no held-out row is left, so nothing is evaluated: 1 malformed" in made.warnings[-1]
    assert "eval.jsonl:1: field 'completion' expected a string, got 5" in made.warnings[-1]


# Columns -----------------------------------------------------------------------------------------------------------------

NEEDED = {
    **dict.fromkeys(GOOD, "Expected columns: text | messages | prompt, completion | .*data.columns"),
    **dict.fromkeys((*LABELLED, "regression"), "have text .* and label; rename with data.columns"),
    "token_classification": "have tokens and ner_tags, tags or labels; rename with data.columns",
    "question_answering": "have question, context and answers .*; rename with data.columns",
}


@pytest.mark.parametrize("objective, needed", NEEDED.items())
def test_foreign_columns(tmp_path: Path, objective: str, needed: str):
    text = refusal(write_jsonl(tmp_path / "rows.jsonl", [{"foo": "a", "bar": 1}] * 2), objective)
    assert "rows.jsonl:1: " in text and "foo, bar" in text
    assert re.search(needed, text.replace("\n", " "))


LACKING = {
    **dict.fromkeys(LANGUAGE, "these are prompt_only. Expected columns: text | messages | prompt, completion"),
    "seq2seq": "(columns prompt, completion); these are prompt_only",
    **dict.fromkeys(COMPARED, "expected preference rows (columns prompt, chosen, rejected); these are prompt_only"),
    "kto": "expected unpaired_preference rows (columns prompt, completion, label); these are prompt_completion",
    "process_reward": "(columns prompt, completions, labels); these are prompt_only",
    **dict.fromkeys((*LABELLED, "regression"), "no column 'label'. Columns: text."),
    "token_classification": "no column 'ner_tags' or 'tags' or 'labels'. Columns: tokens.",
    "question_answering": "no column 'answers'. Columns: question, context.",
}


@pytest.mark.parametrize("objective, needed", LACKING.items())
def test_the_last_column_is_missing(tmp_path: Path, objective: str, needed: str):
    rows = [dict(list(row.items())[:-1]) for row in GOOD[objective]]
    text = refusal(write_jsonl(tmp_path / "rows.jsonl", rows), objective)
    assert needed in text and "rows.jsonl:1" in text and all(c in text for c in rows[0])


@pytest.mark.parametrize("objective", LACKING)
def test_the_last_column_is_missing_in_one_row(tmp_path: Path, objective: str):
    good = GOOD[objective] * 2
    path = write_jsonl(tmp_path / "rows.jsonl", [*good, dict(list(good[0].items())[:-1])])
    assert f"rows.jsonl:{len(good) + 1}: " in refusal(path, objective)
    made = read(path, objective, skip_bad=1)
    assert made.report.skipped_bad == 1 and len(made.train) == len(good)


@pytest.mark.parametrize("objective", GOOD)
def test_all_rows_are_malformed(tmp_path: Path, objective: str):
    last = [*GOOD[objective][0]][-1]
    rows = [{**row, last: {"a": 1}} for row in GOOD[objective]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert f"rows.jsonl:1: field {last!r} expected " in refusal(path, objective)
    text = refusal(path, objective, skip_bad=9)  # tolerated, but nothing is left
    assert "left of" in text and f"the first: {tmp_path}/rows.jsonl:1: field {last!r} expected" in text


# Single bad rows -----------------------------------------------------------------------------------------------------------

EMPTY = {"prompt": "z ", "completion": " "}
TALKED = {"prompt": TALK[:1], "completion": [{"role": "assistant", "content": ""}]}
HIGH = (
    "label 2.5 is a number that is not whole, and a class is a whole number or a text. Numbers are learned with objec"
)
ROWS: list[tuple[str, dict[str, Any], str]] = [
    *((o, EMPTY, "field 'completion' is empty") for o in (*LANGUAGE, "seq2seq")),
    ("kto", {**EMPTY, "label": True}, "field 'completion' is empty"),
    ("seq2seq", {"prompt": "", "completion": "b"}, "field 'prompt' is empty"),
    ("kto", {**PAIRS[0], "label": 2}, "field 'label' expected true or false, got 2"),
    *((o, {"prompt": "a", "chosen": "x", "rejected": "x"}, "chosen and rejected are the same") for o in COMPARED),
    *((o, {"prompt": "a", "chosen": "", "rejected": "x"}, "field 'chosen' is empty") for o in COMPARED),
    ("dpo", {"prompt": "a", "chosen": "x", "rejected": " "}, "field 'rejected' is empty"),
    ("reward_model", {**PREFERENCES[0], "margin": "big"}, "field 'margin' expected a finite number, got 'big'"),
    ("reward_model", {**PREFERENCES[0], "margin": "nan"}, "field 'margin' expected a finite number, got 'nan'"),
    *((o, {"text": " ", "label": "x"}, "field 'text' is empty: there is nothing to read") for o in LABELLED),
    *((o, {"text": "d", "label": ""}, "field 'label' is empty") for o in LABELLED),
    *((o, {"text": "d", "label": 1}, "mixed labels: this row has a number, 6 of 7 have a text, e.g. ") for o in LABELLED),
    *((o, {"text": "d", "label": 2.5}, HIGH) for o in LABELLED),
    *((o, {"text": "d", "label": ["x"]}, "mixed labels: this row has a list, 6 of 7 have a text") for o in LABELLED),
    ("classification", {"text": "d", "text_pair": "e", "label": "x"}, "the row has a pair of texts, but 1 of 7 rows have"),
    ("classification", {"text": None, "label": "x"}, "field 'text' expected a string, got None"),
    ("regression", {"text": " ", "label": 1.5}, "field 'text' is empty: there is nothing to read"),
    *(
        ("regression", {"text": "d", "label": y}, f"field 'label' expected a finite number, got {y!r}")
        for y in ("nan", "inf", "-inf", 1e300, "high", [1.5])
    ),
    ("regression", {"text": "d", "label": None}, "field 'label' expected a class, a number or a list"),
    ("token_classification", {"tokens": [" ", "b"], "ner_tags": [0, 1]}, "word 0 of 'tokens' is empty"),
    ("token_classification", {"tokens": ["b"], "ner_tags": [1.5]}, "field 'ner_tags' expected a list of classes"),
    ("token_classification", {"tokens": ["b"], "ner_tags": ["B-X"]}, "mixed labels: this row has a text, 6 of 7 have"),
    ("token_classification", {"tokens": [], "ner_tags": []}, "field 'tokens' expected a list of words, got []"),
    ("question_answering", {**QUESTION, "question": " "}, "field 'question' expected a text, got ' '"),
    ("process_reward", {**STEPS[0], "labels": [0.5, 1]}, "field 'labels' expected a list of true and false, got [0.5, 1]"),
    *((o, {"text": 5}, "field 'text' expected a string, got 5") for o in MASKED),
    *((o, {"prompt": "a", "completion": 5}, "field 'completion' expected a string, got 5") for o in LANGUAGE),
]  # fmt: skip


@pytest.mark.parametrize("objective, row, text", ROWS, ids=lambda x: x if isinstance(x, str) else json.dumps(x))
def test_one_bad_row(tmp_path: Path, objective: str, row: dict[str, Any], text: str):
    good = (GOOD[objective] * 6)[:6]
    path = write_jsonl(tmp_path / "rows.jsonl", [*good, row])
    said = refusal(path, objective)
    assert f"rows.jsonl:7: {text}" in said and "set loader.skip_bad to how many are tolerable" in said
    made = read(path, objective, skip_bad=1)
    assert made.report.skipped_bad == 1 and made.report.read == 7 and len(made.train) == 6
    assert any(w.startswith("1 malformed row skipped, the first: ") and text in w for w in made.warnings)


def test_several_classes_take_lists_alone(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*SEVERAL, {"text": "d", "label": "x"}])
    assert "rows.jsonl:4: mixed labels: this row has a text, 3 of 4 have a list" in refusal(path, "classification")
    made = read(path, "classification", skip_bad=1)
    assert made.train.labels.tolist() == [[1, 0], [1, 1], [0, 0]] and made.problem == "multi_label_classification"


def test_infinity_in_json_is_no_number(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1e999}\n{"text": "b", "label": 1.5}\n{"text": "c", "label": NaN}\n')
    assert "rows.jsonl:3: not JSON: NaN is not JSON" in refusal(path, "regression")
    assert "rows.jsonl:1: field 'label' expected a class or a finite number, got inf" in refusal(
        path, "regression", skip_bad=1
    )


@pytest.mark.parametrize("labels", [(-1, 0, 7), (5, 6, 7), (0.0, 1, 2.0)])
def test_whole_numbers_are_classes_or_targets_as_the_objective_says(tmp_path: Path, labels: tuple[float, ...]):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": y} for y in labels])
    classes, numbers = read(path, "classification"), read(path, "regression")
    assert classes.labels == tuple(str(int(y)) for y in labels) and classes.train.labels.tolist() == [0, 1, 2]
    assert numbers.problem == "regression" and numbers.train.labels.tolist() == [float(y) for y in labels]


def test_labels_beyond_the_names_that_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Local, "labels", ("no", "yes"), raising=False)
    rows = [{"text": "a", "label": y} for y in ("no", "yes", "yse", -1, 2)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "rows.jsonl:3: label 'yse' is not among the 2 classes. Did you mean 'yes'?" in refusal(
        path, "classification"
    )
    text = refusal(path, "classification", skip_bad=1)
    assert "rows.jsonl:4: label -1 is not among the 2 classes. Known: no, yes" in text
    assert read(path, "classification", skip_bad=3).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("label", [5, -1])
def test_tags_beyond_the_names_that_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: int):
    monkeypatch.setitem(OPTIONS, "token_classification", {"names": ("O", "X")})
    path = write_jsonl(tmp_path / "rows.jsonl", [*WORDS, {"tokens": ["c"], "ner_tags": [label]}])
    text = refusal(path, "token_classification")
    assert f"rows.jsonl:3: label {label} of word 0 ('c') is out of range: 0 to 1, or -100 for none" in text
    assert len(read(path, "token_classification", skip_bad=1).train) == 2


# Nothing to learn --------------------------------------------------------------------------------------------------------

APART = "there is nothing to tell apart"
CUT = "token is number 61; set loader.max_length=61 or more"
LONG = "z" * 59
SAME = [{"prompt": "a ", "chosen": "x" * 60 + "p", "rejected": "x" * 60 + "q"}] * 2
NONE: list[tuple[str, list[dict[str, Any]], str]] = [
    *((o, [{**r, "label": "x"} for r in CLASSES], f"every row has the label x: {APART} (3 rows") for o in LABELLED),
    ("classification", [{**r, "label": []} for r in CLASSES], f"every row has the label (none): {APART}"),
    ("classification", [{**r, "label": ["x"]} for r in CLASSES], f"every row has the label x: {APART}"),
    ("regression", [{**r, "label": 3} for r in NUMBERS], "every row has the number 3 (3 rows, the first is"),
    ("token_classification", [{"tokens": ["c", "d"], "ner_tags": [1, 1]}], f"every word has the label 1: {APART} (1 rows"),
    ("token_classification", [{"tokens": ["c"], "ner_tags": [-100]}], f"every word has the label (none): {APART}"),
    ("process_reward", [{**STEPS[0], "labels": [True, True]}], "every judged step of 1 rows is right (the first row is"),
    ("kto", [{**r, "label": True} for r in JUDGED], "every row has the label True: KTO needs good and bad answers (3 rows"),
    ("kto", [{**r, "label": False} for r in JUDGED], "Add rows with the label True, or use objective=causal_lm"),
    ("question_answering", [{**QUESTION, "answers": {"text": [], "answer_start": []}}], "none of 1 questions has an answer"),
    *((o, [{"prompt": LONG + " ", "completion": "b"}], CUT) for o in LANGUAGE),
    *((o, [{"prompt": LONG + " ", "chosen": "b", "rejected": "c"}], CUT) for o in COMPARED),
    ("kto", [{"prompt": LONG + " ", "completion": "b", "label": bool(i)} for i in range(2)], CUT),
    *((o, SAME, "no pair is left of 2: within loader.max_length=32 2 have answers that are the same") for o in COMPARED),
    ("process_reward", [{**STEPS[0], "prompt": LONG}], "none of 1 texts has a label within loader.max_length=32: the shor"),
    ("causal_lm", [{"text": ""}], "rows.jsonl:1: it has fewer than two tokens"),
    *((o, [{"text": ""}], "rows.jsonl:1: it has fewer than two tokens") for o in MASKED),
]  # fmt: skip


@pytest.mark.parametrize("objective, rows, text", NONE, ids=lambda x: x if isinstance(x, str) else json.dumps(x)[:60])
def test_nothing_to_learn(tmp_path: Path, objective: str, rows: list[dict[str, Any]], text: str):
    said = refusal(write_jsonl(tmp_path / "rows.jsonl", rows), objective)
    assert text in said and ("rows.jsonl:1" in said or "shortest has" in said)


def test_a_conversation_without_the_assistant(tmp_path: Path):
    path, task = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK[:1]}] * 2), {"chat_template": "chatml"}
    text = refusal(path, "causal_lm", task=task, max_length=128)
    assert "rows.jsonl:1: it has no turn of the assistant; loader.loss_on=all trains every token" in text
    write_jsonl(path, [{"messages": TALK[:1]}, {"messages": TALK}])
    made = read(path, "causal_lm", task=task, max_length=128)
    assert made.report.zero_trained == 1 and "are left out, the first: " in made.warnings[0]
    assert "nothing to train" in made.report.lines()[0]


@pytest.mark.parametrize("objective", LANGUAGE)
def test_an_answer_that_says_nothing_in_a_conversation(tmp_path: Path, objective: str):
    path = write_jsonl(tmp_path / "rows.jsonl", [TALKED, {"prompt": TALK[:1], "completion": TALK[1:]}])
    how: dict[str, Any] = {"task": {"chat_template": "chatml"}, "max_length": 128}
    assert "rows.jsonl:1: field 'completion' is empty" in refusal(path, objective, **how)
    assert read(path, objective, skip_bad=1, **how).report.skipped_bad == 1


def test_pairs_that_differ_behind_the_cut_are_counted(tmp_path: Path):
    made = read(write_jsonl(tmp_path / "rows.jsonl", [*PREFERENCES, *SAME]), "dpo")
    assert len(made.train) == 2 and made.report.zero_trained == 2
    assert any(w.startswith("2 pairs differ only behind loader.max_length=32 and are left out") for w in made.warnings)


def test_texts_of_special_tokens_alone_are_counted(tmp_path: Path):
    rows = [*TEXTS, {"text": "<s></s>"}]
    made = read(write_jsonl(tmp_path / "rows.jsonl", rows), "masked_lm")
    assert len(made.train) == 2 and made.report.zero_trained == 1 and made.report.examples == 2
    assert any("1 texts are empty and are left out, e.g." in w and "rows.jsonl:3" in w for w in made.warnings)
    assert "all 1 texts are empty, e.g." in refusal(write_jsonl(tmp_path / "rows.jsonl", rows[2:]), "masked_lm")


def test_words_without_a_label_are_counted(tmp_path: Path):
    rows = [*WORDS, {"tokens": ["e"], "ner_tags": [-100]}]
    made = read(write_jsonl(tmp_path / "rows.jsonl", rows), "token_classification")
    assert (
        made.report.zero_trained == 1 and "1 texts have no label within max_length and are left out" in made.warnings[0]
    )


@pytest.mark.parametrize("objective", [*LABELLED, "regression"])
def test_texts_that_are_all_too_long(tmp_path: Path, objective: str):
    rows = [{**r, "text": "q" * (40 + i)} for i, r in enumerate(GOOD[objective])]
    text = refusal(write_jsonl(tmp_path / "rows.jsonl", rows), objective, truncation="drop")
    assert (
        "all 3 texts are longer than loader.max_length=32" in text
        and "The shortest has 40 tokens, the longest 42" in text
    )


# Data that are no such files -----------------------------------------------------------------------------------------------


class Pictures(Silent):
    """Pictures from memory."""

    name = "pictures"

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = [Row(row, f"pictures:{i}") for i, row in enumerate(rows)]

    def examples(self, split: str, *, bad: BadRows | None = None) -> list[Row]:
        return self.rows if split == "train" else []

    def prompts(self, n: int) -> list[Any]:
        return []

    def fingerprint(self) -> dict[str, str]:
        return {}


def picture(value: float = 0.5) -> Picture:
    return Picture(np.full((3, 4, 4), value, np.float32))


def seen(rows: list[dict[str, Any]], skip_bad: int = 0) -> Prepared:
    layout = layout_of(registry.get("objective", "image_classification")())
    return prepare(Pictures(rows), Loader(skip_bad=skip_bad), None, layout=layout, use_cache=False)


@pytest.mark.parametrize(
    "row, text",
    [
        ({"image": picture(np.nan), "label": 1}, r"the picture \[3, 4, 4\] has pixels that are no finite numbers"),
        ({"image": picture(), "label": None}, "field 'label' expected a class, got None"),
        ({"image": picture(), "label": 0.5}, "label 0.5 is no class: expected a whole number or a text"),
        ({"image": picture(), "label": ""}, "field 'label' expected a class, got ''"),
        ({"image": picture()}, "expected a picture and a label. Columns: image"),
        ({"image": "a.png", "label": 1}, "expected a picture and a label. Columns: image, label"),
    ],
)
def test_bad_pictures(row: dict[str, Any], text: str):
    rows = [{"image": picture(), "label": i} for i in range(2)]
    with pytest.raises(DataError, match=f"pictures:2: {text}"):
        seen([*rows, row])
    assert len(seen([*rows, row], skip_bad=1).train) == 2


def test_pictures_of_one_class():
    with pytest.raises(DataError, match=r"every picture has the label 7: .* \(2 pictures, the first is pictures:0\)"):
        seen([{"image": picture(), "label": 7}] * 2)
    with pytest.raises(DataError, match="data=pictures has no training rows"):
        seen([])


def test_choices_with_foreign_columns(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"foo": "a", "bar": 1}] * 2)
    task, tokenizer = MultipleChoice(path=str(path), eval_share=0.0), tiny_tokenizer()
    with pytest.raises(
        DataError, match="jsonl:1: no column 'question': expected .*; there are foo, bar. .*data.renames"
    ):
        prepare(task, Loader(), tokenizer, use_cache=False)
    with pytest.raises(
        DataError, match="data=multiple_choice has no training rows: 2 malformed rows .*jsonl:1: no col"
    ):
        prepare(task, Loader(skip_bad=2), tokenizer, use_cache=False)


def test_the_task_is_named_where_there_are_several(tmp_path: Path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", PAIRS), write_jsonl(tmp_path / "b.jsonl", CLASSES[:1])
    tasks = [SubTask(name="text", data=Local(path=str(good), eval_share=0.0)), SubTask(
        name="tone", data=Local(path=str(bad), eval_share=0.0), objective=registry.get("objective", "classification")()
    )]  # fmt: skip
    with pytest.raises(DataError, match=r"objective\.tasks\.1 \(tone\): every row has the label x: .*b\.jsonl:1"):
        prepare_tasks(tasks, Tasks(), Loader(), tiny_tokenizer(), seed=0)


def test_the_command_ends_with_the_message_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_jsonl(tmp_path / "rows.jsonl", [*PAIRS, EMPTY])
    base = Path(__file__).parent.parent / "configs" / "quickstart.py"
    given = ["data=local", f"data.path={path}", "data.eval_share=0", f"out={tmp_path / 'run'}", "evaluate.examples=0"]
    assert main(["check", "--config", str(base), *given]) == DataError.exit_code
    said = capsys.readouterr()
    assert "rows.jsonl:4: field 'completion' is empty" in said.err and "Traceback" not in said.err
