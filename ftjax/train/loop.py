"""The training loop: dispatch step n, then read what step n - 1 measured; log, evaluate, save, stop.

One loop serves every method and objective. It keeps no numbers of its own beyond `Progress`, which is saved with each
checkpoint, so that a run that was killed anywhere goes on bit for bit.
"""

from __future__ import annotations

import dataclasses as dc
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax

from ftjax.data.prefetch import DevicePrefetch
from ftjax.errors import DivergenceError
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.early_stop import EarlyStop
from ftjax.train.metrics import MetricLog
from ftjax.train.setup import Setup
from ftjax.train.signals import Interrupted, Signals, same_command
from ftjax.train.state import State


@dc.dataclass
class Progress:
    """Counters of a run; all of it goes into each checkpoint.

    Attributes:
      skipped: steps in a row whose loss or gradient was not finite.
      tokens: trained tokens so far.
      early_stop: evaluations without improvement.
    """

    early_stop: EarlyStop
    skipped: int = 0
    tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """As saved."""
        return {"skipped": self.skipped, "tokens": self.tokens, "early_stop": self.early_stop.to_json()}

    def restore(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.skipped, self.tokens = saved["skipped"], saved["tokens"]
        self.early_stop = self.early_stop.restored(saved["early_stop"])


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """A step's metrics as numbers: sums divided by their weights."""
    host = jax.device_get(metrics)
    out = {k: float(host[k]) for k in ("loss", "grad_norm", "lr") if k in host}
    if not bool(host.get("finite", True)):
        out["skipped"] = 1.0
    for name, (total, weight) in {**host["terms"], **host["metrics"]}.items():
        out[name] = float(total) / float(weight) if float(weight) else math.nan
    return out


@dc.dataclass
class Loop:
    """Runs a compiled step over a source of batches.

    Attributes:
      setup: what is trained.
      step: compiled ``(state, frozen, batch) -> (state, metrics)``.
      source: device batches with the data state after each (see `ftjax.data.prefetch`).
      rows_of: the rows of the data set in the batch of a step (counted from 0), to name them.
      log: metric files.
      checkpoints: saved states.
      signals: whether the user asked to stop.
      evaluate: ``(state, step) -> held-out loss``; logs by itself.
      show: called with (step, scalars, timing) for the console.
      message: called with texts for the user.
    """

    setup: Setup
    step: Callable[..., tuple[State, Any]]
    source: DevicePrefetch
    rows_of: Callable[[int], Iterable[str]]
    log: MetricLog
    checkpoints: Checkpoints
    signals: Signals
    evaluate: Callable[[State, int], float]
    show: Callable[[int, dict[str, float], dict[str, float]], None]
    message: Callable[[str], None]
    fingerprint: dict[str, Any]
    progress: Progress = dc.field(init=False)

    def __post_init__(self) -> None:
        e = self.setup.run.evaluate
        self.progress = Progress(EarlyStop(e.patience, e.min_delta))

    def run(self, state: State, *, start: int) -> State:
        """Trains from step `start` (0 for the first) to the end, or to early stopping.

        Raises:
          Interrupted: after a signal; the state is saved.
          DivergenceError: too many steps in a row were not finite.
        """
        total = self.setup.run.train.steps
        pending: tuple[int, Any, float] | None = None
        self._clock = time.perf_counter()
        n = start
        while n < total and not self.progress.early_stop.exhausted:
            if self.signals.received:  # it came before the first step: what is on disk is all there is
                self._leave(n, self.checkpoints.last_step)
            batch = next(self.source)
            state, metrics = self.step(state, self.setup.frozen, batch)
            n += 1
            self._read(pending)
            pending = (n, metrics, self.source.last_wait_s)
            if self._stops_at(n):
                self._read(pending)
                pending = None
                self._milestone(state, n)
        return state

    _last_eval: float | None = None

    def _due(self, n: int, every: int) -> bool:
        """Whether something done `every` so many steps is due; everything is at the last step."""
        return (every > 0 and n % every == 0) or n == self.setup.run.train.steps

    def _stops_at(self, n: int) -> bool:
        run = self.setup.run
        return self._due(n, run.evaluate.every) or self._due(n, run.checkpoint.every) or bool(self.signals.received)

    def _milestone(self, state: State, n: int) -> None:
        """Evaluation, checkpoint, leaving: whatever is due after step n, with nothing of it pending."""
        run = self.setup.run
        self._last_eval = None
        if self._due(n, run.evaluate.every):
            loss = self.evaluate(state, n)
            self.progress.early_stop = self.progress.early_stop.update(n, loss)
            self._last_eval = loss if math.isfinite(loss) else None
        stop = self.signals.received or self.progress.early_stop.exhausted
        if self._due(n, run.checkpoint.every) or self._improved() or stop:
            self._save(state, n, metric=self._last_eval)
        if self.signals.received:
            self.checkpoints.wait()
            self._leave(n, n)
        self._clock = time.perf_counter()

    def _leave(self, n: int, saved: int | None) -> NoReturn:
        where = None if saved is None else self.checkpoints.folder / str(saved)
        raise Interrupted(self.signals.received, step=n, saved=where, command=same_command())

    def _improved(self) -> bool:
        return self.setup.run.checkpoint.keep_best and self._last_eval is not None and self.progress.early_stop.improved

    def _save(self, state: State, n: int, *, metric: float | None) -> None:
        self.log.sync()
        extra = {"data": self.source.state(), "progress": self.progress.to_json(), "fingerprint": self.fingerprint}
        self.checkpoints.save(n, state, extra=extra, metric=metric)

    def _read(self, pending: tuple[int, Any, float] | None) -> None:
        """Fetches, checks and logs the metrics of a step that has been dispatched."""
        if pending is None:
            return
        n, metrics, wait = pending
        numbers = scalars(metrics)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens = numbers.get("num_tokens", 0.0)
        self.progress.tokens += int(tokens)
        self.log.metrics("train", n, numbers)
        timing = {"seconds": seconds, "tokens_per_s": tokens / seconds, "data_wait": min(1.0, wait / seconds)}
        self.log.timing(n, timing)
        self.show(n, numbers, timing)
        self._guard(n, numbers)

    def _guard(self, n: int, numbers: dict[str, float]) -> None:
        if "skipped" not in numbers:
            self.progress.skipped = 0
            return
        self.progress.skipped += 1
        rows = list(self.rows_of(n - 1))
        names = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        what = f"step {n}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}; batch of {names}"
        if self.progress.skipped > self.setup.run.train.skip_nonfinite:
            advice = "Lower optim.lr, raise optim.warmup, or look at these rows."
            raise DivergenceError(f"{self.progress.skipped} steps in a row were not finite. Last: {what}. {advice}")
        self.message(f"skipped a step that was not finite: {what}")
