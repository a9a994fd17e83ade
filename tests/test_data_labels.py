"""Labelled texts: columns, classes, regression, pairs of texts, what is refused; and their metrics against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.labels import MULTI, REGRESSION, SINGLE, encode_labelled, type_labelled
from ftjax.data.layouts import arrays_of, identity, meta_of, restored
from ftjax.data.rows import BadRows, Row
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import DataError
from ftjax.evals import labels as metrics
from ftjax.models.sources import embedded_folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_folder())


def rows(*items):
    return [Row(item, f"x.csv:{i + 2}") for i, item in enumerate(items)]


def encoded(tokenizer, data, like=None, **loader):
    return encode_labelled(type_labelled(data), tokenizer, Loader(**loader), like=like)


BANK = rows(
    {"text": "where is my card", "label": "card"},
    {"text": "my transfer failed", "label": "transfer"},
    {"text": "card lost", "label": "card"},
)


def test_classes(tokenizer):
    examples = encoded(tokenizer, BANK).examples
    assert examples.problem == SINGLE and examples.names == ("card", "transfer")
    assert examples.labels.tolist() == [0, 1, 0]
    assert [examples.label(i) for i in range(3)] == ["card", "transfer", "card"]
    batch = examples.build([[1], [2]], 16, count=3)
    assert batch.labels.tolist() == [1, 0, 0] and batch.weights.tolist() == [1, 1, 0]
    assert (batch.segments[2] < 0).all() and batch.tokens.shape == (3, 16)


def test_numbers_as_classes_keep_their_order(tokenizer):
    data = rows(*({"text": f"t{i}", "label": i} for i in (10, 2, 1)))
    assert encoded(tokenizer, data).examples.names == ("1", "2", "10")


def test_regression_and_multi_label(tokenizer):
    value = encoded(tokenizer, rows({"text": "a", "label": 0.5}, {"text": "b", "label": "2"})).examples
    assert value.problem == REGRESSION and value.labels.tolist() == [0.5, 2.0] and value.names == ("value",)
    many = encoded(tokenizer, rows({"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["y"]})).examples
    assert many.problem == MULTI and many.labels.tolist() == [[1, 1], [0, 1]]


def test_pairs_by_their_usual_names(tokenizer):
    typed = type_labelled(
        rows(
            {"premise": "it rains", "hypothesis": "it is wet", "label": 1},
            {"premise": "a", "hypothesis": "b", "label": 0},
        )
    )
    assert typed.rows[0]["text"] == "it rains" and typed.rows[0]["text_pair"] == "it is wet"
    assert len(encode_labelled(typed, tokenizer, Loader()).examples) == 2


def test_held_out_rows_have_the_training_classes(tokenizer):
    train = encoded(tokenizer, BANK).examples
    held_out = encoded(tokenizer, rows({"text": "lost", "label": "transfer"}), like=train).examples
    assert held_out.names == train.names and held_out.labels.tolist() == [1]
    with pytest.raises(
        DataError, match=r"x.csv:2: label 'carde' is not among the 2 of the training rows. Did you mean 'card'"
    ):
        encoded(tokenizer, rows({"text": "lost", "label": "carde"}), like=train)


@pytest.mark.parametrize(
    "data, text",
    [
        (rows({"text": "a", "category": "b"}), "no column 'label'.*rename with data.columns"),
        (rows({"text": 3, "label": "b"}), "field 'text' expected a string, got 3"),
        (rows({"text": "a", "label": None}), "field 'label' expected a class"),
        (rows({"text": "a", "label": "b"}, {"text": "c", "label": "b"}), "every row has the label b: there is nothing"),
    ],
)
def test_bad_rows(tokenizer, data, text):
    with pytest.raises(DataError, match=text):
        encoded(tokenizer, data)


def test_tolerated_rows_are_counted(tokenizer):
    bad = BadRows(1)
    typed = type_labelled([*BANK, Row({"text": "x", "label": None}, "x.csv:9")], bad=bad)
    report = encode_labelled(typed, tokenizer, Loader(), bad=bad).report
    assert report.skipped_bad == 1 and report.examples == 3


@pytest.mark.parametrize("policy, kept, longest", [("right", 2, 8), ("drop", 1, 3)])
def test_long_texts(tokenizer, policy, kept, longest):
    data = rows({"text": "word " * 50, "label": "a"}, {"text": "b", "label": "b"})
    made = encoded(tokenizer, data, max_length=8, truncation=policy)
    assert len(made.examples) == kept and made.examples.lengths.max() <= longest
    assert any("max_length=8" in w for w in made.report.warnings)
    with pytest.raises(DataError, match=r"1 of 2 texts are longer than loader.max_length=8: x.csv:2"):
        encoded(tokenizer, data, max_length=8, truncation="error")


def test_the_cache_gives_the_same(tokenizer):
    examples = encoded(tokenizer, BANK).examples
    again = restored(type(examples), arrays_of(examples), meta_of(examples))
    assert identity(again) == identity(examples) and again.names == examples.names
    assert identity(examples.take(np.array([0, 1]))) != identity(examples)


def test_metrics_equal_scikit_learn():
    sk, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(200, 5)), rng.integers(0, 5, 200)
    truth[truth == 3] = 2  # a class that is predicted but never right
    found, predicted = metrics.classification(logits, truth), logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0))
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(truth, predicted))
    several, marks = rng.normal(size=(50, 4)), rng.integers(0, 2, (50, 4))
    many = metrics.multi_label(several, marks)
    assert many["macro_f1"] == pytest.approx(sk.f1_score(marks, several > 0, average="macro"))
    assert many["micro_f1"] == pytest.approx(sk.f1_score(marks, several > 0, average="micro"))
    x, y = rng.integers(0, 9, 100) / 2, rng.normal(size=100)
    value = metrics.regression(x, y)
    assert value["pearson"] == pytest.approx(stats.pearsonr(x, y)[0])
    assert value["spearman"] == pytest.approx(stats.spearmanr(x, y)[0])


def test_calibration_by_hand():
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]))
    # two rows at confidence 0.9, one right: gap 0.4; one at 0.6, right: gap 0.4
    assert metrics.calibration_error(logits, np.array([0, 1, 0])) == pytest.approx(0.4)


def test_temperature_scaling():
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 6)) * 2
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([rng.choice(6, p=p) for p in chances])
    sure = 3.0 * logits  # three times as sure as it should be

    def nll(t):
        z = sure / t
        top = z.max(1)
        return (top + np.log(np.exp(z - top[:, None]).sum(1)) - z[np.arange(len(z)), truth]).mean()

    t = metrics.temperature(sure, truth)
    assert t == pytest.approx(scipy.minimize_scalar(nll, bounds=(0.1, 20), method="bounded").x, rel=1e-4)
    assert t == pytest.approx(3, rel=0.05)
    found = metrics.classification(sure, truth)
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["ece_unscaled"] > 0.1 and found["ece_scaled"] < 0.03
    assert found["ece_unscaled"] == pytest.approx(found["ece"], abs=0.02)
    right = np.eye(3)[np.arange(40) % 3]
    assert metrics.temperature(right, np.arange(40) % 3) == pytest.approx(metrics.COLDEST)
    assert metrics.temperature(-right, np.arange(40) % 3) == pytest.approx(metrics.HOTTEST)
    assert "temperature" not in metrics.classification(sure[:29], truth[:29])
