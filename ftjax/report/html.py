"""The run report: one self-contained HTML file with results, curves, samples, parameters, memory and config.

    path = write_report("runs/quickstart", before=before, after=after, parameters=..., memory=..., preview=...)

What is not given is read from the run folder, so an old folder can be reported on as well. Nothing is loaded from
elsewhere, nothing is executed, and every text of a model, a data set or a config is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftjax.report.grid import html as grid_html
from ftjax.report.history import Curve, History, Line, read_history
from ftjax.report.samples import ABSENT, Sample, comparison
from ftjax.report.svg import Series, chart, smooth
from ftjax.report.theme import CSS
from ftjax.report.units import clock, measured, number, short, title, visible
from ftjax.train.files import write_atomic

if TYPE_CHECKING:
    from ftjax.data.preview import PreviewExample
    from ftjax.report.memory import MemoryReport
    from ftjax.report.parameters import ParameterReport

LOWER_IS_BETTER = ("loss", "perplexity", "ece", "ece_unscaled", "ece_scaled", "rmse", "mae")
NOT_JUDGED = ("temperature",)
# Belt and braces: even a text that escaped the escaping could not run or load anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(
    folder: str | Path, *, before: Mapping[str, Any] | None = None, after: Mapping[str, Any] | None = None,
    parameters: ParameterReport | None = None, memory: MemoryReport | None = None,
    preview: Sequence[PreviewExample] = (), lines: Sequence[Line] | None = None, samples: Sequence[Sample] | None = None,
) -> Path:  # fmt: skip
    """Writes ``report.html`` into a run folder.

    Args:
      folder: of the run.
      before: held-out numbers before training, as a line of metrics.jsonl; the first logged ones by default.
      after: those of what was exported; the last logged ones by default.
      parameters: what was trained.
      memory: of the compiled step.
      preview: examples with the tokens that reach the loss.
      lines: of metrics.jsonl; read from the folder by default.
      samples: answers side by side; by default those logged at the steps of `before` and `after`.

    Returns:
      Path of the page.

    Raises:
      CheckpointError: a line of the run's files is damaged.
    """
    history = read_history(folder, lines)
    before = history.first_eval if before is None else before
    after = history.last_eval if after is None else after
    pairs = history.pairs(before.get("step"), after.get("step")) if samples is None else samples
    sections = {
        "Held-out results": grid_html(comparison(before, after)) if before or after else "",
        "Curves": _curves(history),
        "Answers to held-out prompts": _samples(history, pairs),
        "What reaches the loss": _previews(preview),
        "Parameters": grid_html(parameters.grid()) if parameters else "",
        "Memory per device": grid_html(memory.grid()) if memory else "",
        "Environment": _environment(history.environment),
        "Config": _config(history.config),
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections.items() if content)
    path = Path(folder) / "report.html"
    write_atomic(path, _page(str(history.config.get("name", path.parent.name)), _top(history, before, after) + body))
    return path


def _page(name: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(name)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def _text(value: Any) -> str:
    """Any value as harmless HTML text."""
    return escape(visible(str(value)))


def _top(history: History, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    config = history.config
    names = {k: config.get(k, {}).get("name", "") for k in ("objective", "peft", "data")}
    parts = [f"{names['objective']} with {names['peft']} on {names['data']}"] if all(names.values()) else []
    steps, seconds = history.train.get("loss", Curve()).x, sum(history.timing.get("seconds", Curve()).y)
    counts = [f"{steps[-1]:,} steps"] if steps else []
    counts += [f"{clock(seconds)} of training"] if seconds else []
    counts += [f"seed {config['seed']}"] if "seed" in config else []
    lead = " · ".join([*parts, *counts])
    return f"<h1>{_text(config.get('name', 'run'))}</h1><p class=lead>{_text(lead)}</p>{_cards(before, after)}"


def _cards(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    old, new = measured(before), measured(after)
    cards = []
    for name, value in list(new.items())[:6]:
        was, judged = "", ""
        if name in old and before is not after:
            was = f"was {number(old[name])}"
            better = (value < old[name]) == (name in LOWER_IS_BETTER)
            judged = "" if value == old[name] or name in NOT_JUDGED else " class=good" if better else " class=bad"
        cards.append(
            f"<div class=card><span>{_text(title(name))}</span><b{judged}>{number(value)}</b><span>{was}</span></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""


def _curves(history: History) -> str:
    train, timing = history.train, history.timing
    losses = _raw_and_smooth(train.get("loss"))
    held_out = curve_of(history.evals, "loss")
    losses += [Series("held-out", held_out.x, held_out.y, "points")] if held_out.x else []
    rate = train.get("lr", Curve())
    speed = timing.get("tokens_per_s")
    charts = [
        chart("loss", losses),
        chart("learning rate", [Series("lr", rate.x, rate.y)], y_text=lambda v: f"{v:.2g}", linear=True),
        chart("gradient norm", _raw_and_smooth(train.get("grad_norm"))),
        chart("tokens per second", _raw_and_smooth(speed if speed and any(speed.y) else None), y_text=short),
    ]
    return f"<div class=charts>{''.join(charts)}</div>" if any(charts) else ""


def _raw_and_smooth(curve: Curve | None) -> list[Series]:
    if curve is None:
        return []
    return [Series("each step", curve.x, curve.y, "faint"), Series("smoothed", curve.x, smooth(curve.y))]


def curve_of(lines: Iterable[Line], name: str) -> Curve:
    """One number of some lines, by step."""
    kept = [line for line in lines if name in line]
    return Curve(tuple(line["step"] for line in kept), tuple(float(line[name]) for line in kept))


def _samples(history: History, samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("prompt", "before", "after", "reference"))
    rows = "".join(_sample(s, history.between(s)) for s in samples)
    return f"<div class='wide samples'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _sample(sample: Sample, between: Sequence[Line]) -> str:
    more = "".join(f"<p class=note>step {int(line['step'])}</p>{_pre(line['completion'])}" for line in between)
    more = f"<details><summary>while training</summary>{more}</details>" if more else ""
    return (
        f"<tr><td>{_pre(sample.prompt)}</td><td>{_pre(sample.before)}{more}</td>"
        f"<td class=after>{_pre(sample.after)}</td><td>{_pre(sample.reference)}</td></tr>"
    )


def _pre(text: str | None) -> str:
    return f"<span class=absent>{ABSENT}</span>" if text is None else f"<p class=text>{_text(text)}</p>"


def _previews(examples: Sequence[PreviewExample]) -> str:
    legend = "<p class=note><mark>Marked</mark> text is trained, the rest is masked.</p>"
    return legend + "".join(map(_preview, examples)) if examples else ""


def _preview(example: PreviewExample) -> str:
    spans = "".join(f"<mark>{_text(s.text)}</mark>" if s.trained else _text(s.text) for s in example.spans)
    eos = "EOS is trained" if example.trains_eos else "<span class=bad>EOS is not trained</span>"
    counts = f"{example.trained:,} of {example.tokens:,} tokens trained"
    head = f"<small>{_text(example.origin)}: {counts}, {eos}</small>"
    return f"<div class=preview>{head}<p class=text>{spans}</p></div>"


def _environment(environment: Mapping[str, Any]) -> str:
    flat = {k: v for k, v in environment.items() if not isinstance(v, Mapping) and v is not None}
    flat |= environment.get("packages", {})
    return f"<dl>{''.join(f'<dt>{_text(k)}</dt><dd>{_text(v)}</dd>' for k, v in flat.items())}</dl>" if flat else ""


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return f"<details><summary>config.json</summary><pre>{_text(text)}</pre></details>"
