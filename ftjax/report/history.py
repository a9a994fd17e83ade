"""What a run folder tells: curves, evaluations and samples, read from its lines of JSON.

history = read_history("runs/quickstart")
history.train["loss"].y, history.first_eval, history.last_eval
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftjax.report.samples import Sample, pair
from ftjax.train.files import read_json
from ftjax.train.metrics import METRICS, SAMPLES, TIMING, read_lines

Line = Mapping[str, Any]


@dc.dataclass(frozen=True)
class Curve:
    """Values by step; non-finite ones included."""

    x: tuple[int, ...] = ()
    y: tuple[float, ...] = ()


@dc.dataclass(frozen=True)
class History:
    """A run folder's records; what is not there is empty.

    Attributes:
      config: the resolved config.
      environment: versions, devices, commit.
      train: curves of the training lines, by name.
      timing: curves of the timing lines, by name.
      evals: evaluation lines in order.
      samples: sample lines in order.
    """

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    train: Mapping[str, Curve]
    timing: Mapping[str, Curve]
    evals: tuple[Line, ...]
    samples: tuple[Line, ...]

    @property
    def first_eval(self) -> Line:
        """Numbers before training, or the first there are."""
        return self.evals[0] if self.evals else {}

    @property
    def last_eval(self) -> Line:
        """The newest numbers."""
        return self.evals[-1] if self.evals else {}

    def pairs(self, first: int | None, last: int | None) -> list[Sample]:
        """The answers logged at two steps, by default the first and the last logged, matched by prompt."""
        steps = [line["step"] for line in self.samples]
        low = min(steps, default=0) if first is None else first
        high = max(steps, default=0) if last is None else last
        before, after = ([_Answer(line) for line in self.samples if line["step"] == s] for s in (low, high))
        return pair(before, after if high != low else [])

    def between(self, sample: Sample) -> tuple[Line, ...]:
        """The other answers that were logged to a sample's prompt, in order."""
        shown = (sample.before, sample.after)
        return tuple(s for s in self.samples if s["prompt"] == sample.prompt and s["completion"] not in shown)


@dc.dataclass(frozen=True)
class _Answer:
    """A line of samples.jsonl as `pair` takes it."""

    line: Line

    @property
    def prompt(self) -> str:
        return self.line["prompt"]

    @property
    def completion(self) -> str:
        return self.line["completion"]

    @property
    def reference(self) -> str:
        return self.line["reference"]


def read_history(folder: str | Path, lines: Sequence[Line] | None = None) -> History:
    """Reads a run folder; `lines` are those of its metrics.jsonl where they have been read already.

    Raises:
      CheckpointError: a line is damaged; names file and line.
    """
    folder = Path(folder)
    metrics = _lines(folder / METRICS) if lines is None else lines
    return History(
        _object(folder / "config.json"),
        _object(folder / "environment.json"),
        curves(line for line in metrics if line["event"] == "train"),
        curves(_lines(folder / TIMING)),
        tuple(line for line in metrics if line["event"] == "eval"),
        tuple(_lines(folder / SAMPLES)),
    )


def curves(lines: Iterable[Line]) -> dict[str, Curve]:
    """One curve per number in the lines."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, []).append((line["step"], float(value)))
    return {name: Curve(*map(tuple, zip(*values, strict=True))) for name, values in points.items()}


def _lines(path: Path) -> list[dict]:
    return read_lines(path) if path.exists() else []


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
