"""Rows of preferences and judgements as other programs write them, read by the `Local` data set and encoded."""

from __future__ import annotations

import json

import pytest

from ftjax.config import Loader
from ftjax.data.formats import type_rows
from ftjax.data.pairs import encode_judged, encode_pairs
from ftjax.data.tasks.local import Local
from ftjax.data.templates import resolve_template
from ftjax.data.tokenizer import load_tokenizer
from ftjax.models.sources import embedded_folder

USER, GOOD, POOR = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
HUMAN, BEST, WORSE = ({"from": f, "value": v} for f, v in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
PAIRS = {
    "plain": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "chosen": "a", "rejected": "b"},
    "sharegpt": {"conversations": [HUMAN], "chosen": BEST, "rejected": WORSE},
    "messages": {"messages": [USER], "chosen": GOOD, "rejected": POOR},
    "conversations": {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
}
JUDGED = {
    "plain": {"prompt": "q", "completion": "a", "label": True},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
    "sharegpt": {"conversations": [HUMAN, BEST], "kto_tag": True},
    "messages": {"messages": [USER, GOOD], "label": True},
}
REAL = {
    "instruct/instructions.json": "prompt_completion (conversational)",
    "instruct/preferences.json": "preference (conversational)",
    "instruct/dpo_en_demo.json": "preference (conversational)",
    "instruct/kto_en_demo.json": "unpaired_preference (conversational)",
    "gsm8k": "prompt_completion",
}


def typed(tmp_path, *rows):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return type_rows(Local(path=str(tmp_path / "rows.json"), eval_share=0).examples("train"))


def content(value):
    return value if isinstance(value, str) else "".join(m["content"] for m in value)


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs(tmp_path, row):
    found = typed(tmp_path, row)
    assert found.type.kind == "preference" and not {"messages", "conversations"} & set(found.rows[0])
    assert [content(found.rows[0][k]) for k in ("prompt", "chosen", "rejected")] == ["q", "a", "b"]
    tokenizer = load_tokenizer(embedded_folder())
    made = encode_pairs(
        found, tokenizer, Loader(max_length=64), template=resolve_template(tokenizer, "alpaca")
    ).examples
    first, second = made.first[0], made.second[0]
    said = [tokenizer.decode(e.input_ids[e.weights > 0], skip_special_tokens=True).strip() for e in (first, second)]
    assert said == ["a", "b"]


@pytest.mark.parametrize("row", JUDGED.values(), ids=JUDGED)
def test_judged_answers(tmp_path, row):
    tag = next(k for k in ("label", "kto_tag") if k in row)
    found = typed(tmp_path, row, row | {tag: False})
    assert found.type.kind == "unpaired_preference"
    assert [(content(r["prompt"]), content(r["completion"]), r["label"]) for r in found.rows] == [
        ("q", "a", True), ("q", "a", False)
    ]  # fmt: skip
    tokenizer = load_tokenizer(embedded_folder())
    made = encode_judged(
        found, tokenizer, Loader(max_length=64), template=resolve_template(tokenizer, "alpaca")
    ).examples
    assert made.labels.tolist() == [1, 0]


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared, name):
    columns = ("prompt=question", "completion=answer") if name == "gsm8k" else ()
    data = Local(path=str(shared / name), columns=columns)
    for split in ("train", "eval"):
        rows = data.examples(split)
        found = type_rows(rows, columns=columns)
        assert str(found.type) == REAL[name] and len(found.rows) == len(rows) > 10
