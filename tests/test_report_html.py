"""The page about a run: complete, readable by a strict parser, loads nothing, obeys nothing that data or models say."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftjax.data.preview import PreviewExample, Span
from ftjax.errors import CheckpointError
from ftjax.report.history import read_history
from ftjax.report.html import write_report
from ftjax.report.memory import memory_report
from ftjax.report.parameters import GroupRow, ParameterReport
from ftjax.report.samples import pair
from ftjax.report.svg import BOTTOM, BUCKETS, LEFT, RIGHT, TOP, Axis, H, Series, W, chart, thinned
from ftjax.train.session import Answer

EVIL = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>&lt;\x1b[2J"
COMPILED = SimpleNamespace(
    temp_size_in_bytes=64, output_size_in_bytes=0, alias_size_in_bytes=0, generated_code_size_in_bytes=0,
    argument_size_in_bytes=0,
)  # fmt: skip
VOID = {"meta"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; an element that is closed out of turn is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def lines(steps: int = 30) -> list[dict]:
    train = [
        {"event": "train", "step": i, "loss": 3.0 - i / 100, "lr": 1e-3 * i, "grad_norm": 0.5}
        for i in range(1, steps + 1)
    ]
    return [{"event": "eval", "step": 0, "loss": 3.25}, *train, {"event": "eval", "step": steps, "loss": 2.5}]


@pytest.fixture
def write(tmp_path):
    """Writes a report in which some arguments differ; returns its text."""
    config = {
        "name": "small", "note": EVIL, "peft": {"name": "lora"}, "objective": {"name": "causal_lm"},
        "data": {"name": "stdlib_docs"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "environment.json").write_text(json.dumps({"python": "3.12.9", "note": EVIL}))
    (tmp_path / "timing.jsonl").write_text(json.dumps({"step": 1, "seconds": 62.0, "tokens_per_s": 9e3}) + "\n")

    def text(**changes) -> str:
        usual = {
            "before": {"loss": 3.25}, "after": {"loss": 2.5, "step": 30}, "lines": lines(),
            "memory": memory_report(frozen_bytes=512, trainable_bytes=64, opt_bytes=128, compiled=COMPILED, limit=4096),
            "parameters": ParameterReport((GroupRow("frozen", 2, 90, 360), GroupRow("lora_a", 1, 10, 40, ("q_proj",)))),
            "preview": [PreviewExample("a.jsonl:1", (Span("ask ", False), Span("answer", True)), 2, 1, True)],
            "samples": pair([Answer("1+1=", "3", "2")], [Answer("1+1=", "2", "2")]),
        }  # fmt: skip
        path = write_report(tmp_path, **(usual | changes))
        assert path == Path(tmp_path / "report.html")
        return path.read_text(encoding="utf-8")

    return text


def test_everything_is_there(write):
    page = Page(write())
    for heading in (
        "Held-out results", "Curves", "Answers to held-out prompts", "What reaches the loss", "Parameters",
        "Memory per device", "Config", "Environment",
    ):  # fmt: skip
        assert heading in page.texts
    assert "causal_lm with lora on stdlib_docs · 30 steps · 1:02 of training" in page.text
    assert {"3.2500", "2.5000", "-0.7500", "step 30", "q_proj", "1+1=", "lora_a", "3.12.9"} & set(page.texts) >= {
        "3.2500", "2.5000", "-0.7500", "step 30", "q_proj", "1+1=", "lora_a",
    }  # fmt: skip
    assert "3.12.9" in page.text and "fits (19% of 4.0 KiB)" in page.text
    assert page.tags.count("svg") == 4 and page.tags.count("details") == 1


def test_trained_tokens_are_set_off(write):
    text = write()
    assert "<p class=text>ask <mark>answer</mark></p>" in text and "1 of 2 tokens trained, EOS is trained" in text
    never = PreviewExample("a", (Span("x", True),), 1, 1, False)
    assert "<span class=bad>EOS is not trained</span>" in write(preview=[never])


def test_nothing_is_loaded_and_nothing_runs(write):
    page = Page(write())
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [(k, v) for k, v in page.attributes if k.startswith("on") or k in ("src", "href", "srcset", "style")]
    assert not re.search(r"https?:|url\(|@import", write())
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_light_and_dark(write):
    text = write()
    assert "@media (prefers-color-scheme: dark)" in text
    light, dark = (set(re.findall(r"--\w+", part)) for part in re.findall(r":root \{(.*?)\}", text, re.S))
    assert light == dark and set(re.findall(r"var\((--\w+)\)", text)) <= light


def test_foreign_text_is_escaped_wherever_it_stands(write):
    answers = [Answer(EVIL, EVIL, EVIL)]
    text = write(
        before={EVIL: 1.0}, after={EVIL: 2.0}, preview=[PreviewExample(EVIL, (Span(EVIL, True),), 1, 1, False)],
        samples=pair(answers, answers), parameters=ParameterReport((GroupRow("lora_a", 1, 10, 40, (EVIL,)),)),
    )  # fmt: skip
    page = Page(text)
    assert not {"script", "img"} & set(page.tags) and "\x1b" not in text
    assert (
        page.text.count("<script>alert(1)</script>") == 2 + 2 + 4 + 1 + 2
    )  # metric (its card too), preview, answers, module, JSON


def test_sections_without_content_are_left_out(write):
    text = write(before={}, after={}, samples=[], preview=[])
    assert "Held-out results" not in text and "Answers to" not in text and "What reaches" not in text
    assert "Parameters" in text


def test_a_result_that_got_worse_looks_so(write):
    text = write(before={"loss": 2.0, "rouge_l": 0.25}, after={"loss": 3.0, "rouge_l": 0.5})
    assert "<b class=bad>3</b><span>was 2</span>" in text and "<b class=good>0.5000</b><span>was 0.2500</span>" in text


def test_a_run_folder_is_enough(write, tmp_path):
    """All but the reports of the compiled program is read from the files of a run."""
    write()
    samples = [
        {"step": n, "prompt": p, "completion": f"{p} at {n}", "reference": f"right {p}"}
        for n in (0, 10, 30)
        for p in "ab"
    ]
    for name, rows in (("metrics", lines()), ("samples", samples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path).read_text())
    assert {"2.5000", "-0.7500", "step 30"} <= set(page.texts) and "Parameters" not in page.texts
    first = page.texts.index("a")
    shown = page.texts[first : first + 6]
    assert shown == ["a", "a at 0", "while training", "step 10", "a at 10", "a at 30"]
    assert page.texts.count("right a") == 1


def test_a_damaged_line_is_named(write, tmp_path):
    write()
    (tmp_path / "metrics.jsonl").write_text('{"event": "train"\n{"event": "train", "step": 2}\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl:1: not a line that was written here"):
        read_history(tmp_path)


# Curves --------------------------------------------------------------------------------------------------------------


def drawn(svg: str, style: str) -> list[list[tuple[float, float]]]:
    """The points of each line of one style."""
    found = re.findall(rf'<polyline class="{style}" points="(.*?)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in found]


def test_a_curve_spans_its_box_and_has_a_gap_where_a_step_was_not_finite():
    svg = chart("loss", [Series("s", (1, 2, 3, 4, 5), (4.0, 3.5, math.nan, 3.0, 2.0))])
    (one, two) = drawn(svg, "line")
    assert len(one) == len(two) == 2 and one[0][0] == LEFT and two[1][0] == W - RIGHT
    assert TOP < one[0][1] < one[1][1] < two[0][1] < two[1][1] < H - BOTTOM  # the loss falls: down is a larger y
    assert "nan" not in svg and "NaN" not in svg
    assert {"2", "3", "4"} <= set(re.findall(r">([^<]+)</text>", svg))


def test_only_finite_values_are_drawn_if_there_are_any():
    assert chart("loss", [Series("s", (1, 2), (math.nan, math.inf))]) == chart("loss", []) == ""
    for value in (0.0, 3.0, -1e-9):
        svg = chart("loss", [Series("s", (0,), (value,), "points")])
        assert svg.count("<circle") == 1 and "nan" not in svg


def test_values_of_many_sizes_get_a_logarithmic_axis():
    many = Series("s", (1, 2, 3), (1000.0, 10.0, 0.1))
    (points,) = drawn(chart("norm", [many]), "line")
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.11)
    assert "log scale" in chart("norm", [many]) and "log scale" not in chart("norm", [many], linear=True)


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 17), (0.001, 0.0013), (1e-7, 3e5), (1, 2), (99, 101)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_lie_within_the_axis_and_are_few(low: float, high: float, log: bool):
    ticks = Axis(low, high, 0, 100, log and low > 0).ticks()
    assert 2 <= len(ticks) <= 9 and ticks == sorted(ticks)
    assert all(low - 1e-9 * high <= t <= high * (1 + 1e-9) for t in ticks)


def test_long_curves_are_thinned_but_keep_their_spikes_and_gaps():
    values = [(float(i), 1.0 + (i % 7)) for i in range(30_000)]
    values[12_345], values[20_000] = (12_345.0, 99.0), (20_000.0, math.nan)
    kept = thinned(values)
    assert len(kept) <= 2 * BUCKETS + 1 and [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert (12_345.0, 99.0) in kept and 20_000.0 in [x for x, y in kept if math.isnan(y)]
    assert thinned(values[:500]) == values[:500]


def test_a_run_folder_without_environment(write, tmp_path):
    (tmp_path / "environment.json").unlink()
    assert "Environment" not in write()
