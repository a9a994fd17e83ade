"""What a run measured, as lines of JSON: `metrics.jsonl` is the truth, TensorBoard a view of it.

    log = MetricLog(folder, message=print)
    log.metrics("train", step, {"loss": loss, "lr": lr})      # bit-identical between an interrupted and a whole run
    log.timing(step, {"tokens_per_s": 9e5})                   # wall-clock things never enter metrics.jsonl
    log.sample(step, {"prompt": p, "answer": a})
    log.sync()                                                # before a checkpoint: lines are on disk
    log.truncate_after(step)                                  # after a restore: later lines and a torn one go

Log everything of a step before its checkpoint is saved: what is logged after it, of the same step, comes twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftjax.errors import CheckpointError
from ftjax.train.files import reason_of
from ftjax.train.tensorboard import Board

METRICS, TIMING, SAMPLES = "metrics.jsonl", "timing.jsonl", "samples.jsonl"
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricLog:
    """Three files of JSON lines and a TensorBoard folder.

    Args:
      folder: the run folder.
      message: called with what a user must see.
      tensorboard: also write `tb/`. A failure there is reported once and stops nothing.
    """

    def __init__(self, folder: str | Path, *, message: Callable[[str], None] = print, tensorboard: bool = True):
        self.folder = Path(folder)
        self._files = {name: LineFile(self.folder / name, message) for name in (METRICS, TIMING, SAMPLES)}
        self._board = Board(self.folder / "tb", message) if tensorboard else None

    def metrics(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One line ``{"event": ..., "step": ..., **values}``; only what depends on config and seed alone."""
        self._files[METRICS].write({"event": event, "step": step, **values})
        self._scalars(event, step, values)

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Seconds, rates and memory of a step."""
        self._files[TIMING].write({"step": step, **values})
        self._scalars("timing", step, values)

    def sample(self, step: int, values: Mapping[str, Any]) -> None:
        """A generated answer with its prompt."""
        self._files[SAMPLES].write({"step": step, **values})
        if self._board:
            self._board.text("samples", step, "  \n".join(f"**{k}**: {v}" for k, v in values.items()))

    def truncate_after(self, step: int | None) -> None:
        """Forgets what was logged after the restored step; None forgets everything.

        Raises:
          CheckpointError: a line is damaged; names file and line.
        """
        for file in self._files.values():
            file.truncate_after(step)
        if self._board:
            self._board.restart(0 if step is None else step + 1)

    def sync(self) -> None:
        """Puts all lines on the disk.

        Raises:
          CheckpointError: lines could not be written twice in a row.
        """
        for file in self._files.values():
            file.sync()
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Writes what is left."""
        self.sync()
        for file in self._files.values():
            file.close()
        if self._board:
            self._board.close()

    def _scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board:
            for name, value in values.items():
                plain = _numbers(to_json(value))
                if isinstance(plain, int | float):
                    self._board.scalar(f"{group}/{name}", step, float(plain))


def to_json(value: Any) -> Any:
    """A value as JSON has it: array scalars as Python numbers (every bit kept), non-finite ones as their names."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if hasattr(value, "item"):  # numpy and jax scalars; bfloat16 and float32 are exact in float64
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, x in NONFINITE.items() if x == value or (value != value and name == "NaN"))
    return value


def read_lines(path: str | Path) -> list[dict]:
    """The lines of one of our files; ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` come back as numbers.

    Raises:
      CheckpointError: a line other than an unfinished last one is damaged; names file and line.
    """
    return [_numbers(line) for _, line in _parse(Path(path))]


class LineFile:
    """Appends JSON lines; each is handed to the system whole, at once, or kept until there is room."""

    def __init__(self, path: Path, message: Callable[[str], None]):
        self.path, self.message = path, message
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._pending: list[bytes] = []
        self._failures = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line, keys sorted. A full disk is reported once; the line is kept for the next try."""
        line = json.dumps(to_json(record), sort_keys=True, allow_nan=False)
        self._pending.append(line.encode() + b"\n")
        error = self._drain()
        if error and len(self._pending) == 1:
            self.message(f"cannot write {self.path}: {reason_of(error)}; its lines are kept in memory for now")

    def sync(self) -> None:
        """Everything written is on the disk; raises CheckpointError at the second failure in a row."""
        error = self._drain()
        if error is None:
            os.fsync(self._fd)
        self._failures = 0 if error is None else self._failures + 1
        if self._failures > 1:
            raise CheckpointError(f"cannot write {self.path}: {reason_of(error)}; {len(self._pending)} lines are lost")

    def truncate_after(self, step: int | None) -> None:
        """Keeps the lines up to a step."""
        end = 0
        if step is not None:
            # Steps never decrease in a file, so the later lines are its tail and nothing needs to be rewritten.
            end = max((offset for offset, line in _parse(self.path) if line["step"] <= step), default=0)
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)
        self._pending.clear()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def _drain(self) -> OSError | None:
        while self._pending:
            end = os.fstat(self._fd).st_size
            try:
                if os.write(self._fd, self._pending[0]) < len(self._pending[0]):
                    raise OSError(28, "No space left on device", str(self.path))
            except OSError as e:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, end)  # no half line in the middle of the file
                return e
            del self._pending[0]
        return None


def _parse(path: Path) -> list[tuple[int, dict]]:
    """(offset of its end, line) of each line; a last one that was cut by a kill or a power loss is left out."""
    lines, end = [], 0
    data = path.read_bytes()
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        end += len(raw)
        try:
            if not raw.endswith(b"\n"):
                break
            record = json.loads(raw)
            record["step"]
        except (ValueError, KeyError, TypeError):
            if not data[end:].strip(b"\0\n"):
                break
            raise CheckpointError(f"{path}:{number}: not a line that was written here: {raw[:60]!r}") from None
        lines.append((end, record))
    return lines


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return NONFINITE.get(value, value) if isinstance(value, str) else value
