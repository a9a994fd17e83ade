"""GLUE: nine tasks of understanding sentences, with their official metrics (Wang et al. 2018, arXiv:1804.07461, table 1).

mcc = (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn));   f1 = 2 tp / (2 tp + fp + fn), of class 1

    data=Glue(task="mrpc")                          # from the hub
    data=Glue(task="mrpc", path="glue")             # glue/mrpc/train-*.parquet, or glue/MRPC/train.tsv
    data=Glue(task="mnli", mnli="mismatched")

The held-out rows are the validation split; the test split has no labels and is not read. Beside what the objective measures
the held-out metrics carry the names of the `glue` metric of Hugging Face's evaluate: matthews_correlation, accuracy, f1,
pearson, spearmanr. The classic files are those of GLUE's download script: tab separated, quotes are plain characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftjax.data.labels import REGRESSION, SINGLE
from ftjax.data.parsers import Source, decode
from ftjax.data.reader import file_sha256, read_bytes, read_rows
from ftjax.data.rows import BadRows, Row
from ftjax.data.task import Prompt, Silent, Split
from ftjax.data.tasks.hub import Hub
from ftjax.errors import DataError
from ftjax.evals import labels as metrics
from ftjax.registry import register
from ftjax.schema import Component

GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Spec:
    """One task.

    Attributes:
      folder: in the classic layout.
      texts: column of the text, or of both.
      names: of the classes, by number; empty for the regression.
      metrics: what GLUE reports.
      classic: columns of the texts and the label in the classic files, where they have other names.
      header: whether the classic files begin with the names of their columns.
    """

    folder: str
    texts: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    classic: tuple[str, ...] = ()
    header: bool = True


_TWO = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
TASKS: dict[str, Spec] = {
    "cola": Spec(
        "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), ("3", "1"), header=False
    ),
    "sst2": Spec("SST-2", ("sentence",), ("negative", "positive")),
    "mrpc": Spec(
        "MRPC", _TWO, ("not_equivalent", "equivalent"), ("accuracy", "f1"), ("#1 String", "#2 String", "Quality")
    ),
    "stsb": Spec("STS-B", _TWO, (), ("pearson", "spearmanr"), (*_TWO, "score")),
    "qqp": Spec(
        "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"),
        ("question1", "question2", "is_duplicate"),
    ),
    "mnli": Spec(
        "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), classic=(*_TWO, "gold_label")
    ),
    "qnli": Spec("QNLI", ("question", "sentence"), _ENTAILED),
    "rte": Spec("RTE", _TWO, _ENTAILED),
    "wnli": Spec("WNLI", _TWO, ("not_entailment", "entailment")),
}  # fmt: skip


@register("data")
class Glue(Silent, Component):
    """A task of GLUE, from the hub or from local files."""

    name: Literal["glue"] = "glue"
    task: GlueTask = Field(description="Which of the nine.")
    path: str = Field("", description="Folder with GLUE's files, parquet or tsv, or with one task's; empty: the hub.")
    mnli: Literal["matched", "mismatched"] = Field("matched", description="mnli: which validation split is held out.")
    revision: str = Field("", description="Commit of the hub's repository; pin one to repeat a run.")

    @property
    def spec(self) -> Spec:
        """The task's columns, classes and metrics."""
        return TASKS[self.task]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes in GLUE's order; that of the number for stsb."""
        return self.spec.names or ("value",)

    @property
    def problem(self) -> str:
        """As transformers' ``problem_type``."""
        return SINGLE if self.spec.names else REGRESSION

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows ``{"text", "text_pair", "label"}`` of "train" or "eval".

        Raises:
          DataError: no such files, or a row without a known label.
        """
        bad, wanted = bad or BadRows(), (*self.spec.texts, "label")
        rows = []
        for row in self._raw(split, bad):
            problem = next((f"no column {c!r}; there are {', '.join(row)}" for c in wanted if c not in row), "")
            texts = {k: row.get(c) for k, c in zip(("text", "text_pair"), self.spec.texts, strict=False)}
            label = None if problem else self._label(row["label"])
            if problem or label is None:
                allowed = ", ".join(self.spec.names) or "a number"
                bad.add(f"{row.origin}: {problem or f'label {row["label"]!r}, expected {allowed}'}")
            else:
                rows.append(Row({**texts, "label": label}, row.origin))
        return rows

    def prompts(self, n: int) -> list[Prompt]:
        """None: nothing is generated."""
        return []

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each file, or what `datasets` calls the splits."""
        if not self.path:
            return self._hub.fingerprint()
        return {p.name: file_sha256(p) for split in ("train", "eval") for p in self._files(split)}

    def scored(self, rows: dict[str, Any]) -> dict[str, float]:
        """GLUE's metrics over held-out rows.

        Args:
          rows: "logits" [n, classes] or "predictions" [n]; "labels" [n]; "weights" [n], 0 at rows that only fill a batch.
        """
        real = rows["weights"] > 0
        truth = rows["labels"][real]
        if not len(truth):
            return {}
        if self.problem == REGRESSION:
            found = metrics.regression(rows["predictions"][real], truth)
            values = {"pearson": found["pearson"], "spearmanr": found["spearman"]}
        else:
            said = rows["logits"][real].argmax(1)
            values = {
                "accuracy": float((said == truth).mean()),
                "f1": metrics.binary_f1(said, truth),
                "matthews_correlation": metrics.matthews(metrics.confusion(said, truth, len(self.spec.names))),
            }
        return {name: values[name] for name in self.spec.metrics}

    def check(self, run: Any) -> Iterator[str]:
        """The objective must fit the labels."""
        wanted = "regression" if self.problem == REGRESSION else "classification"
        if run.data is self and run.objective.name != wanted:
            yield f"data.task={self.task}, objective={run.objective.name}  use objective={wanted}"

    def advise(self, run: Any) -> Iterator[str]:
        """Numbers that cannot be compared, settings without effect."""
        if run.evaluate.examples:
            yield f"evaluate.examples={run.evaluate.examples}  GLUE's metrics are over the whole validation split: set it to 0"
        if self.mnli != "matched" and self.task != "mnli":
            yield f"data.mnli={self.mnli}  has no effect with task={self.task}"
        if self.path and self.revision:
            yield f"data.revision={self.revision}  has no effect with local files"

    # Where the rows come from ------------------------------------------------------------------------------------------

    @property
    def _held_out(self) -> str:
        return f"validation_{self.mnli}" if self.task == "mnli" else "validation"

    @property
    def _hub(self) -> Hub:
        return Hub(id=HUB, config=self.task, revision=self.revision, eval_split=self._held_out)

    def _raw(self, split: Split, bad: BadRows) -> Iterator[Row]:
        if not self.path:
            yield from self._hub.examples(split)
            return
        for file in self._files(split):
            yield from read_rows(file, bad=bad) if file.suffix == ".parquet" else self._classic(file, bad)

    def _files(self, split: Split) -> list[Path]:
        """Files of a split, of the first layout that is there."""
        root = Path(self.path).expanduser()
        name = "train" if split == "train" else self._held_out
        tsv = name.replace("validation", "dev") + ".tsv"
        folders = [root / self.task, root / self.spec.folder, root]
        for folder in folders:
            found = sorted(folder.glob(f"{name}-*.parquet")) or sorted(folder.glob(f"{name}.parquet"))
            if found or (folder / tsv).is_file():
                return found or [folder / tsv]
        raise DataError(
            f"data.path={self.path}: no {name}-*.parquet and no {tsv} of {self.task} in {', '.join(map(str, folders))}"
        )

    def _classic(self, file: Path, bad: BadRows) -> Iterator[Row]:
        """Rows of a tab separated file under the hub's column names."""
        spec = self.spec
        wanted = dict(zip((*spec.texts, "label"), spec.classic or (*spec.texts, "label"), strict=True))
        # not splitlines(): a text may hold characters that Python takes for line ends
        lines = (
            decode(Source(str(file), read_bytes(file).removeprefix(b"\xef\xbb\xbf"))).replace("\r\n", "\n").split("\n")
        )
        header = lines[0].split("\t") if spec.header else []
        lost = [c for c in wanted.values() if spec.header and c not in header]
        if lost:
            raise DataError(f"{file}:1: no column {lost[0]!r}; there are {', '.join(header)}")
        at = {ours: header.index(c) if spec.header else int(c) for ours, c in wanted.items()}
        for number, line in enumerate(lines[spec.header :], 1 + spec.header):
            fields = line.split("\t")
            if not line:
                continue
            if len(fields) <= max(at.values()) or (spec.header and len(fields) != len(header)):
                bad.add(f"{file}:{number}: {len(fields)} columns, expected {len(header) or max(at.values()) + 1}")
            else:
                yield Row({ours: fields[i] for ours, i in at.items()}, f"{file}:{number}")

    def _label(self, given: Any) -> str | float | None:
        """A class by its name, from its number or name; a number for stsb; None where there is none."""
        names = self.spec.names
        if not names:
            try:
                return float(given)
            except (TypeError, ValueError):
                return None
        text = str(given)
        if text in names:
            return text
        return names[int(text)] if text.isdigit() and int(text) < len(names) else None
