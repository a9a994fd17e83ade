"""`mixture`: data sets of one kind mixed by weight, from rows to a prepared data set."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ftjax.config import Loader, Run
from ftjax.configfile import build
from ftjax.data.prepare import prepare
from ftjax.data.tasks.local import Local
from ftjax.data.tasks.mixture import Mixture, Part
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError, DataError
from ftjax.models.sources import embedded_folder

COUNTS = {"a": 60, "b": 10}


@pytest.fixture
def files(tmp_path):
    """Two data sets: one with our columns, one with others."""
    names = {"a": ("prompt", "completion"), "b": ("question", "answer")}
    for name, (asked, said) in names.items():
        rows = [{asked: f"{name}{i}?", said: f"yes {i}"} for i in range(COUNTS[name])]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def mixture(files, *weights: float, **settings) -> Mixture:
    a = Local(path=str(files / "a.jsonl"), eval_share=0)
    b = Local(path=str(files / "b.jsonl"), eval_share=0, columns=("prompt=question", "completion=answer"))
    return Mixture(
        parts=tuple(Part(data=d, weight=w) for d, w in zip((a, b), weights or (1, 1), strict=True)), **settings
    )


def counts(task: Mixture) -> dict[str, int]:
    return dict(Counter(r["prompt"][0] for r in task.examples("train")))


@pytest.mark.parametrize(
    "settings, want",
    [
        ({"mixing": "proportional"}, {"a": 60, "b": 10}),
        ({"mixing": "temperature", "temperature": 1e9}, {"a": 60, "b": 60}),
        ({"mixing": "temperature"}, {"a": 60, "b": 24}),  # sqrt(60) : sqrt(10) = 60 : 24.5
    ],
)
def test_shares_of_the_rows(files, settings, want):
    assert counts(mixture(files, **settings)) == want


def test_fixed_weights_repeat_the_smaller_part(files):
    task = mixture(files, 0.7, 0.3)
    assert counts(task) == {"a": 60, "b": 26}
    assert pytest.approx(0.7, abs=0.01) == 60 / 86
    often = Counter(r["prompt"] for r in task.examples("train"))
    assert {often[f"b{i}?"] for i in range(10)} == {2, 3} and sum(often[f"b{i}?"] == 3 for i in range(10)) == 6
    assert task.describe() == [
        "part 0 (local): 60 rows, 69.8% of the mixture: 1.00 epochs in one of it",
        "part 1 (local): 10 rows, 30.2% of the mixture: 2.60 epochs in one of it",
    ]


def test_it_is_prepared_like_any_data_set(files, monkeypatch, tmp_path):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(embedded_folder())
    loader = Loader(max_length=32)
    one, again, other = (
        prepare(mixture(files, *w), loader, tokenizer, use_cache=False) for w in ((7, 3), (7, 3), (5, 5))
    )
    assert len(one.train) == 86 and len(other.train) == 120
    assert one.fingerprint == again.fingerprint != other.fingerprint
    (files / "b.jsonl").write_text((files / "b.jsonl").read_text().replace("yes 3", "no"))
    assert mixture(files, 7, 3).fingerprint() != one.fingerprint["data"]
    moved = files / "moved"
    moved.mkdir()
    for name in ("a", "b"):
        (moved / f"{name}.jsonl").write_text((files / f"{name}.jsonl").read_text())
    here, there = (prepare(mixture(f, 7, 3), loader, tokenizer, use_cache=False) for f in (files, moved))
    assert here.fingerprint == there.fingerprint


def test_its_errors(files, tmp_path):
    with pytest.raises(DataError, match=r"data\.parts\.1  its 10 rows would be repeated 594 times"):
        mixture(files, 1, 99).examples("train")
    (tmp_path / "text.jsonl").write_text('{"text": "plain"}\n')
    plain = Part(data=Local(path=str(tmp_path / "text.jsonl"), eval_share=0))
    odd = Mixture(parts=(*mixture(files).parts, plain))
    with pytest.raises(DataError, match=r"text\.jsonl:1"):
        prepare(odd, Loader(max_length=32), load_tokenizer(embedded_folder()), use_cache=False)
    inner = Mixture(parts=(Part(data=mixture(files)),))
    with pytest.raises(ConfigError, match=r"data\.parts\.0\.data=mixture  a part is a data set of its own"):
        build(Run(data=inner).model_dump(mode="json"), title="x")
    long = Part(data=Local(path=str(files / "a.jsonl"), long_text="wrap"))
    with pytest.raises(ConfigError, match=r"data\.parts\.1\.data  has wraps=True, part 0 has False"):
        _ = Mixture(parts=(mixture(files).parts[0], long)).wraps
