"""What a run folder tells: curves, evaluations and samples, read from its lines of JSON.

history = read_history("runs/quickstart")
history.train["loss"].y, history.first_eval, history.last_eval
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftjax.report.samples import Sample
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

    def pairs(self, first: int | None, last: int | None) -> list[tuple[Sample, tuple[Line, ...]]]:
        """Each prompt with its answers at two steps (by default the first and last logged), and those in between."""
        by_prompt: dict[str, dict[int, Line]] = {}
        for line in self.samples:
            by_prompt.setdefault(line["prompt"], {})[line["step"]] = line
        found = []
        for prompt, lines in by_prompt.items():
            low = min(lines) if first is None else first
            high = max(lines) if last is None else last
            before, after = lines.get(low), lines.get(high) if high != low else None
            sample = Sample(prompt, _completion(before), _completion(after), next(iter(lines.values()))["reference"])
            found.append((sample, tuple(lines[s] for s in sorted(lines) if low < s < high)))
        return found


def read_history(folder: str | Path) -> History:
    """Reads a run folder.

    Raises:
      CheckpointError: a line is damaged; names file and line.
    """
    folder = Path(folder)
    metrics = _lines(folder / METRICS)
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


def _completion(line: Line | None) -> str | None:
    return None if line is None else line["completion"]


def _lines(path: Path) -> list[dict]:
    return read_lines(path) if path.exists() else []


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
