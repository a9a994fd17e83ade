"""`report.html`: one self-contained page about a run: results, curves, samples, tables, config, environment.

    path = write_report(folder, before=..., after=..., memory=..., parameters=..., preview=[...])

No scripts and nothing loaded from elsewhere; whatever came from data or models is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftjax.report.grid import html as table
from ftjax.report.samples import ABSENT, comparison
from ftjax.report.units import number, title, visible

if TYPE_CHECKING:
    from ftjax.data.preview import PreviewExample
    from ftjax.report.memory import MemoryReport
    from ftjax.report.parameters import ParameterReport
    from ftjax.report.samples import Sample

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 180, 66, 22

STYLE = """
:root { --fg: #1c2024; --dim: #66707a; --bg: #ffffff; --line: #dfe3e8; --accent: #2563a8; --good: #14703c; --soft: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6e9ec; --dim: #98a2ad; --bg: #14171a; --line: #32383f; --accent: #7db4ee; --good: #6fcf97; --soft: #1d2125 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.dim, .note, summary { color: var(--dim) } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { color: var(--dim); font-weight: 500 }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
.n { text-align: right } .total td { font-weight: 600 }
pre, .text { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
pre { background: var(--soft); padding: .8rem; border-radius: 4px } .masked { color: var(--dim) }
.trained { color: var(--good); font-weight: 600 } .curves { display: flex; flex-wrap: wrap; gap: 1rem }
.answers { table-layout: fixed; width: 100%; min-width: 44rem } svg { max-width: 100%; height: auto }
figure { margin: 0 } figcaption { font-size: .9rem; color: var(--dim) } svg text { fill: var(--dim); font-size: 11px }
svg .axis { stroke: var(--line) } svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.6 }
svg circle { fill: var(--accent) }
"""


def write_report(
    folder: Path, *, before: Mapping[str, Any], after: Mapping[str, Any], memory: MemoryReport,
    parameters: ParameterReport, preview: Sequence[PreviewExample], lines: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
) -> Path:  # fmt: skip
    """Writes the page of a run folder.

    Args:
      folder: holds config.json and environment.json.
      before, after: held-out numbers.
      memory, parameters: the run's reports.
      preview: examples with their trained tokens.
      lines: the events of metrics.jsonl.
      samples: answers side by side.

    Returns:
      Path of ``report.html``.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    environment = folder / "environment.json"
    found = environment.read_text(encoding="utf-8") if environment.exists() else "{}"
    sections = [
        ("Held-out results", table(comparison(before, after)) if before or after else ""),
        ("Curves", f"<div class=curves>{''.join(_curves(lines))}</div>"),
        ("Answers to held-out prompts", _samples(samples)),
        ("What reaches the loss", _preview(preview)),
        ("Parameters", table(parameters.grid())),
        ("Memory per device", table(memory.grid())),
    ]
    body = "\n".join(f"<h2>{name}</h2>\n{content}" for name, content in sections if content)
    name = _text(config["name"])
    what = f"{config['objective']['name']} with {config['peft']['name']} on {config['data']['name']}"
    page = (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{name}</title>\n"
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{STYLE}</style></head><body>\n"
        f"<h1>{name}</h1><p class=dim>{_text(what)}</p>\n{body}\n"
        f"<h2>Config</h2><details><summary>config.json</summary><pre>{_text(json.dumps(config, indent=2))}</pre></details>\n"
        f"<h2>Environment</h2><details><summary>environment.json</summary><pre>{_text(found)}</pre></details>\n"
        "</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _text(text: str) -> str:
    return escape(visible(text))


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td class=text>{_text(ABSENT if x is None else x)}</td>" for x in texts) + "</tr>"
        for texts in ((s.prompt, s.before, s.after, s.reference) for s in samples)
    )
    head = "".join(f"<th>{h}</th>" for h in ("prompt", "before", "after", "reference"))
    return f"<div class=wide><table class=answers><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _preview(examples: Sequence[PreviewExample]) -> str:
    out = []
    for e in examples:
        kind = {True: "trained", False: "masked"}
        spans = "".join(f"<span class={kind[s.trained]}>{_text(s.text)}</span>" for s in e.spans)
        out.append(f"<p class=dim>{_text(e.origin)}: {e.trained} of {e.tokens} tokens trained</p><pre>{spans}</pre>")
    legend = "<p class=note><span class=trained>bold green</span> is trained, the rest is masked</p>"
    return legend + "".join(out) if out else ""


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    wanted = [("train", "loss", "training loss"), ("eval", "loss", "held-out loss"), ("train", "lr", "learning rate"),
              ("train", "grad_norm", "gradient norm")]  # fmt: skip
    figures = []
    for event, key, name in wanted:
        points = [(float(r["step"]), float(r[key])) for r in lines if r.get("event") == event and key in r]
        points = [p for p in points if math.isfinite(p[1])]
        if points:
            figures.append(_curve(_thinned(points), name))
    return figures


def _thinned(points: Sequence[tuple[float, float]], most: int = 4 * WIDTH) -> Sequence[tuple[float, float]]:
    """At most so many points, spikes kept: of each stretch the first, the lowest, the highest and the last."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 4))
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    kept = ({s[0], min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1]), s[-1]} for s in stretches)
    return [p for stretch in kept for p in sorted(stretch)]


def _curve(points: Sequence[tuple[float, float]], name: str) -> str:
    """One line chart as SVG."""
    xs, ys = zip(*points, strict=True)
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    dx, dy = x1 - x0 or 1.0, y1 - y0 or 1.0
    w, h = WIDTH - LEFT - 8, HEIGHT - BOTTOM - 8

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / dx * w, 8 + (y1 - y) / dy * h

    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*p) for p in points))
    dots = (
        "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in (at(*p) for p in points))
        if len(points) < 20
        else ""
    )
    floor = HEIGHT - BOTTOM
    return (
        f"<figure><figcaption>{escape(title(name))}, last {escape(number(ys[-1]))}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(name)}">'
        f'<line class="axis" x1="{LEFT}" y1="8" x2="{LEFT}" y2="{floor}"/>'
        f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - 8}" y2="{floor}"/>'
        f'<polyline class="curve" points="{line}"/>{dots}'
        f'<text x="{LEFT - 6}" y="16" text-anchor="end">{escape(number(y1))}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">{escape(number(y0))}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{x0:.0f}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {x1:.0f}</text></svg></figure>'
    )
