"""Cleaning: what is removed and counted, planted and measured near-duplicates, leaks, and that nothing depends on chance."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.clean import RECALL, Clean, NearIndex, bands_for, jaccard, shingles
from ftjax.data.prepare import Prepared, prepare
from ftjax.data.rows import NEAR_LEAK, BadRows, Row
from ftjax.data.tasks.local import Local
from ftjax.data.tasks.mixture import Mixture, Part
from tests.test_data_helpers import tiny_tokenizer, write_jsonl

WORDS = np.asarray([f"w{i}" for i in range(3000)])


def texts(n: int, words: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, words)) for _ in range(n)]


def changed(text: str, count: int, seed: int) -> str:
    """The text with `count` of its words replaced."""
    draw, words = np.random.default_rng(seed), text.split()
    for i in draw.choice(len(words), count, replace=False):
        words[i] = f"new{draw.integers(10**6)}"
    return " ".join(words)


def rows(*found: str) -> list[Row]:
    return [Row({"text": t}, f"x:{i}") for i, t in enumerate(found)]


def cleaned(clean: Clean, data: list[Row], held_out: list[Row] | None = None) -> tuple[list[str], dict[str, int]]:
    bad = BadRows()
    kept = clean(clean.normalised(data, bad), bad, held_out or ())
    assert len(data) == len(kept) + bad.removed
    return [r["text"] for r in kept], bad.cleaning


def test_nothing_by_default() -> None:
    data = rows("a", "a", "e\u0301", "")
    assert cleaned(Clean(), data) == (["a", "a", "e\u0301", ""], {})


def test_unicode_and_lengths() -> None:
    data = rows("e\u0301t\u00e9 here", "\u00e9t\u00e9 here", "\ufb01ne day", "ab", "x" * 30)
    found, counts = cleaned(Clean(unicode="NFC", min_chars=3, max_chars=20, duplicates="exact"), data)
    assert found == ["\u00e9t\u00e9 here", "\ufb01ne day"]
    assert counts == {
        "changed by NFC": 1, "shorter than 3 characters": 1, "longer than 20 characters": 1, "equal to an earlier row": 1
    }  # fmt: skip
    assert cleaned(Clean(unicode="NFKC"), data)[0][2] == "fine day"
    chat = Row({"messages": [{"role": "user", "content": "e\u0301" * 3}], "n": 1}, "x")
    bad = BadRows()
    (once,) = Clean(unicode="NFC").normalised([chat], bad)
    assert once["messages"][0]["content"] == "\u00e9" * 3 and once["n"] == 1 and once.origin == "x"
    assert Clean(min_chars=4)([once], bad) == [], "roles are no text"


def test_columns_that_tell_rows_apart() -> None:
    data = [Row({"text": "the same text", "id": i}, "x") for i in range(3)]
    assert len(Clean(duplicates="exact")(data, BadRows())) == 3
    assert len(Clean(duplicates="exact", columns=("text",))(data, BadRows())) == 1


def test_planted_near_duplicates_are_found() -> None:
    plain = texts(200, 60)
    planted = [changed(plain[i], 1, seed=i) for i in range(0, 200, 4)]
    far = [changed(plain[i], 30, seed=i) for i in range(1, 200, 8)]
    clean = Clean(duplicates="near", similarity=0.75)
    found, counts = cleaned(clean, rows(*plain, *planted, *far, plain[0]))
    assert found == [*plain, *far]
    assert counts == {"equal to an earlier row": 1, "similar to an earlier row": 50}
    print(counts)
    assert (found, counts) == cleaned(clean, rows(*plain, *planted, *far, plain[0]))


def test_recall_against_brute_force() -> None:
    """Of all pairs at Jaccard 0.9 or a little more, MinHash with banding misses hardly any; it never finds a false one."""
    plain = texts(400, 110)
    pairs = list(itertools.chain.from_iterable((t, changed(t, 1, seed=i)) for i, t in enumerate(plain)))
    sets = [shingles(t, 5) for t in pairs]
    near = {(i, j) for i in range(0, len(sets), 2) if jaccard(sets[i], sets[j := i + 1]) >= 0.9}
    assert len(near) > 300 and np.mean([jaccard(sets[i], sets[j]) for i, j in near]) < 0.96
    # what the pairs are not: like anything else (checked on a sample, over all shingles)
    assert max(jaccard(sets[i], sets[j]) for i in range(0, 60, 2) for j in range(i + 2, 120)) < 0.1
    index = NearIndex(0.9, shingle=5, permutations=128, seed=0)
    found = {(index.find(t), i) for i, t in enumerate(pairs) if index.add(t) == i and index.find(t) != i}
    recall = len(found & near) / len(near)
    print(f"{len(near)} pairs, recall {recall:.4f}, {index.bands} bands of {index.rows}")
    assert found <= near and recall >= 0.985
    few = NearIndex(0.9, shingle=5, permutations=128, seed=0)
    few.bands, few.rows = 2, 60  # bands of another threshold: the measurement can tell
    missed = {(few.find(t), i) for i, t in enumerate(pairs) if few.add(t) == i and few.find(t) != i}
    assert len(missed & near) / len(near) < 0.5


def test_bands() -> None:
    assert bands_for(0.9, 128) == (12, 10) and bands_for(1.0, 128) == (1, 128)
    for threshold in (0.3, 0.5, 0.8):
        b, r = bands_for(threshold, 128)
        assert 1 - (1 - threshold**r) ** b >= RECALL and b * r <= 128
    assert bands_for(0.1, 8) == (8, 1)


def test_shingles_are_sets_of_word_runs() -> None:
    assert len(shingles("a b c d e f", 5)) == 2 and len(shingles("a b a b a b", 2)) == 2
    assert len(shingles("one two", 5)) == 1 and len(shingles(" ,; ", 5)) == 0
    np.testing.assert_array_equal(shingles("One, two: THREE", 2), shingles("one two three", 2))
    assert jaccard(shingles("a b", 2), shingles("b a", 2)) == 0
    words = texts(1, 3000)[0]
    assert NearIndex(0.8, shingle=5, permutations=2**19, seed=0).rows  # many functions: in chunks
    assert len(shingles(words, 5)) > 2900


def test_leaks() -> None:
    held_out, train = texts(20, 60, seed=1), texts(30, 60, seed=2)
    leaked = [held_out[3], changed(held_out[5], 1, seed=0), changed(held_out[6], 30, seed=0)]
    data, other = rows(*train, *leaked), rows(*held_out)
    assert cleaned(Clean(), data, other) == ([*train, *leaked], {})
    assert cleaned(Clean(leaks="near"), data, other) == ([*train, *leaked], {NEAR_LEAK: 2})
    found, counts = cleaned(Clean(leaks="remove"), data, other)
    assert found == [*train, leaked[2]] and counts == {"equal or similar to a held-out row": 2}
    assert cleaned(Clean(leaks="near"), other) == (held_out, {}), "held-out rows are not compared with themselves"


def made(path: Path, **clean) -> Prepared:
    task = Local(path=str(path), clean=Clean(**clean))
    return prepare(task, Loader(max_length=512), tiny_tokenizer(), use_cache=False)


def test_the_report_and_the_fingerprint(tmp_path: Path) -> None:
    train, held_out = texts(12, 20, seed=1), texts(4, 20, seed=2)
    rows = [*train, train[0], changed(held_out[0], 1, seed=3), "hm"]
    write_jsonl(tmp_path / "train.jsonl", [{"text": t} for t in rows])
    write_jsonl(tmp_path / "test.jsonl", [{"text": t} for t in [*held_out, held_out[1]]])
    plain = made(tmp_path)
    assert "clean" not in plain.fingerprint["task"], "old checkpoints know of no cleaning"
    full = made(tmp_path, min_chars=5, duplicates="near", leaks="remove", similarity=0.5)
    assert len(full.train) == 12 and len(full.eval) == 4
    lines = full.report.lines()
    assert lines[0] == "15 rows -> 12 examples (3 cleaned away left out)"
    assert lines[-1] == (
        "cleaning: 1 shorter than 5 characters, 1 equal to an earlier row, 1 equal or similar to a held-out row"
    )
    assert full.eval_report.cleaning == {"equal to an earlier row": 1}
    other = made(tmp_path, min_chars=5, duplicates="near", leaks="remove", similarity=0.6)
    assert full.fingerprint != other.fingerprint and full.fingerprint["task"]["clean"]["similarity"] == 0.5
    warned = made(tmp_path, leaks="near", similarity=0.5)
    assert any(w.startswith(f"1 training rows are {NEAR_LEAK}") for w in warned.warnings)
    task = Local(path=str(tmp_path), clean=Clean(duplicates="exact"))
    both = prepare(Mixture(parts=(Part(data=task),)), Loader(), tiny_tokenizer(), use_cache=False)
    assert both.report.cleaning == {"equal to an earlier row": 1}, "parts of a mixture are cleaned too"


def test_the_cache_keeps_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*texts(12, 20), *texts(2, 20)]])
    task = Local(path=str(path), clean=Clean(duplicates="exact"))
    first, again = (prepare(task, Loader(), tiny_tokenizer()) for _ in range(2))
    assert again.report.cache == "hit" and again.report.cleaning == first.report.cleaning != {}
    assert again.report.removed + again.eval_report.removed == 2
