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
from ftjax.report.html import WIDTH, write_report
from ftjax.report.memory import memory_report
from ftjax.report.parameters import GroupRow, ParameterReport
from ftjax.report.samples import pair
from ftjax.train.session import Answer

EVIL = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>&lt;\x1b[2J"
COMPILED = SimpleNamespace(
    temp_size_in_bytes=64, output_size_in_bytes=0, alias_size_in_bytes=0, generated_code_size_in_bytes=0,
    argument_size_in_bytes=0,
)  # fmt: skip
VOID = {"meta", "circle", "line", "polyline"}


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
    assert "causal_lm with lora on stdlib_docs" in page.text
    assert {"3.2500", "2.5000", "-0.7500", "step 30", "q_proj", "1+1=", "lora_a", "3.12.9"} & set(page.texts) >= {
        "3.2500", "2.5000", "-0.7500", "step 30", "q_proj", "1+1=", "lora_a",
    }  # fmt: skip
    assert "3.12.9" in page.text and "fits (19% of 4.0 KiB)" in page.text
    assert page.tags.count("svg") == 4 and page.tags.count("details") == 2


def test_trained_tokens_are_set_off(write):
    text = write()
    assert "<pre><span class=masked>ask </span><span class=trained>answer</span></pre>" in text


def test_nothing_is_loaded_and_nothing_runs(write):
    page = Page(write())
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [(k, v) for k, v in page.attributes if k.startswith("on") or k in ("src", "href", "srcset", "style")]
    assert not re.search(r"https?:|url\(|@import", write())


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
    assert page.text.count("<script>alert(1)</script>") == 1 + 2 + 4 + 1 + 2  # metric, preview, answers, module, JSON


def test_sections_without_content_are_left_out(write):
    text = write(before={}, after={}, samples=[], preview=[])
    assert "Held-out results" not in text and "Answers to" not in text and "What reaches" not in text
    assert "Parameters" in text


def test_a_curve_spans_its_box_and_passes_over_what_is_not_finite(write):
    found = [{"event": "train", "step": s, "loss": x} for s, x in ((1, 4.0), (2, math.nan), (3, math.inf), (5, 2.0))]
    text = write(lines=found)
    assert text.count("<svg") == 1 and "nan" not in text.split("<svg")[1].split("</svg>")[0]
    points = re.findall(r'points="(.*?)"', text)[0].split()
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points)
    assert x0 < x1 == WIDTH - 8 and y0 == 8.0 < y1  # the loss falls: down is a larger y
    assert ">4</text>" in text and ">2</text>" in text and ">step 5</text>" in text


def test_a_single_and_a_constant_point_are_drawn(write):
    text = write(lines=[{"event": "eval", "step": 0, "loss": 3.0}])
    assert text.count("<circle") == 1 and "NaN" not in text


def test_long_runs_are_thinned_but_keep_their_spikes(write):
    found = [{"event": "train", "step": i, "loss": 99.0 if i == 12_345 else 1.0 + (i % 7)} for i in range(1, 30_001)]
    text = write(lines=found)
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="(.*?)"', text)[0].split()]
    assert len(points) <= 4 * WIDTH and points == sorted(points, key=lambda p: p[0])
    spike = min(points, key=lambda p: p[1])
    assert spike[1] == 8.0 and abs((spike[0] - points[0][0]) / (points[-1][0] - points[0][0]) - 12_344 / 29_999) < 1e-3


def test_a_run_folder_without_environment(write, tmp_path):
    (tmp_path / "environment.json").unlink()
    assert "<pre>{}</pre>" in write()
