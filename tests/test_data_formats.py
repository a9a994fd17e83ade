"""Dataset types: detection by columns, conversion of Alpaca and ShareGPT, and errors that name field and line."""

from __future__ import annotations

from typing import Any

import pytest

from ftjax.data.formats import detect, type_rows
from ftjax.data.rows import BadRows, Row
from ftjax.errors import ConfigError, DataError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def rows(*items: dict[str, Any]) -> list[Row]:
    return [Row(item, f"f.jsonl:{n}") for n, item in enumerate(items, 1)]


def fails(items: list[Row], *texts: str, **kwargs: Any) -> None:
    with pytest.raises((DataError, ConfigError)) as e:
        type_rows(items, **kwargs)
    for text in texts:
        assert text in str(e.value), str(e.value)


@pytest.mark.parametrize(
    ("row", "kind", "conversational"),
    [
        ({"text": "a"}, "language_modeling", False),
        ({"text": "a", "category": "b"}, "language_modeling", False),
        ({"messages": [USER, BOT]}, "language_modeling", True),
        ({"prompt": "a"}, "prompt_only", False),
        ({"prompt": [USER]}, "prompt_only", True),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", False),
        ({"prompt": [USER], "completion": [BOT]}, "prompt_completion", True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", False),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT], "margin": 1.0}, "preference", True),
        ({"chosen": "ab", "rejected": "ac"}, "preference", False),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired_preference", False),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise_supervision", False),
    ],
)
def test_types_by_column(row: dict, kind: str, conversational: bool) -> None:
    typed = type_rows(rows(row))
    assert (typed.type.kind, typed.type.conversational) == (kind, conversational)
    assert set(row) <= set(typed.rows[0])  # extra columns stay


def test_unknown_columns_list_what_is_expected() -> None:
    fails(rows({"question": "a", "promt": "b"}), "f.jsonl:1: no known dataset type has columns question, promt",
          "Is 'promt' meant to be 'prompt'?", "Expected columns: text | messages | prompt, completion",
          "data.columns=('prompt=question','completion=answer')")  # fmt: skip


def test_columns_can_be_renamed() -> None:
    typed = type_rows(
        rows({"question": "a", "answer": "b", "prompt": "old"}), columns=("prompt=question", "completion=answer")
    )
    assert typed.rows == [{"prompt": "a", "completion": "b"}] and typed.rows[0].origin == "f.jsonl:1"
    fails(
        rows({"question": "a"}),
        "'qestion' is no column of the data. Did you mean 'question'?",
        columns=("prompt=qestion",),
    )
    fails(rows({"question": "a"}), "'prompt' is not of the form 'ours=theirs'", columns=("prompt",))


def test_mixed_rows_name_the_first_odd_one() -> None:
    good = {"prompt": "a", "completion": "b"}
    fails(rows(good, good, {"prompt": "a", "completion": None}, {"text": "a"}),
          "f.jsonl:3: mixed rows: this one has columns prompt, completion (null), which is prompt_only",
          "2 of 4 rows are prompt_completion, e.g. f.jsonl:1")  # fmt: skip
    bad = BadRows(2)
    typed = type_rows(rows(good, good, {"prompt": "a"}, {"x": "a"}), bad=bad)
    assert len(typed.rows) == 2 and bad.count == 2
    assert bad.problems[0] == "f.jsonl:3: expected prompt_completion, got columns prompt"
    with pytest.raises(DataError, match="no rows"):
        detect([])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a", "completion": 7}, "f.jsonl:2: field 'completion' expected a string, got 7"),
        ({"prompt": "a", "completion": [BOT]}, "f.jsonl:2: field 'completion' expected a string, got [{"),
    ],
)
def test_wrong_field_types(row: dict, text: str) -> None:
    fails(rows({"prompt": "a", "completion": "b"}, row), text)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (["x"], "field 'messages' expected a list of messages"),
        ([USER, "x"], "field 'messages[1]' expected a message, got \"x\""),
        (
            [{"role": "usr", "content": "x"}],
            "field 'messages[0]' has role \"usr\". Did you mean 'user'? Expected one of: system",
        ),
        ([{"content": "x"}], "field 'messages[0]' has role null"),
        ([{"role": "user", "content": 3}], "field 'messages[0]' expected a string as 'content', got 3"),
        ([], "field 'messages' expected a list of messages"),
    ],
)
def test_wrong_messages(messages: list, text: str) -> None:
    fails(rows({"messages": [USER, BOT]}, {"messages": messages}), "f.jsonl:2", text)


def test_wrong_labels_and_tools() -> None:
    fails(
        rows({"prompt": "a", "completion": "b", "label": "maybe"}),
        "field 'label' expected true or false, got \"maybe\"",
    )
    fails(rows({"prompt": "a", "completions": ["b", "c"], "labels": [True]}), "2 completions, but 1 labels")
    fails(rows({"messages": [USER, BOT], "tools": "{"}), "field 'tools' is not JSON")
    typed = type_rows(rows({"messages": [USER, BOT], "tools": '[{"name": "f"}]'}))
    assert typed.rows[0]["tools"] == [{"name": "f"}]
    assert type_rows(rows({"prompt": "a", "completion": "b", "label": "False"})).rows[0]["label"] is False


def test_alpaca() -> None:
    typed = type_rows(rows(
        {"instruction": "Add.", "input": "2 3", "output": "5", "id": 1},
        {"instruction": "And?", "input": "", "output": "6", "system": "S", "history": [["q", "a"]]},
    ))  # fmt: skip
    assert str(typed.type) == "prompt_completion (conversational)"
    assert typed.rows[0] == {
        "id": 1,
        "prompt": [{"role": "user", "content": "Add.\n2 3"}],
        "completion": [{"role": "assistant", "content": "5"}],
    }
    assert [m["role"] for m in typed.rows[1]["prompt"]] == ["system", "user", "assistant", "user"]
    preference = type_rows(rows({"instruction": "Add.", "input": "", "output": "5", "chosen": "5", "rejected": "6"}))
    assert str(preference.type) == "preference (conversational)"
    fails(
        rows({"instruction": "a", "output": 5}), "f.jsonl:1: field 'output' of an Alpaca row expected a string, got 5"
    )


def test_sharegpt_with_tools_and_preferences() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
             {"from": "observation", "value": "{}"}, {"from": "gpt", "value": "a"}]  # fmt: skip
    typed = type_rows(rows({"conversations": turns, "system": "S", "tools": "[]"}))
    messages = typed.rows[0]["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    pair = {"conversations": turns[:1], "chosen": turns[3], "rejected": {"from": "gpt", "value": "b"}}
    assert type_rows(rows(pair)).rows[0]["rejected"] == [{"role": "assistant", "content": "b"}]
    fails(
        rows({"conversations": [{"from": "humn", "value": "x"}]}),
        "f.jsonl:1: field 'conversations[0]' is from 'humn'. Did you mean 'human'?",
    )
    fails(rows({"conversations": [{"role": "x"}]}), 'expected {"from": ..., "value": ...}')


def test_kto_rows_become_unpaired_preferences() -> None:
    for tag in ("kto_tag", "label"):
        typed = type_rows(rows({"messages": [USER, BOT], tag: False}))
        assert typed.rows == [{"prompt": [USER], "completion": [BOT], "label": False}]


def test_implicit_prompts_are_extracted() -> None:
    typed = type_rows(rows({"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "no"}]}))
    assert typed.rows[0]["prompt"] == [USER] and typed.rows[0]["chosen"] == [BOT]
    assert type_rows(rows({"chosen": "The sky is blue", "rejected": "The sky is green"})).rows[0] == {
        "prompt": "The sky is", "chosen": " blue", "rejected": " green"}  # fmt: skip
