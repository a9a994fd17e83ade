"""GLUE from tiny files in both layouts: columns, classes and their order, what is refused, and the official metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ftjax.config import Evaluate, Loader, Run
from ftjax.data.labels import REGRESSION, SINGLE, LabelBatch
from ftjax.data.layouts import layout_of
from ftjax.data.prepare import prepare
from ftjax.data.rows import BadRows
from ftjax.data.tasks import glue
from ftjax.data.tasks.glue import TASKS, Glue
from ftjax.errors import DataError
from ftjax.objectives.classification import Classification
from ftjax.objectives.regression import Regression
from tests.test_data_helpers import tiny_tokenizer

# Each task's classic files as GLUE's download has them: the header (None: there is none) and a line for (texts, label).
CLASSIC = {
    "cola": (None, lambda a, b, y: f"gj04\t{y}\t\t{a}"),
    "sst2": ("sentence\tlabel", lambda a, b, y: f"{a}\t{y}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", lambda a, b, y: f"{y}\t702876\t702977\t{a}\t{b}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        lambda a, b, y: f"0\tnews\tx\t2012\t1\tnone\tnone\t{a}\t{b}\t{y:.3f}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", lambda a, b, y: f"1\t2\t3\t{a}\t{b}\t{y}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        lambda a, b, y: f"0\t1\t1n\tfiction\t(a)\t(b)\t(A)\t(B)\t{a}\t{b}\tneutral\t{TASKS['mnli'].names[y]}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", lambda a, b, y: f"0\t{a}\t{b}\t{TASKS['qnli'].names[y]}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", lambda a, b, y: f"0\t{a}\t{b}\t{TASKS['rte'].names[y]}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", lambda a, b, y: f"0\t{a}\t{b}\t{y}"),
}  # fmt: skip
SIZES = {"train": 6, "validation": 3}


def content(task: str, split: str) -> list[tuple[str, str, Any]]:
    count = max(len(TASKS[task].names), 1)
    labels = [2.0, 5.0, 0.0] * 2 if task == "stsb" else [(i + 1) % count for i in range(6)]
    # a text with a quote and a separator that Python, but no TSV, takes for the end of a line
    return [(f'the "{split} {i}', f"pair\x85{i}", labels[i]) for i in range(SIZES[split])]


def splits(task: str) -> dict[str, str]:
    """Names of the splits on the hub -> the content's."""
    held_out = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    return {"train": "train", **dict.fromkeys(held_out, "validation")}


def write_classic(folder: Path, task: str) -> None:
    folder.mkdir(parents=True)
    header, line = CLASSIC[task]
    for name, split in splits(task).items():
        lines = ([header] if header else []) + [line(*row) for row in content(task, split)]
        (folder / f"{name.replace('validation', 'dev')}.tsv").write_text("\n".join(lines) + "\n", newline="")
    (folder / "test.tsv").write_text("index\tsentence\n0\tno label\n")


def write_parquet(folder: Path, task: str) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    for name, split in [*splits(task).items(), ("test", "validation")]:
        rows = []
        for i, (a, b, y) in enumerate(content(task, split)):
            rows.append(dict(zip(TASKS[task].texts, (a, b), strict=False), label=-1 if name == "test" else y, idx=i))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")


def read(task: str, path: Path, objective: Any = None, **more: Any):
    data = Glue(task=task, path=str(path), **more)  # type: ignore[arg-type]
    layout = layout_of(objective or Classification())
    return prepare(data, Loader(max_length=64), tiny_tokenizer(), layout=layout, use_cache=False)


@pytest.mark.parametrize("task", TASKS)
def test_both_layouts(tmp_path: Path, task: str) -> None:
    write_parquet(tmp_path / "new" / task, task)
    write_classic(tmp_path / "old" / TASKS[task].folder, task)
    objective = Regression() if task == "stsb" else Classification()
    new, old = read(task, tmp_path / "new", objective), read(task, tmp_path / "old", objective)
    assert (len(new.train), len(new.eval)) == (6, 3) == (len(old.train), len(old.eval))
    for a, b in ((new.train, old.train), (new.eval, old.eval)):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert new.train.labels.tolist() == [y for _, _, y in content(task, "train")]
    assert new.labels == (TASKS[task].names or ("value",)) == old.labels
    assert new.problem == (REGRESSION if task == "stsb" else SINGLE), "whole numbers alone: the task says what they are"
    pair = len(TASKS[task].texts) == 2
    text = tiny_tokenizer().decode(new.train.input_ids[new.train.part(0)])
    assert '"train 0' in text and ("pair" in text) == pair
    data = Glue(task=task, path=str(tmp_path / "old" / TASKS[task].folder))  # type: ignore[arg-type]
    assert data.examples("train") == Glue(task=task, path=str(tmp_path / "old")).examples("train")  # type: ignore[arg-type]
    assert data.prompts(3) == [] and "train.tsv" in data.fingerprint()


def test_the_other_validation_split(tmp_path: Path) -> None:
    write_classic(tmp_path / "MNLI", "mnli")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").write_text(
        CLASSIC["mnli"][0] + "\n" + CLASSIC["mnli"][1]("other", "place", 0) + "\n"
    )
    assert len(read("mnli", tmp_path).eval) == 3
    other = Glue(task="mnli", path=str(tmp_path), mnli="mismatched").examples("eval")
    assert [(r["text"], r["label"]) for r in other] == [("other", "entailment")]


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local repository as the hub's is: a README with the configurations, parquet files below."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    lines = ["---", "configs:"]
    for task in ("mnli", "stsb"):
        write_parquet(tmp_path / "glue" / task, task)
        lines += [f"- config_name: {task}", "  data_files:"]
        for split in [*splits(task), "test"]:
            lines += [f"  - split: {split}", f"    path: {task}/{split}-*"]
    (tmp_path / "glue" / "README.md").write_text("\n".join([*lines, "---", ""]))
    monkeypatch.setattr(glue, "HUB", str(tmp_path / "glue"))
    for task in ("mnli", "stsb"):
        remote, local = Glue(task=task), Glue(task=task, path=str(tmp_path / "glue"))
        for split in ("train", "eval"):
            assert remote.examples(split) == local.examples(split) != []
    assert set(Glue(task="mnli", mnli="mismatched").fingerprint()) == {"train", "validation_mismatched"}


def test_what_is_refused(tmp_path: Path) -> None:
    write_classic(tmp_path / "RTE", "rte")
    data, file = Glue(task="rte", path=str(tmp_path)), tmp_path / "RTE" / "train.tsv"
    good = file.read_text()
    file.write_text(good + "0\ta\tb\tperhaps\n")
    with pytest.raises(DataError, match="train.tsv:8: label 'perhaps', expected entailment, not_entailment"):
        data.examples("train")
    file.write_text(good + "0\ta\tentailment\n")
    with pytest.raises(DataError, match="train.tsv:8: 3 columns, expected 4"):
        data.examples("train")
    assert len(data.examples("train", bad=BadRows(1))) == 6
    file.write_text(good.replace("sentence2", "second"))
    with pytest.raises(DataError, match="no column 'sentence2'; there are index, sentence1, second, label"):
        data.examples("train")
    with pytest.raises(DataError, match=r"no train-\*.parquet and no train.tsv of cola"):
        Glue(task="cola", path=str(tmp_path)).examples("train")
    run = Run(data=Glue(task="stsb", path="x", mnli="mismatched"), objective=Classification(), evaluate=Evaluate())
    assert list(run.data.check(run)) == ["data.task=stsb, objective=classification  use objective=regression"]
    assert [a.split(" ")[0] for a in run.data.advise(run)] == ["evaluate.examples=256", "data.mnli=mismatched"]


def test_metrics_are_the_official_ones() -> None:
    sk, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=(60, 2)), rng.integers(0, 2, 60), np.ones(60)
    weights[-9:] = 0  # rows that only fill the last batch do not count
    rows, (y, z) = {"logits": logits, "labels": labels, "weights": weights}, (labels[:51], logits[:51].argmax(1))
    expected = {"accuracy": sk.accuracy_score(y, z), "f1": sk.f1_score(y, z)}
    for task in ("mrpc", "qqp"):
        assert Glue(task=task).scored(rows) == pytest.approx(expected)
    assert expected["f1"] != pytest.approx(sk.f1_score(y, z, average="macro")), "the test cannot tell them apart"
    assert Glue(task="cola").scored(rows) == pytest.approx({"matthews_correlation": sk.matthews_corrcoef(y, z)})
    for task in ("sst2", "qnli", "rte", "wnli"):
        assert Glue(task=task).scored(rows) == pytest.approx({"accuracy": expected["accuracy"]})
    three = {"logits": rng.normal(size=(60, 3)), "labels": rng.integers(0, 3, 60), "weights": np.ones(60)}
    accuracy = sk.accuracy_score(three["labels"], three["logits"].argmax(1))
    assert Glue(task="mnli").scored(three) == pytest.approx({"accuracy": accuracy})
    value = {"predictions": rng.normal(size=60), "labels": rng.integers(0, 26, 60) / 5, "weights": weights}
    a, b = value["predictions"][:51], value["labels"][:51]
    expected = {"pearson": stats.pearsonr(a, b)[0], "spearmanr": stats.spearmanr(a, b)[0]}
    assert Glue(task="stsb").scored(value) == pytest.approx(expected)
    assert Glue(task="mrpc").scored(rows | {"logits": np.eye(2)[np.zeros(60, int)]})["f1"] == 0.0
    assert Glue(task="rte").scored({**rows, "weights": np.zeros(60)}) == {}


def test_the_evaluator_reports_them(tmp_path: Path) -> None:
    """The metrics of the data set stand beside those of the objective."""
    import jax

    from ftjax.train.session import Evaluator
    from ftjax.train.setup import View

    write_parquet(tmp_path / "cola", "cola")
    data, objective = Glue(task="cola", path=str(tmp_path)), Classification()
    prepared = read("cola", tmp_path)
    view = View("", objective, data, prepared, 32)
    logits = np.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], np.float32)

    def step(state: Any, frozen: Any, batch: LabelBatch) -> dict[str, Any]:
        out = {"logits": np.pad(logits, ((0, 1), (0, 0))), "labels": batch.labels, "weights": batch.weights}
        return {"terms": {"cross_entropy": (0.0, 1.0)}, "metrics": {}, "rows": out}

    run = Run(data=data, objective=objective, evaluate=Evaluate(examples=0))
    placement = SimpleNamespace(batch=lambda axis: jax.devices()[0])
    run = SimpleNamespace(loader=run.loader, evaluate=run.evaluate, train=SimpleNamespace(batch=4, accumulate=1))
    setup: Any = SimpleNamespace(run=run, views=(view,), frozen=None, placement=placement)
    numbers = Evaluator(setup, lambda what: None, {"": step})._measure(None, view)  # type: ignore[arg-type]
    assert numbers["matthews_correlation"] == pytest.approx(numbers["matthews"]) == pytest.approx(-0.5)
