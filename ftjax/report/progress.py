"""Progress of a training run: a bar on a terminal, a line every so many steps elsewhere.

    with console.progress(300, log_every=20) as progress:
        progress.update(step, loss=2.3, lr=1e-3, grad_norm=0.5, tokens_per_s=1.2e4, data_wait=0.01, seconds=0.08)

The loss is an exponential moving average; rates and ETA are those of the last fifty steps, so neither compilation nor
evaluation enters them.
"""

from __future__ import annotations

import dataclasses as dc
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from rich.live import Live
from rich.text import Text

from ftjax.report.units import Ema, clock, number, percent, short

REDRAW_S = 0.1
WINDOW = 50
BAR = 24


class Screen(Protocol):
    """What progress needs of the console."""

    @property
    def width(self) -> int: ...
    def line(self, text: str = "") -> None: ...
    def live(self, draw: Callable[[], Text], *, transient: bool) -> Live | None: ...


@dc.dataclass(frozen=True)
class Rate:
    """One step's timing."""

    seconds: float
    tokens_per_s: float
    data_wait: float


@dc.dataclass
class Progress:
    """A context manager; made by `Console.progress`.

    Attributes:
      screen: where it is shown.
      total: steps of the run.
      start: steps taken before (a resumed run).
      log_every: steps between lines off a terminal.
      unicode: whether the stream can show line drawing.
    """

    screen: Screen
    total: int
    start: int = 0
    log_every: int = 10
    unicode: bool = True

    def __post_init__(self) -> None:
        self.step, self.skipped = self.start, 0
        self._loss, self._lr, self._norm = Ema(), 0.0, 0.0
        self._rates: deque[Rate] = deque(maxlen=WINDOW)
        self._eta: float | None = None
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        self._live = self.screen.live(self._draw, transient=False)
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.refresh()
            self._live.stop()

    def update(
        self, step: int, *, loss: float, lr: float, grad_norm: float, tokens_per_s: float, data_wait: float,
        seconds: float | None = None, eta: float | None = None,
    ) -> None:  # fmt: skip
        """Shows a finished step.

        Args:
          step: counted from 1.
          loss: of this step; a non-finite one is counted as skipped and leaves the average alone.
          lr: learning rate.
          grad_norm: before clipping.
          tokens_per_s: trained tokens per second in this step.
          data_wait: share of the step's time spent waiting for data.
          seconds: wall time of the step; gives the ETA.
          eta: seconds left, where the caller knows better.
        """
        first = self.step == self.start
        self.step, self._lr, self._norm, self._eta = step, lr, grad_norm, eta
        self.skipped += not (math.isfinite(loss) and math.isfinite(grad_norm))
        self._loss.update(loss)
        if first:
            self._rates.clear()
        self._rates.append(Rate(seconds or 0.0, tokens_per_s, data_wait))
        if self._live is None:
            if step % self.log_every == 0 or first or step == self.total:
                self.screen.line("  ".join([f"step {step}/{self.total}", *self._fields()]))
        elif time.monotonic() - self._drawn > REDRAW_S:
            self._drawn = time.monotonic()
            self._live.refresh()

    @property
    def eta(self) -> float | None:
        """Seconds left; None while unknown."""
        known = [r.seconds for r in self._rates if r.seconds]
        if self._eta is not None or not known:
            return self._eta
        return sum(known) / len(known) * (self.total - self.step)

    def _mean(self, field: str) -> float:
        """Mean of a rate, each step by its duration."""
        weights = [r.seconds or 1.0 for r in self._rates]
        return sum(w * getattr(r, field) for w, r in zip(weights, self._rates, strict=True)) / sum(weights)

    def _fields(self) -> list[str]:
        """What is known after the last step, most important first."""
        if not self._rates:
            return ["waiting for the first step"]
        left, speed = self.eta, self._mean("tokens_per_s")
        fields = [
            f"loss {number(self._loss.update(math.nan))}", f"lr {self._lr:.2e}", f"grad norm {number(self._norm)}",
            *([f"{short(speed)} tokens/s"] if speed else []), f"data wait {percent(self._mean('data_wait'), 1)}",
            f"ETA {clock(left) if left is not None else '?'}",
        ]  # fmt: skip
        return fields + ([f"{self.skipped} skipped"] if self.skipped else [])

    def _draw(self) -> Text:
        """One line that fits the terminal: the bar shrinks first, then what matters least goes."""
        head, fields, room = f"step {self.step}/{self.total}", self._fields(), self.screen.width - 1
        for needless in ("data wait", "grad norm", "lr "):
            if len("  ".join([head, *fields])) + 10 <= room:
                break
            fields = [f for f in fields if not f.startswith(needless)]
        bar = max(min(BAR, room - len("  ".join([head, *fields])) - 2), 0)
        done = round(bar * min(self.step / self.total, 1.0)) if self.total else bar
        full, empty = ("━", "─") if self.unicode else ("#", ".")
        text = Text(head + " ", "bold", no_wrap=True, overflow="ellipsis")
        text.append(full * done, "green").append(empty * (bar - done), "bright_black")
        return text.append("  " + "  ".join(fields), "not bold")
