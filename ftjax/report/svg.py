"""Curves as inline SVG: no scripts, no fonts of its own, colours from the page's variables (light and dark).

    chart("train loss", [Series("each step", curve.x, curve.y, "faint"), Series("smoothed", curve.x, smooth, "line")])

Long curves are thinned so that every peak stays: of each bucket of steps the lowest and the highest value are kept.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

from ftjax.report.units import Ema, number, short

W, H, LEFT, RIGHT, TOP, BOTTOM = 560, 270, 62, 14, 12, 30
BUCKETS = 300


@dc.dataclass(frozen=True)
class Series:
    """One curve: `faint` for raw values, `line` for the main one, `points` for few values."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["faint", "line", "points"] = "line"


@dc.dataclass(frozen=True)
class Axis:
    """From values to pixels.

    Attributes:
      low: smallest value shown.
      high: largest.
      start: pixel of `low`.
      stop: pixel of `high`.
      log: logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        f = math.log if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
                found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 7)]
        step = nice((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(x: float) -> float:
    """The next of 1, 2, 5, 10, ... at or above x."""
    power = 10.0 ** math.floor(math.log10(x))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= x * (1 - 1e-9))


def tick_text(x: float) -> str:
    """A round number without idle zeros."""
    return f"{x:.4g}"


def smooth(y: Sequence[float]) -> list[float]:
    """Moving average over about a fiftieth of the curve, and at least ten steps."""
    ema = Ema(1 - 1 / max(10.0, len(y) / 50))
    return [ema.update(v) for v in y]


def chart(
    title: str, series: Sequence[Series], *, y_text: Callable[[float], str] = tick_text, linear: bool = False
) -> str:  # fmt: skip
    """A figure with axes and a legend; empty when there is nothing finite to show.

    Args:
      title: what is shown.
      series: the curves; non-finite values are gaps.
      y_text: a value as the axis shows it.
      linear: never a logarithmic axis, which is the default for positive values that span a factor above 30.
    """
    values = [v for s in series for v in s.y if math.isfinite(v)]
    if not values:
        return ""
    log = not linear and min(values) > 0 and max(values) / min(values) > 30
    low, high = _padded(min(values), max(values), log)
    xs = [v for s in series for v in s.x]
    x = Axis(min(xs), max(max(xs), min(xs) + 1), LEFT, W - RIGHT)
    y = Axis(low, high, H - BOTTOM, TOP, log)
    marks = "".join(_draw(s, x, y) for s in series)
    legend = "".join(f"<span class='key {s.style}'>{escape(s.name)}</span>" for s in series if len(series) > 1)
    scale = " <small>log scale</small>" if log else ""
    return (
        f"<figure><figcaption>{escape(title)}{scale}<span class=legend>{legend}</span></figcaption>"
        f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(title)}">{_axes(x, y, y_text)}{marks}</svg></figure>'
    )


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def _axes(x: Axis, y: Axis, y_text: Callable[[float], str]) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{escape(y_text(t))}</text>'
        for t in y.ticks()
    ]
    whole = [t for t in x.ticks() if t == int(t)]
    lines += [f'<text x="{x(t):.1f}" y="{H - 8}" text-anchor="middle">{_step(t)}</text>' for t in whole]
    return "".join(lines) + f'<line class="base" x1="{LEFT}" x2="{W - RIGHT}" y1="{H - BOTTOM}" y2="{H - BOTTOM}"/>'


def _step(t: float) -> str:
    return f"{t:,.0f}" if t < 1e5 else short(t)


def _draw(series: Series, x: Axis, y: Axis) -> str:
    parts: list[list[tuple[float, float]]] = [[]]
    for px, py in thinned(list(zip(series.x, series.y, strict=True))):
        if math.isfinite(py):
            parts[-1].append((px, py))
        elif parts[-1]:  # a gap in the line says that the step was not finite
            parts.append([])
    out = ""
    for points in filter(None, parts):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        out += f'<polyline class="{series.style}" points="{path}"/>' if len(points) > 1 else ""
        if series.style == "points" or len(points) == 1:
            out += "".join(
                f'<circle class="{series.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5">'
                f"<title>step {a:,.0f}: {escape(number(b))}</title></circle>"
                for a, b in points
            )
    return out


def thinned(points: list[tuple[float, float]], buckets: int = BUCKETS) -> list[tuple[float, float]]:
    """At most two points per bucket, the lowest and the highest, in order; a bucket with a gap keeps it."""
    if len(points) <= 2 * buckets:
        return points
    kept: list[tuple[float, float]] = []
    for i in range(buckets):
        part = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        finite = [p for p in part if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted(ends | set([p for p in part if not math.isfinite(p[1])][:1]))
    return kept
