"""The folder of a run: what is where, who works in it, and whether it is this run's.

    folder = RunFolder("runs/quickstart", message=print)
    with folder.begin(run, allow=("optim.lr",)) as start:     # Start(resumed=True, changes=(...))
        Checkpoints(folder.checkpoints); MetricLog(folder.path)

A first start writes `config.json`. A later one compares: the same config goes on, another one is shown as a diff and
refused unless each difference is harmless or allowed. Nothing of another run or of the user's is ever overwritten.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftjax.errors import CheckpointError, ConfigError
from ftjax.train.environment import environment
from ftjax.train.files import read_json, reason_of, write_atomic
from ftjax.train.lock import Lock

if TYPE_CHECKING:
    from ftjax.config import Run

ABSENT = "(absent)"
# Changes that leave the steps already taken valid. They are reported, not refused.
HARMLESS = ("out", "train.steps", "train.log_every", "evaluate.*", "checkpoint.*", "compute.cache", "loader.prefetch")


@dataclass(frozen=True)
class Change:
    """One difference between the saved config and the present one."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_show(self.old)} -> {_show(self.new)}"


class RunFolder:
    """Paths of a run's files, the lock on them, and the config that they belong to.

    Args:
      path: the folder; created by `begin`, so that a dry run leaves no trace.
      message: called with each thing a user must see.
    """

    def __init__(self, path: str | Path, *, message: Callable[[str], None] = print):
        self.path, self.message = Path(path), message
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.tensorboard = self.path / "tb"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.report = self.path / "report.html"
        self._lock = Lock(self.path / "lock", message)

    def begin(self, run: Run, *, allow: Iterable[str] = ()) -> Start:
        """Locks the folder and decides whether this is a first start or goes on.

        Args:
          run: the resolved config.
          allow: dotted paths that may differ from the saved config; ``peft`` covers ``peft.rank``, patterns are fine.

        Returns:
          What is the case; a context manager that gives the lock back.

        Raises:
          ConfigError: the folder holds something else, or the config changed in a way that was not allowed.
          CheckpointError: another process works in it, or its config is damaged.
        """
        config = run.model_dump(mode="json")
        self._refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as e:
            raise ConfigError(f"cannot use the run folder {self.path}: {reason_of(e)}") from e
        try:
            return self._begin(config, tuple(allow))
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.release()

    def _begin(self, config: dict, allow: tuple[str, ...]) -> Start:
        # Whatever stopped a run before its first step (a mistyped path, say) can be mended and started again.
        resumed = self.config.exists() and self._has_results()
        changes = self._compare(config, allow) if resumed else ()
        if changes:
            self._keep_old_config()
        if changes or not resumed:
            write_atomic(self.config, json.dumps(config, indent=2) + "\n")
        for folder in (self.tensorboard, self.checkpoints):
            folder.mkdir(exist_ok=True)
        return Start(self, resumed, changes, self._compare_environment())

    def _has_results(self) -> bool:
        """Whether anything was measured, trained or saved here, so that another config would mix two runs."""
        if self.metrics.exists() and self.metrics.stat().st_size:
            return True
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def _refuse_foreign(self) -> None:
        """The config is written first, so a folder with anything but a lock in it and no config is not ours."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"the run folder {self.path} is a file; choose another with out=...")
        if self.config.exists() or not self.path.exists():
            return
        try:
            found = sorted(p.name for p in self.path.iterdir() if p.name not in ("lock", "config.json.tmp"))
        except OSError as e:
            raise ConfigError(f"cannot use the run folder {self.path}: {reason_of(e)}") from e
        if found:
            some = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
            text = f"{self.path} is not empty and has no config.json, so it is not the folder of a run: {some}."
            raise ConfigError(text + " Nothing was changed. Choose another folder with out=... or name=...")

    def _compare(self, config: dict, allow: tuple[str, ...]) -> tuple[Change, ...]:
        try:
            saved = read_json(self.config)
            changes = diff(saved, config)
        except (ValueError, AttributeError) as e:
            text = f"{self.config} is damaged ({reason_of(e)}), so nothing tells what this run is."
            raise CheckpointError(text + " Restore it from a backup, or choose another folder with out=...") from e
        if saved.get("name") != config["name"] and not _covered("name", allow):
            text = f"{self.path} holds the run {saved.get('name')!r}, not {config['name']!r}. Nothing was changed."
            raise ConfigError(f"{text} Choose another folder with out=..., or allow the change of name.")
        refused = [c for c in changes if not _covered(c.path, (*HARMLESS, *allow))]
        if refused:
            title = f"{self.path} was started with another config"
            fix = "to go on all the same, allow them: --allow-change " + " ".join(c.path for c in refused)
            raise ConfigError(
                title, [*map(str, refused), f"{fix}\n  to start anew, choose another folder with out=..."]
            )
        for change in changes:
            self.message(f"config changed: {change}")
        return changes

    def _keep_old_config(self) -> None:
        number = 1
        while (old := self.path / f"config-{number}.json").exists():
            number += 1
        write_atomic(old, self.config.read_text(encoding="utf-8"))

    def _compare_environment(self) -> tuple[Change, ...]:
        now = environment()
        changes = diff(read_json(self.environment), now) if self.environment.exists() else ()
        for change in changes:
            self.message(f"environment changed: {change}; results may differ in their last bits")
        write_atomic(self.environment, json.dumps(now, indent=2) + "\n")
        return changes


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
      folder: where.
      resumed: whether the folder was this run's already; checkpoints tell how far it came.
      changes: differences from the saved config that were harmless or allowed.
      environment: differences of versions, devices or code.
    """

    folder: RunFolder
    resumed: bool
    changes: tuple[Change, ...]
    environment: tuple[Change, ...]

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()


def diff(old: Any, new: Any) -> tuple[Change, ...]:
    """The differences of two JSON objects by dotted path; lists are compared as a whole."""
    a, b = _flat(old), _flat(new)
    paths = [*a, *(p for p in b if p not in a)]
    return tuple(Change(p, a.get(p, ABSENT), b.get(p, ABSENT)) for p in paths if a.get(p, ABSENT) != b.get(p, ABSENT))


def _flat(value: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= _flat(child, f"{prefix}{key}.") if isinstance(child, dict) and child else {prefix + key: child}
    return flat


def _covered(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) or path.startswith(p + ".") for p in patterns)


def _show(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value)
