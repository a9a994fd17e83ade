"""From a data set to examples: splits, tasks, cache, leak check, and the counts a user sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax import registry
from ftjax.config import Loader
from ftjax.data.pipeline import Batches
from ftjax.data.prepare import Prepared, prepare
from ftjax.data.tasks.hub import Hub
from ftjax.data.tasks.local import Local
from ftjax.data.templates import BUILTIN
from ftjax.errors import DataError
from tests.test_data_helpers import tiny_tokenizer, write_jsonl

PAIRS = [{"prompt": f"what is {i}? ", "completion": f"it is {i * i}"} for i in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
    for p in PAIRS
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(path: Path, tokenizer: Any = None, task: dict | None = None, **loader: Any) -> Prepared:
    return prepare(Local(path=str(path), **(task or {})), Loader(**loader), tokenizer or tiny_tokenizer(), 0)


def test_tasks_are_registered() -> None:
    assert {"local", "hub", "stdlib_docs", "stdlib_text"} <= set(registry.known("data"))


def test_a_single_file_is_split_by_hash(tmp_path: Path) -> None:
    prepared = make(write_jsonl(tmp_path / "a.jsonl", PAIRS), task={"eval_share": 0.2})
    assert len(prepared.train) + len(prepared.eval) == 60 and 3 <= len(prepared.eval) <= 25
    assert not set(e.origin for e in prepared.train) & set(e.origin for e in prepared.eval)
    assert prepared.report.read == len(prepared.train) and prepared.warnings == ()
    assert len(make(tmp_path / "a.jsonl", task={"eval_share": 0.0}).eval) == 0


def test_a_folder_uses_its_own_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS[:50])
    write_jsonl(tmp_path / "test.jsonl", PAIRS[50:])
    prepared = make(tmp_path)
    assert (len(prepared.train), len(prepared.eval)) == (50, 10)
    write_jsonl(tmp_path / "validation.jsonl", PAIRS[55:])
    assert len(make(tmp_path).eval) == 5
    assert len(make(tmp_path / "train.jsonl", task={"eval_path": str(tmp_path / "test.jsonl")}).eval) == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file. Known formats: .jsonl"):
        make(tmp_path / "empty")


def test_a_folder_of_texts_is_a_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for i in range(30):
        (folder / ("more" if i % 2 else "") / f"{i}.txt").write_text(f"text number {i}. " * 40)
    prepared = make(folder, task={"eval_share": 0.2}, max_length=32)
    assert prepared.report.truncated == 0 and prepared.report.examples > 30 and prepared.report.longest > 200
    cut = make(folder, task={"eval_share": 0.2, "long_text": "truncate"}, max_length=32)
    assert cut.report.truncated == cut.report.examples == len(cut.train)


def test_leaks_are_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "test.jsonl", [*PAIRS[:3], {"prompt": "new", "completion": "x"}])
    assert make(tmp_path).warnings == (
        f"3 of 4 held-out rows (75.0%) are also in the training data, e.g. {tmp_path}/test.jsonl:1: "
        "the held-out loss is too good",
    )


def test_bad_rows_are_counted_once_over_all_stages(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*PAIRS, {"prompt": 1, "completion": "x"}, {"text": "odd"}])
    path.write_text(path.read_text() + "{oops\n")
    prepared = make(path, task={"eval_share": 0.0}, skip_bad=3)
    assert (prepared.report.read, prepared.report.skipped_bad, prepared.report.examples) == (63, 3, 60)
    assert prepared.report.lines()[0] == "63 rows -> 60 examples (3 malformed left out)"
    with pytest.raises(DataError, match="3 malformed rows, loader.skip_bad=2 tolerates fewer"):
        make(path, task={"eval_share": 0.0}, skip_bad=2)
    with pytest.raises(DataError, match="a.jsonl:63:2: not JSON"):
        make(path)


def test_all_rows_filtered_names_each_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "long " * 50, "completion": "x"}] * 4)
    with pytest.raises(
        DataError, match=r"of 4 rows 0 are malformed, 4 are longer than loader.max_length=16 and dropped"
    ):
        make(path, task={"eval_share": 0.0}, max_length=16, truncation="drop")
    path.write_text("")
    with pytest.raises(DataError, match="a.jsonl: no rows. The file holds no data."):
        make(path)


def test_held_out_rows_of_another_type_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="the held-out rows are language_modeling, the training rows prompt_completion"):
        make(tmp_path)


def test_vocabulary_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the tokenizer does not fit the model"):
        prepare(Local(path=str(write_jsonl(tmp_path / "a.jsonl", PAIRS))), Loader(), tiny_tokenizer(), vocab_size=100)


def same(a: Prepared, b: Prepared) -> bool:
    pairs = ((a.train, b.train), (a.eval, b.eval))
    arrays = all(
        np.array_equal(getattr(x, f), getattr(y, f))
        for x, y in pairs
        for f in ("input_ids", "weights", "offsets", "rows")
    )
    return arrays and a.train.origins == b.train.origins and a.fingerprint == b.fingerprint and a.warnings == b.warnings


def test_the_cache_hits_only_when_nothing_changed(tmp_path: Path, own_cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    chat = {"chat_template": "chatml", "eval_share": 0.2}
    first = make(path, task=chat)
    assert first.report.cache == "miss (nothing stored yet)"
    again = make(path, task=chat)
    assert again.report.cache == "hit" and same(first, again) and again.template == BUILTIN["chatml"]
    assert make(path, task={**chat, "metrics": ("rouge_l",)}).report.cache == "hit"
    assert make(path, task=chat, max_length=64).report.cache == "miss (changed: loader.max_length)"
    assert make(path, tiny_tokenizer(eos_token="<s>"), task=chat).report.cache.startswith("miss (changed: tokenizer")
    other = make(path, task={**chat, "chat_template": "alpaca"})
    assert "template" in other.report.cache and not same(first, other)
    write_jsonl(path, CHATS[1:])
    assert "data.a.jsonl" in make(path, task=chat).report.cache
    for name in own_cache.glob("*.npz"):
        np.load(name, allow_pickle=False).close()
    assert not list(own_cache.glob(".partial*"))


def test_a_template_edited_in_the_tokenizer_misses(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = BUILTIN["chatml"]
    make(path, tokenizer)
    tokenizer.chat_template = BUILTIN["chatml"] + "{# edited #}"
    assert make(path, tokenizer).report.cache == "miss (changed: template)"


def test_a_damaged_cache_file_is_replaced(tmp_path: Path, own_cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    first = make(path)
    stored = next(own_cache.glob("*.npz"))
    stored.write_bytes(stored.read_bytes()[:100])
    again = make(path)
    assert again.report.cache == "miss (the stored file is damaged)" and same(first, again)
    assert make(path).report.cache == "hit"


def test_a_read_only_cache_only_costs_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "file" / "x"))
    assert "not stored" in make(write_jsonl(tmp_path / "a.jsonl", PAIRS)).report.cache
    monkeypatch.setenv("FTJAX_CACHE", "")
    assert make(tmp_path / "a.jsonl").report.cache == "off"


def test_the_fingerprint_is_json_and_names_files(tmp_path: Path) -> None:
    prepared = make(write_jsonl(tmp_path / "a.jsonl", PAIRS))
    saved = json.loads(json.dumps(prepared.fingerprint))
    assert list(saved["data"]) == ["a.jsonl"] and saved["examples"]["count"] == len(prepared.train)
    batches = Batches(prepared.train, loader=Loader(), batch=4, fingerprint=prepared.fingerprint)
    batches.check_fingerprint(json.loads(json.dumps(batches.fingerprint)))


def test_moved_data_are_the_same_data(tmp_path: Path) -> None:
    first = make(write_jsonl(tmp_path / "a.jsonl", PAIRS))
    (tmp_path / "elsewhere").mkdir()
    moved = make(write_jsonl(tmp_path / "elsewhere" / "a.jsonl", PAIRS))
    assert moved.fingerprint == first.fingerprint
    assert moved.train[0].origin.startswith(str(tmp_path / "elsewhere"))  # and not from the cache of the other place


def test_prompts_are_fixed_and_held_out(tmp_path: Path) -> None:
    task = Local(path=str(write_jsonl(tmp_path / "a.jsonl", CHATS)), eval_share=0.3)
    prompts = task.prompts(4)
    assert len(prompts) == 4 and prompts == task.prompts(4) and task.prompts(2) == prompts[:2]
    held = [r["messages"] for r in task.examples("eval")]
    assert all([*p.prompt, {"role": "assistant", "content": p.reference}] in held for p in prompts)
    text = Local(path=str(tmp_path / "t.txt"), eval_share=0.5)
    (tmp_path / "t.txt").write_text("".join(f"sentence number {i} here. " for i in range(2000)))
    one = text.prompts(1)[0]
    assert isinstance(one.prompt, str) and len(one.prompt) <= 120 and one.reference


def test_hub_layout_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "me" / "pairs"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train.jsonl", [{"q": p["prompt"], "a": p["completion"]} for p in PAIRS])
    write_jsonl(folder / "data" / "test.jsonl", [{"q": "x", "a": "y"}])
    task = Hub(id=str(folder), columns=("prompt=q", "completion=a"), eval_split="test")
    prepared = prepare(task, Loader(), tiny_tokenizer())
    assert (len(prepared.train), len(prepared.eval)) == (60, 1)
    assert prepared.train[0].origin == f"{folder}[train]:row 1" and task.prompts(1)[0].reference == "y"
    by_hash = Hub(id=str(folder), eval_share=0.2)
    assert len(by_hash.examples("train")) + len(by_hash.examples("eval")) == 60
    with pytest.raises(DataError, match="split 'validation'"):
        Hub(id=str(folder), train_split="validation").examples("train")
    with pytest.raises(DataError, match="data set 'nobody/nothing-of-that-name', split 'train': "):
        Hub(id="nobody/nothing-of-that-name").examples("train")
