"""Words with labels: columns, pieces, what is refused; entity scores by hand; a BERT through the command line."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.layouts import arrays_of, identity, meta_of, restored
from ftjax.data.preview import preview
from ftjax.data.rows import BadRows, Row
from ftjax.data.tags import IGNORED, TagExamples, encode_tagged, type_tagged
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import DataError
from ftjax.evals.entities import entities, entity_scores, is_iob2
from ftjax.models import hf
from ftjax.models.sources import embedded_folder
from ftjax.objectives.token_classification import TokenClassification
from ftjax.verbs import main
from tests import tiny, tinymodels


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_folder())


def rows(*items):
    return [Row(item, f"x.jsonl:{i + 1}") for i, item in enumerate(items)]


def encoded(tokenizer, data, like=None, names=(), bad=None, **loader):
    return encode_tagged(type_tagged(data, bad=bad), tokenizer, Loader(**loader), like=like, names=names, bad=bad)


NAMES = rows(
    {"tokens": ["Ada", "Lovelace", "wrote", "it"], "ner_tags": ["B-PER", "I-PER", "O", "O"]},
    {"tokens": ["internationalization", "in", "London"], "ner_tags": ["O", "O", "B-LOC"]},
)


def test_the_first_piece_of_a_word_has_its_label(tokenizer):
    made = encoded(tokenizer, NAMES)
    examples = made.examples
    assert examples.names == ("B-LOC", "B-PER", "I-PER", "O")
    assert made.report.trained_tokens == 7 and made.report.examples == 2
    for i, row in enumerate(NAMES):
        part = slice(examples.offsets[i], examples.offsets[i + 1])
        ids, tags = examples.input_ids[part], examples.tags[part]
        assert ids.tolist() == tokenizer(" ".join(row["tokens"]))["input_ids"]  # the words as a text has them
        at = [*np.flatnonzero(tags != IGNORED).tolist(), len(ids)]
        words = [tokenizer.decode(ids[a:b].tolist()).strip() for a, b in zip(at, at[1:], strict=False)]
        assert words == row["tokens"]
        assert [examples.names[tags[a]] for a in at[:-1]] == row["ner_tags"]
    assert len(examples.input_ids) > 9  # some word has several pieces
    batch = examples.build([[1], [0]], 32, count=3)
    assert batch.weights.sum(1).tolist() == [3, 4, 0] and (batch.segments[2] < 0).all()
    assert batch.labels[0][batch.weights[0] > 0].tolist() == [3, 3, 0]
    shown = preview(examples, tokenizer, 1)[0]
    assert [s.text.strip() for s in shown.spans if s.trained] == [f"-> {x}" for x in NAMES[0]["ner_tags"]]
    assert "".join(s.text for s in shown.spans if not s.trained).strip().endswith("Ada Lovelace wrote it")


def test_numbers_are_named_by_the_objective(tokenizer):
    data = rows({"tokens": ["a", "b", "c"], "tags": [2, 0, IGNORED]}, {"tokens": ["d"], "tags": [10]})
    assert encoded(tokenizer, data).examples.names == ("0", "2", "10")
    names = TokenClassification(names=("O", "B-x", "I-x")).data_options()["names"]
    examples = encoded(tokenizer, data[:1], names=names).examples
    assert examples.names == names and examples.tags[examples.tags != IGNORED].tolist() == [2, 0]
    with pytest.raises(DataError, match=r"x.jsonl:2: label 10 of word 0 \('d'\) is out of range: 0 to 2"):
        encoded(tokenizer, data, names=names)


def test_held_out_rows_have_the_training_classes(tokenizer):
    train = encoded(tokenizer, NAMES).examples
    more = rows({"tokens": ["Ada"], "labels": ["B-PER"]}, {"tokens": ["Ada"], "labels": ["B-PRE"]})
    with pytest.raises(
        DataError,
        match=r"x.jsonl:2: label 'B-PRE' of word 0 \('Ada'\) is not among the 4 classes. Did you mean 'B-PER'",
    ):
        encoded(tokenizer, more, like=train)
    bad = BadRows(1)
    made = encoded(tokenizer, more, like=train, bad=bad)
    assert made.examples.names == train.names and len(made.examples) == 1 and made.report.skipped_bad == 1


@pytest.mark.parametrize(
    "data, text",
    [
        (rows({"tokens": ["a", "b"], "ner_tags": ["O"]}), "x.jsonl:1: 2 words in 'tokens', but 1 labels in 'ner_tags'"),
        (rows({"text": "a", "ner_tags": ["O"]}), "no column 'tokens' or 'words'.*rename with data.columns"),
        (rows({"tokens": ["a"], "classes": ["O"]}), "no column 'ner_tags' or 'tags' or 'labels'"),
        (rows({"tokens": "a b", "tags": ["O"]}), "field 'tokens' expected a list of words, got 'a b'"),
        (rows({"tokens": ["a"], "tags": [0.5]}), "field 'tags' expected a list of classes"),
        (rows({"tokens": ["a", "b"], "tags": ["O", "O"]}), "every word has the label O: there is nothing"),
        (rows({"tokens": ["a", "b"], "tags": [0, -1]}, {"tokens": ["c"], "tags": [7]}), ""),
    ],
)
def test_bad_rows(tokenizer, data, text):
    if text:
        with pytest.raises(DataError, match=text):
            encoded(tokenizer, data)
    else:  # without given names every number is a class
        assert encoded(tokenizer, data).examples.names == ("-1", "0", "7")


def test_long_texts(tokenizer):
    data = rows({"tokens": ["word"] * 50, "tags": ["a"] * 50}, {"tokens": ["b"], "tags": ["b"]})
    cut = encoded(tokenizer, data, max_length=8, truncation="right")
    assert cut.examples.lengths.max() == 8 and cut.report.truncated == 1 and "max_length=8" in cut.report.warnings[0]
    assert len(encoded(tokenizer, data, max_length=8, truncation="drop").examples) == 1
    with pytest.raises(DataError, match=r"1 of 2 texts are longer than loader.max_length=8: x.jsonl:1"):
        encoded(tokenizer, data, max_length=8, truncation="error")


def test_the_cache_gives_the_same(tokenizer):
    examples = encoded(tokenizer, NAMES).examples
    again = restored(TagExamples, arrays_of(examples), meta_of(examples))
    assert identity(again) == identity(examples) and again.names == examples.names
    assert examples.take(np.array([1])).origin(0) == "x.jsonl:2"


# ---------------------------------------------------------------------------------------------- entity scores
@pytest.mark.parametrize(
    "tags, want",
    [
        ("B-x I-x O B-y", {("x", 0, 1), ("y", 3, 3)}),
        ("B-x B-x I-x", {("x", 0, 0), ("x", 1, 2)}),
        ("I-x I-x O I-y", {("x", 0, 1), ("y", 3, 3)}),  # an I- after O begins an entity
        ("B-x I-y I-y", {("x", 0, 0), ("y", 1, 2)}),  # and one of another class
        ("B I O I", {("", 0, 1), ("", 3, 3)}),
        ("B-a-b I-a-b", {("a-b", 0, 1)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities(tags, want):
    assert entities(tags.split()) == want


def test_entity_scores_by_hand():
    true = [["B-x", "I-x", "O", "B-y"], ["B-y", "O"]]
    said = [["B-x", "I-x", "O", "B-x"], ["O", "O"]]  # one of three is found; two are said
    assert entity_scores(true, said) == {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    assert entity_scores(true, [["O"] * 4, ["O"] * 2]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert is_iob2(["O", "B-x", "I-x"]) and is_iob2(["O", "B", "I"])
    assert not is_iob2(["O"]) and not is_iob2(["0", "1"]) and not is_iob2(["O", "S-x"])


def test_entity_scores_equal_seqeval():
    theirs = pytest.importorskip("seqeval.metrics")
    draw = random.Random(0)
    names = ["O", "B-x", "I-x", "B-y", "I-y", "B-z-z", "I-z-z"]
    sides = [[draw.choices(names, k=n) for n in (1, 5, 9, 30, 200)] for _ in range(2)]
    ours = entity_scores(*sides)
    for key in ("precision", "recall", "f1"):
        assert ours[key] == pytest.approx(getattr(theirs, f"{key}_score")(*sides), abs=1e-12)


def test_metrics_of_the_held_out_set(tokenizer):
    examples, objective = encoded(tokenizer, NAMES).examples, TokenClassification()
    batch = examples.build([[0], [1]], 32, count=3)
    found = {"predicted": batch.labels.copy(), "labels": batch.labels, "weights": batch.weights}
    assert objective.examine(found, examples) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    found["predicted"][1] = 3  # O everywhere: London is missed
    assert objective.examine(found, examples)["recall"] == 0.5
    plain = encoded(tokenizer, rows({"tokens": ["a", "b"], "tags": ["x", "y"]})).examples
    batch = plain.build([[0]], 8)
    found = {"predicted": batch.labels * 0, "labels": batch.labels, "weights": batch.weights}
    assert objective.examine(found, plain) == {"macro_f1": pytest.approx((2 / 3 + 0) / 2)}


CONFIG = """
from ftjax.config import *
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.token_classification import TokenClassification
from ftjax.peft.full import Full

def get_config():
    return Run(
        name="x", model=Pretrained(path="model"), data=Local(path="train.jsonl", eval_share=0.2),
        objective=TokenClassification(), peft=Full(), loader=Loader(max_length=16), optim=Optim(lr=3e-3, warmup=5),
        train=Train(steps=120, batch=16, log_every=60), compute=Compute(cache=""),
    )
"""


def test_through_the_command_line(tmp_path, monkeypatch):
    """A tiny BERT finds names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    small = tinymodels.known()["bert"]()
    model = type(small)(type(small.config).from_hf(small.config.to_hf() | {"vocab_size": 4096, "num_hidden_layers": 1}))
    hf.save(model, tiny.weights(model), tmp_path / "model", tokenizer_from=embedded_folder())
    draw = random.Random(0)
    tags = {"Ada": "B-PER", "Lovelace": "I-PER", "London": "B-LOC", "is": "O", "in": "O", "file": "O"}
    chosen = [draw.choices(list(tags), k=draw.randrange(3, 6)) for _ in range(150)]
    lines = [{"tokens": words, "ner_tags": [tags[w] for w in words]} for words in chosen]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "x.py").write_text(CONFIG)
    assert main(["--config", "x.py"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()]
    last = [x for x in lines if x["event"] == "eval"][-1]
    assert last["accuracy"] > 0.95 and last["f1"] > 0.9 and {"precision", "recall"} <= set(last)
    saved = json.loads((tmp_path / "runs/x/model/config.json").read_text())
    assert saved["architectures"] == ["BertForTokenClassification"]
    assert list(saved["id2label"].values()) == ["B-LOC", "B-PER", "I-PER", "O"]
