"""Alpaca and ShareGPT rows as TRL rows.

    convert(Row({"instruction": "Add.", "input": "2 3", "output": "5"}))
    # {"prompt": [{"role": "user", "content": "Add.\n2 3"}], "completion": [{"role": "assistant", "content": "5"}]}

Alpaca becomes conversational, since `system` and `history` are turns; a base model without a chat template can use
``data.chat_template=alpaca``. ShareGPT's ``from``/``value`` turns become messages, tool calls included.
"""

from __future__ import annotations

import json
from typing import Any

from ftjax.data.rows import Row, excerpt
from ftjax.errors import DataError, did_you_mean

ALPACA = ("instruction", "output")
SHAREGPT = ("conversations",)
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def convert(row: Row) -> Row:
    """The row in TRL's columns; a row of another kind comes back as it is.

    Raises:
      DataError: an Alpaca or ShareGPT field has the wrong type; the text names the place and the field.
    """
    if isinstance(row.get("instruction"), str) and not any(k in row for k in ("prompt", "messages", "text")):
        return _alpaca(row)
    if "conversations" in row:
        return _sharegpt(row)
    if isinstance(row.get("messages"), list) and all(isinstance(row.get(k), dict) for k in ("chosen", "rejected")):
        return _answered(row, row["messages"], drop=("messages",))
    tag = next((k for k in ("kto_tag", "label") if isinstance(row.get(k), bool)), None)
    if tag and isinstance(row.get("messages"), list):
        return _split_last(row, row["messages"], label=row[tag], drop=("messages", tag))
    return row


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _alpaca(row: Row) -> Row:
    for field in ("input", "output", "system", "chosen", "rejected"):
        if not isinstance(row.get(field, ""), str | None):
            raise DataError(
                f"{row.origin}: field {field!r} of an Alpaca row expected a string, got {excerpt(repr(row[field]))}"
            )
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        raise DataError(
            f"{row.origin}: field 'history' of an Alpaca row expected [[question, answer], ...], "
            f"got {excerpt(repr(turns))}"
        )
    prompt = [_message("system", row["system"])] if row.get("system") else []
    for question, answer in turns:
        prompt += [_message("user", question), _message("assistant", answer)]
    prompt.append(_message("user", "\n".join(filter(None, (row["instruction"], row.get("input"))))))
    rest = {k: v for k, v in row.items() if k not in ("instruction", "input", "output", "system", "history")}
    if row.get("chosen") and row.get("rejected"):
        answers = {k: [_message("assistant", row[k])] for k in ("chosen", "rejected")}
    elif row.get("output") is None:
        answers = {}
    else:
        answers = {"completion": [_message("assistant", row["output"])]}
        if isinstance(row.get("kto_tag"), bool):
            answers["label"] = rest.pop("kto_tag")
    return Row({**rest, "prompt": prompt, **answers}, row.origin)


def _sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.origin}: field 'conversations' expected a list of turns, got {excerpt(repr(turns))}")
    messages = [_turn(row, f"conversations[{i}]", turn) for i, turn in enumerate(turns)]
    if isinstance(row.get("system"), str) and row["system"]:
        messages.insert(0, _message("system", row["system"]))
    rest = {k: v for k, v in row.items() if k not in ("conversations", "system")}
    if isinstance(row.get("chosen"), dict) and isinstance(row.get("rejected"), dict):
        return _answered(row, messages, drop=("conversations", "system"))
    if isinstance(row.get("kto_tag"), bool):
        return _split_last(row, messages, label=row["kto_tag"], drop=("conversations", "system", "kto_tag"))
    return Row({**rest, "messages": messages}, row.origin)


def _answered(row: Row, messages: list[dict[str, Any]], *, drop: tuple[str, ...]) -> Row:
    """A conversation with two last turns to choose from."""
    rest = {k: v for k, v in row.items() if k not in drop}
    answers = {k: [_turn(row, k, row[k])] for k in ("chosen", "rejected")}
    return Row({**rest, "prompt": messages, **answers}, row.origin)


def _turn(row: Row, field: str, turn: Any) -> dict[str, Any]:
    if isinstance(turn, dict) and "role" in turn and "content" in turn:
        return turn
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise DataError(
            f'{row.origin}: field {field!r} expected {{"from": ..., "value": ...}}, got {excerpt(repr(turn))}'
        )
    speaker, value = turn["from"], turn["value"]
    if speaker not in _SPEAKERS:
        hint = did_you_mean(str(speaker), _SPEAKERS)
        known = ", ".join(_SPEAKERS)
        raise DataError(f"{row.origin}: field {field!r} is from {speaker!r}.{hint} Expected one of: {known}")
    if speaker != "function_call":
        return _message(_SPEAKERS[speaker], value)
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as e:
        raise DataError(
            f"{row.origin}: field {field!r}: a function_call needs a JSON value ({e}): {excerpt(str(value))}"
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    return {**_message("assistant", ""), "tool_calls": [{"type": "function", "function": c} for c in calls]}


def _split_last(row: Row, messages: list, *, label: bool, drop: tuple[str, ...]) -> Row:
    rest = {k: v for k, v in row.items() if k not in drop}
    return Row({**rest, "prompt": messages[:-1], "completion": messages[-1:], "label": label}, row.origin)
