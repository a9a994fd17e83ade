"""Checkpoints that are either whole or not there: orbax writes the arrays, our sha256 manifest proves them.

A step is written to ``<step>.saving/`` in the background: orbax's ``state/``, then ``extra.json``, then
``manifest.json`` (size and sha256 of every file, dtype and shape of every leaf). Only then is the folder renamed to
``<step>/``, so a step folder that its manifest does not prove was damaged later. It is never restored: it is set aside
under ``quarantine/`` and the next newest is used.

    with Checkpoints(run / "checkpoints", keep=2, message=print) as checkpoints:
        found = checkpoints.restore(template)              # None at the first start
        checkpoints.save(step, state, extra={"data": data_state}, metric=held_out_loss)

Why a manifest of our own: orbax restores a file with a flipped bit without complaint and with other numbers, takes an
empty folder for the newest step, and casts float32 to bfloat16 when the template asks for it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ftjax.errors import CheckpointError
from ftjax.train.files import read_json, reason_of, sync_folder, write_atomic
from ftjax.train.leaves import flatten, is_key, pack, require_same, row, target, unpack
from ftjax.train.manifest import MANIFEST, Damage, examine, hash_files, read_manifest, sealed

FORMAT = 1
EXTRA, STATE, QUARANTINE = "extra.json", "state", "quarantine"
SAVING, DELETING = ".saving", ".deleting"


@dataclass(frozen=True)
class Restored:
    """A checkpoint as it was saved, bit for bit.

    Attributes:
      step: the step after which it was saved.
      state: arrays in the template's structure and shardings.
      extra: the JSON value given to `save` (tuples come back as lists).
      lost: steps between the newest checkpoint found and this one; 0 unless newer ones were damaged.
    """

    step: int
    state: Any
    extra: dict
    lost: int = 0


class Checkpoints:
    """The checkpoints of one run: saved in the background, verified on restore, rotated.

    Args:
      folder: where the step folders live; created if absent. A local or shared POSIX file system.
      keep: newest checkpoints kept.
      keep_best: also keep the one with the lowest metric.
      readonly: change nothing in the folder, which another process may be writing: damaged steps are skipped where they
        are. Whoever has not locked the run folder (evaluation, generation) opens it so.
      message: called from the calling thread with each thing a user must see.

    Raises:
      CheckpointError: the folder cannot be created.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_best: bool = True,
        readonly: bool = False,
        message: Callable[[str], None] = print,
    ):
        self.folder = Path(folder).absolute()
        self.keep, self.keep_best, self.readonly, self.message = keep, keep_best, readonly, message
        self._primary = jax.process_index() == 0  # one host manages files; every host writes and reads its shards
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the save that ran last
        self._failures = 0  # in a row
        self._last: int | None = None  # step saved or restored last
        # Orbax logs each failed write with its traceback; the same failure is reported here in one line.
        logging.getLogger("absl").addFilter(_not_orbax)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        if self._primary and not readonly:
            self._tidy()
        _from_primary(0)  # nobody looks before the folder is in order
        self._metrics = {step: m["metric"] for step in self.steps if (m := read_manifest(self.folder / str(step)))}

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a folder, oldest first."""
        if not self.folder.is_dir():
            return ()
        return tuple(sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir()))

    @property
    def last_step(self) -> int | None:
        """The step that was saved or restored last; a save still being written does not count."""
        return self._last

    @property
    def best_step(self) -> int | None:
        """The saved step with the lowest metric (the earliest of equals), or None when no step has one."""
        scored = [(metric, step) for step, metric in list(self._metrics.items()) if metric is not None]
        return min(scored)[1] if scored else None

    def save(self, step: int, state: Any, *, extra: dict, metric: float | None = None) -> bool:
        """Copies `state` to the host and starts writing it; returns before the files are complete.

        The arrays may be donated right after. A failed write is reported at the next call, and training goes on; a
        second failure in a row raises.

        Args:
          step: the step after which the state is.
          state: pytree of jax arrays, typed PRNG keys and None holes.
          extra: JSON value saved with it: data position, counters, fingerprint.
          metric: held-out loss at this step, lower is better; not finite counts as none.

        Returns:
          False if this very step was saved or restored last, and nothing is written.

        Raises:
          CheckpointError: the second failure in a row; names the last good step.
          TypeError: `extra` is not JSON.
        """
        assert not self.readonly
        extra_text = json.dumps(extra, sort_keys=True) + "\n"  # now: the loop goes on to change what is in it
        self._join()
        if step == self._last:
            self.message(f"the checkpoint of step {step} exists already and stays as it is")
            return False
        retry = self._failures > 0
        metric = metric if metric is not None and math.isfinite(metric) else None
        self._start(step, state, extra_text, metric)
        if retry or self._error:  # after a failure the training may not run ahead of an outcome that could end it
            self._join()
        return True

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError: it failed. Called where no next save can make up for it: at the end and before leaving.
        """
        self._join(tolerated=0)

    def restore(self, template: Any) -> Restored | None:
        """The newest checkpoint whose every byte is proven; damaged newer ones are set aside with a message.

        Args:
          template: pytree of arrays or `jax.ShapeDtypeStruct`s (with shardings) of the state that is expected.

        Returns:
          None when there is none: at the first start, or when all were damaged (then `message` has said so).

        Raises:
          CheckpointError: an intact checkpoint is of another state: leaves, shapes or dtypes differ.
        """
        self._join()
        found = self.steps if self._primary else ()
        good = _from_primary(self._newest_good(found) if self._primary else None)
        self._metrics = {step: metric for step, metric in self._metrics.items() if good is not None and step <= good}
        lost = found[-1] - (good or 0) if found else 0
        if lost:
            then = f"resuming from step {good}" if good is not None else "no good checkpoint is left: starting anew"
            self.message(f"{then}; {lost} steps are lost and will be repeated")
        if good is None:
            return None
        restored = self.load(good, template, verify=False)
        self._last = good
        return Restored(restored.step, restored.state, restored.extra, lost)

    def load(self, step: int, template: Any, *, verify: bool = True) -> Restored:
        """One given checkpoint, e.g. `best_step`, in the structure of `template`.

        Raises:
          CheckpointError: there is none, it is damaged (it is set aside then), or it is of another state.
        """
        self._join()
        path = self.folder / str(step)
        if not path.is_dir():
            raise CheckpointError(
                f"{self.folder}: no checkpoint of step {step}. Steps: {', '.join(map(str, self.steps)) or 'none'}"
            )
        if verify and self._primary and (damage := examine(path)):
            self._set_aside(step, damage)
            raise CheckpointError(f"the checkpoint of step {step} is damaged: {damage.text}")
        manifest = read_manifest(path)
        assert manifest is not None, path
        leaves, rebuild = flatten(template)
        require_same(step, manifest["leaves"], {name: row(leaf) for name, leaf in leaves.items()})
        targets = {name: target(leaf) for name, leaf in leaves.items() if leaf.size}
        try:
            stored = self._orbax.restore(path / STATE, args=ocp.args.StandardRestore(targets))
        except Exception as e:
            text = f"the checkpoint of step {step} is intact (sha256 of every file agrees) but cannot be read: "
            raise CheckpointError(text + reason_of(e)) from e
        arrays = {name: unpack(leaf, stored.get(name), manifest["keys"].get(name)) for name, leaf in leaves.items()}
        return Restored(step, rebuild(arrays), read_json(path / EXTRA))

    def close(self) -> None:
        """Waits for the last save and frees the threads. A failure is only reported: use `wait` to raise."""
        if self._thread is not None:
            try:
                self._join(agree=False)  # perhaps only this host is leaving, with an error
            except CheckpointError as e:
                self.message(str(e))
        self._orbax.close()
        logging.getLogger("absl").removeFilter(_not_orbax)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Saving.

    def _start(self, step: int, state: Any, extra_text: str, metric: float | None) -> None:
        leaves, _ = flatten(state)
        table = {name: row(leaf) for name, leaf in leaves.items()}
        arrays = {name: pack(leaf) for name, leaf in leaves.items() if leaf.size}  # orbax refuses empty arrays
        keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if is_key(leaf)}
        manifest = {"format": FORMAT, "step": step, "metric": metric, "leaves": table, "keys": keys}
        path = self.folder / f"{step}{SAVING}"
        self._error = None
        try:
            if self._primary:
                path.mkdir()
            self._orbax.save(path / STATE, args=ocp.args.StandardSave(arrays))
        except Exception as e:
            self._error = e
        self._thread = threading.Thread(target=self._finish, args=(path, manifest, extra_text), name="checkpoint")
        self._thread.start()

    def _finish(self, path: Path, manifest: dict, extra_text: str) -> None:
        """In the background: waits for orbax, proves what it wrote, commits by rename, deletes what is too old."""
        try:
            if self._error is not None:
                raise self._error
            self._orbax.wait_until_finished()
            if self._primary:
                write_atomic(path / EXTRA, extra_text)
                write_atomic(path / MANIFEST, sealed(manifest | {"files": hash_files(path)}))
                sync_folder(path)
                path.rename(path.with_suffix(""))
                sync_folder(self.folder)
            self._last = manifest["step"]
            self._metrics[manifest["step"]] = manifest["metric"]
            self._rotate()
        except Exception as e:
            self._error = e
            shutil.rmtree(path, ignore_errors=True)  # gives the space back

    def _rotate(self) -> None:
        steps = sorted(self._metrics)
        kept = {*steps[-self.keep :], *([self.best_step] if self.keep_best else [])}
        for step in set(steps) - kept:
            del self._metrics[step]
            if self._primary:
                doomed = self.folder / f"{step}{DELETING}"
                (self.folder / str(step)).rename(doomed)  # at once: half deleted must not look like damaged
                shutil.rmtree(doomed)

    def _join(self, *, tolerated: int = 1, agree: bool = True) -> None:
        """Ends the save in progress and reports its outcome, which is the same on every host if they `agree`."""
        ended = self._thread is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._failures = 0 if self._error is None else self._failures + 1
            if agree:
                self._failures, self._last = _from_primary(self._failures) or 0, _from_primary(self._last)
        if self._failures == 0 or not (ended or tolerated == 0):
            return
        good = "there is no good one yet" if self._last is None else f"the last good checkpoint is step {self._last}"
        why = reason_of(self._error) if self._error else "see the first host"
        text = f"saving a checkpoint to {self.folder} failed: {why}; {good}"
        if self._failures > tolerated:
            raise CheckpointError(text) from self._error
        self.message(text + ". Training continues; the run stops if the next save fails too")

    # The folder.

    def _tidy(self) -> None:
        """Removes what an interrupted process left half written or half deleted."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path.suffix in (SAVING, DELETING):
                    shutil.rmtree(path)
                    if path.suffix == SAVING:
                        self.message(f"removed the unfinished checkpoint of step {path.stem}")
        except OSError as e:
            raise CheckpointError(f"cannot use the checkpoint folder {self.folder}: {reason_of(e)}") from e

    def _newest_good(self, steps: tuple[int, ...]) -> int | None:
        for step in reversed(steps):
            damage = examine(self.folder / str(step))
            if damage is None:
                return step
            self._set_aside(step, damage)
        return None

    def _set_aside(self, step: int, damage: Damage) -> None:
        if self.readonly:
            self.message(f"the checkpoint of step {step} is damaged: {damage.text}. It is not used")
            return
        place = self.folder / QUARANTINE / f"{step}-{damage.reason}"
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{step}-{damage.reason}-{number}")
        try:
            place.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(place)
        except OSError as e:
            raise CheckpointError(f"step {step} is damaged and cannot be set aside: {reason_of(e)}") from e
        self._metrics.pop(step, None)
        self.message(f"the checkpoint of step {step} is damaged: {damage.text}. Set aside as {place}")


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _from_primary(number: int | None) -> int | None:
    """The primary host's number, on every host."""
    if jax.process_count() == 1:
        return number
    chosen = int(multihost_utils.broadcast_one_to_all(jnp.int32(-1 if number is None else number)))
    return None if chosen < 0 else chosen
