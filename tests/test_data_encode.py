"""Rows to tokens and weights: what is trained, what is cut, and that nothing disappears without being counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.encode import Encoded, encode, encode_prompt
from ftjax.data.formats import type_rows
from ftjax.data.preview import preview
from ftjax.data.rows import BadRows, Row
from ftjax.data.templates import BUILTIN
from ftjax.errors import ConfigError, DataError
from tests.test_data_helpers import tiny_tokenizer

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def run(
    *items: dict[str, Any], tokenizer: Any = None, template: str = "", wrap: bool = False, **loader: Any
) -> Encoded:
    typed = type_rows([Row(item, f"f.jsonl:{n}") for n, item in enumerate(items, 1)])
    return encode(typed, tokenizer or tiny_tokenizer(), Loader(**loader), template=template, wrap=wrap)


def spans(encoded: Encoded, tokenizer: Any = None, i: int = 0) -> list[tuple[str, bool]]:
    return [(s.text, s.trained) for s in preview(encoded.examples, tokenizer or tiny_tokenizer(), i + 1)[i].spans]


def test_text_trains_all_but_the_first_token_and_ends_with_eos() -> None:
    encoded = run({"text": "hello world"})
    example = encoded.examples[0]
    assert example.input_ids[-1] == 2 and (example.input_ids == 2).sum() == 1
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example) - 1)
    assert encoded.report.eos_trained == 1 and example.origin == "f.jsonl:1"
    assert run({"text": "hello world</s>"}).examples[0].input_ids.tolist() == example.input_ids.tolist()


def test_prompt_and_completion_train_the_completion_and_eos() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    encoded = run({"prompt": "what is two plus two?", "completion": " four"}, tokenizer=tokenizer)
    assert spans(encoded, tokenizer) == [("<s>what is two plus two?", False), (" four</s>", True)]
    prompt = encode_prompt("what is two plus two?", tokenizer)
    np.testing.assert_array_equal(encoded.examples[0].input_ids[: len(prompt)], prompt)
    everything = run({"prompt": "what", "completion": "four"}, tokenizer=tokenizer, loss_on="all")
    assert spans(everything, tokenizer)[0] == ("<s>", False)


def test_a_token_that_merges_prompt_and_completion_is_trained() -> None:
    tokenizer = tiny_tokenizer()
    alone, both = (tokenizer(t)["input_ids"] for t in ("hel", "hello"))
    assert both[: len(alone)] != alone  # the border is inside a token
    encoded = run({"prompt": "hel", "completion": "lo"}, loss_on="auto")
    text = "".join(t for t, trained in spans(encoded) if trained)
    assert text.endswith("lo</s>") and len(text) > len("lo</s>")


def test_messages_train_the_assistant() -> None:
    encoded = run({"messages": [USER, BOT, USER, BOT]}, template=BUILTIN["alpaca"])
    assert [t for t, trained in spans(encoded) if trained] == ["hello</s>", "hello</s>"]
    everything = run({"messages": [USER, BOT]}, template=BUILTIN["alpaca"], loss_on="all")
    assert len(spans(everything)) == 2 and spans(everything)[0] == ("<s>", False)


def test_conversational_completion_and_assistant_differ_in_earlier_turns() -> None:
    row = {"prompt": [USER, BOT, USER], "completion": [BOT]}
    assert [t for t, trained in spans(run(row, template=BUILTIN["alpaca"])) if trained] == ["hello</s>"]
    assistant = run(row, template=BUILTIN["alpaca"], loss_on="assistant")
    assert [t for t, trained in spans(assistant) if trained] == ["hello</s>", "hello</s>"]


def test_a_tokenizer_that_adds_eos_by_itself_gets_no_second_one() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    ids = run({"text": "hello"}, tokenizer=tokenizer).examples[0].input_ids
    assert (ids == 2).sum() == 1 and ids[-1] == 2
    assert 2 not in encode_prompt("hello", tokenizer)
    pair = run({"prompt": "hi ", "completion": "hello"}, tokenizer=tokenizer)
    assert spans(pair, tokenizer) == [("hi ", False), ("hello</s>", True)]


def test_loss_on_must_fit_the_type() -> None:
    with pytest.raises(
        ConfigError, match="loader.loss_on=completion does not fit language_modeling rows. Allowed: auto, all"
    ):
        run({"text": "a"}, loss_on="completion")
    with pytest.raises(DataError, match="these are preference. Expected columns: text | messages | prompt, completion"):
        run({"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match="needs a chat template with"):
        run({"messages": [USER, BOT]}, template="{{ messages[0].content }}")


LONG = {"prompt": "q", "completion": "the quick brown fox " * 20}


def test_truncation_right_is_counted_and_warned_of() -> None:
    encoded = run({"prompt": "q", "completion": "a"}, LONG, max_length=32)
    assert [len(e) for e in encoded.examples][1] == 32 and encoded.report.truncated == 1
    assert "1 of 2 examples (50.0%) are cut to loader.max_length=32; the longest has" in encoded.report.warnings[0]
    assert any("1 examples cut to max_length (50.0%)" in line for line in encoded.report.lines())


def test_truncation_drop_and_error() -> None:
    encoded = run({"prompt": "q", "completion": "a"}, LONG, max_length=32, truncation="drop")
    assert (
        len(encoded.examples) == 1
        and encoded.report.dropped == 1
        and "1 too long left out" in encoded.report.lines()[0]
    )
    with pytest.raises(
        DataError, match=r"1 of 2 examples \(50.0%\) are longer than loader.max_length=32 .*f.jsonl:2 \(\d+ tokens\)"
    ):
        run({"prompt": "q", "completion": "a"}, LONG, max_length=32, truncation="error")


def test_a_prompt_that_fills_the_row_is_left_out_and_counted() -> None:
    full = {"prompt": "the quick brown fox " * 20, "completion": "a"}
    encoded = run({"prompt": "q", "completion": "a"}, full, max_length=32)
    assert len(encoded.examples) == 1 and encoded.report.zero_trained == 1 and encoded.report.truncated == 0
    assert encoded.examples[0].row == 0
    assert encoded.report.warnings[0].startswith("1 examples have no trained token within max_length and are left out")
    with pytest.raises(
        DataError, match="no token would be trained: of 1 rows 0 are malformed, 0 are longer .* 1 have no trained token"
    ):
        run(full, max_length=32)


def test_eos_never_trained_is_warned_of() -> None:
    assert (
        run(LONG, max_length=32).report.warnings[-1] == "no EOS token is ever trained: the model will not learn to stop"
    )


def test_wrapped_text_makes_every_token_a_target_once() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 9
    whole = run({"text": text}).examples[0]
    pieces = run({"text": text}, max_length=16, wrap=True)
    targets = np.concatenate([e.input_ids[e.weights > 0] for e in pieces.examples])
    np.testing.assert_array_equal(targets, whole.input_ids[1:])
    assert max(len(e) for e in pieces.examples) == 16 and {e.row for e in pieces.examples} == {0}
    assert pieces.report.truncated == 0 and pieces.report.trained_tokens == len(whole) - 1


def test_a_text_that_goes_on_gets_no_eos() -> None:
    encoded = run({"text": "hello", "continues": True}, {"text": "world"})
    assert 2 not in encoded.examples[0].input_ids and encoded.examples[1].input_ids[-1] == 2


def test_rows_the_template_refuses_are_bad_rows() -> None:
    rows = [Row({"messages": m}, f"f:{n}") for n, m in enumerate([[USER, BOT], [BOT], [USER, BOT]], 1)]
    bad = BadRows(1)
    encoded = encode(type_rows(rows), tiny_tokenizer(), Loader(skip_bad=1), template=BUILTIN["alpaca"], bad=bad)
    assert [e.origin for e in encoded.examples] == ["f:1", "f:3"] and encoded.report.skipped_bad == 1
    assert "1 malformed row skipped, the first: f:2: the chat template refuses" in encoded.report.warnings[0]
    with pytest.raises(DataError, match="f:2: the chat template refuses these messages"):
        encode(type_rows(rows), tiny_tokenizer(), Loader(), template=BUILTIN["alpaca"])


def test_preview_joins_to_the_whole_text() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    encoded = run({"prompt": "Grüße 😀 ", "completion": "héllo"}, tokenizer=tokenizer)
    shown = preview(encoded.examples, tokenizer, 5)
    assert len(shown) == 1 and "".join(s.text for s in shown[0].spans) == "<s>Grüße 😀 héllo</s>"
    assert shown[0].trains_eos and shown[0].origin == "f.jsonl:1" and shown[0].tokens > shown[0].trained > 0
