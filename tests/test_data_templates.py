"""Chat templates: masks over the assistant's tokens, and every way a template can be wrong or hostile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ftjax.data import templates
from ftjax.data.templates import BUILTIN, Chat, LimitExceeded, limits, render_chats, require_markers, resolve_template
from ftjax.errors import ConfigError, DataError
from tests.test_data_helpers import tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


def trained_text(tokenizer: Any, rendered: templates.Rendered) -> str:
    assert rendered.assistant is not None
    return tokenizer.decode([i for i, m in zip(rendered.input_ids, rendered.assistant, strict=True) if m])


CHATML = """<s><|im_start|>system
Be kind.<|im_end|>
<|im_start|>user
hi<|im_end|>
<|im_start|>assistant
hello<|im_end|></s>
<|im_start|>user
and?<|im_end|>
<|im_start|>assistant
bye<|im_end|></s>
"""
ALPACA = """<s>Be kind.

### Instruction:
hi

### Response:
hello</s>

### Instruction:
and?

### Response:
bye</s>"""


@pytest.mark.parametrize(
    ("name", "text", "trained"),
    [("chatml", CHATML, "hello<|im_end|></s>bye<|im_end|></s>"), ("alpaca", ALPACA, "hello</s>bye</s>")],
)
def test_builtin_templates_train_the_assistant_and_its_end(name: str, text: str, trained: str) -> None:
    tokenizer = tiny_tokenizer()
    rendered = render_chats(tokenizer, BUILTIN[name], [Chat(CHAT)], mask=True)[0]
    assert tokenizer.decode(rendered.input_ids) == text
    assert trained_text(tokenizer, rendered) == trained
    prompt = render_chats(tokenizer, BUILTIN[name], [Chat(CHAT[:2], prompt=True)])[0]
    assert rendered.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_masks_agree_with_transformers() -> None:
    tokenizer = tiny_tokenizer()
    chats = [
        CHAT,
        CHAT[1:3],
        [*CHAT[:2], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
    ]
    want = tokenizer.apply_chat_template(
        chats, chat_template=BUILTIN["chatml"], return_assistant_tokens_mask=True, return_dict=True
    )
    got = render_chats(tokenizer, BUILTIN["chatml"], [Chat(c) for c in chats], mask=True)
    assert [r.input_ids for r in got] == want["input_ids"]
    assert [r.assistant for r in got] == want["assistant_masks"]


def test_tools_are_rendered_per_row() -> None:
    tokenizer = tiny_tokenizer()
    with_tools, without = render_chats(tokenizer, BUILTIN["chatml"], [Chat(CHAT, [{"name": "add"}]), Chat(CHAT)])
    assert '[{"name": "add"}]' in tokenizer.decode(with_tools.input_ids)
    assert "add" not in tokenizer.decode(without.input_ids)


def test_which_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="has no chat template. Set data.chat_template to one of chatml, alpaca"):
        resolve_template(tokenizer)
    with pytest.raises(ConfigError, match="'chtml' is neither a built-in nor a file. Did you mean 'chatml'?"):
        resolve_template(tokenizer, "chtml")
    (tmp_path / "a.jinja").write_text("{{ messages }}")
    assert resolve_template(tokenizer, str(tmp_path / "a.jinja")) == "{{ messages }}"
    assert resolve_template(tokenizer, "{{ bos_token }}") == "{{ bos_token }}"
    tokenizer.chat_template = "{{ 'own' }}"
    assert resolve_template(tokenizer) == "{{ 'own' }}"
    with pytest.raises(DataError, match="has 300,000 characters; the limit is 200,000"):
        resolve_template(tokenizer, "{{ x }}".ljust(300_000))


def test_no_markers_names_the_fixes() -> None:
    with pytest.raises(
        DataError, match=r"needs a chat template with \{% generation %\}.*Set loader.loss_on=all.*data.chat_template"
    ):
        require_markers("{% for m in messages %}{{ m.content }}{% endfor %}")
    for template in BUILTIN.values():
        require_markers(template)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (CHAT[2:], "the first turn must be the user's, not of role assistant"),
        ([CHAT[1], CHAT[1]], "two user turns in a row"),
        ([CHAT[1], CHAT[0]], "a system message must come first"),
    ],
)
def test_roles_out_of_order_are_refused_per_row(messages: list, text: str) -> None:
    good, refused = render_chats(tiny_tokenizer(), BUILTIN["chatml"], [Chat(CHAT), Chat(messages)])
    assert good.input_ids and not good.refusal
    assert refused.refusal.startswith("the chat template refuses these messages: ") and text in refused.refusal


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
    ],
)
def test_hostile_templates_are_blocked(template: str) -> None:
    with pytest.raises(DataError, match="chat template blocked by sandbox: "):
        render_chats(tiny_tokenizer(), template, [Chat(CHAT)])


def test_endless_and_huge_templates_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(limits.__wrapped__, "__defaults__", (0.3, 1 << 30))  # type: ignore[attr-defined]
    start = time.monotonic()
    with pytest.raises(DataError, match="blocked by sandbox: rendering took more than 0.3 seconds"):
        render_chats(tiny_tokenizer(), loop, [Chat(CHAT)])
    assert time.monotonic() - start < 10
    monkeypatch.setattr(limits.__wrapped__, "__defaults__", (60.0, 1 << 30))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="blocked by sandbox: rendering took more than 1,024 MiB of memory"):
        render_chats(tiny_tokenizer(), "{{ 'a' * (messages | length) * 300000000 }}", [Chat(CHAT)])
    monkeypatch.setattr(templates, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(DataError, match="blocked by sandbox: it made 5,000 characters of one conversation"):
        render_chats(tiny_tokenizer(), "{{ 'a' * 1000 * (messages | length) }}", [Chat(CHAT)])


def test_limits_leave_no_trace() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with limits(0.2):
        pass
    time.sleep(0.4)  # a late exception would land here
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(LimitExceeded), limits(0.1):
        while True:
            pass


def test_not_jinja_names_the_line() -> None:
    with pytest.raises(DataError, match=r"the chat template is not Jinja: line 2: "):
        render_chats(tiny_tokenizer(), "{{ 1 }}\n{% for %}", [Chat(CHAT)])


def test_a_template_that_fails_is_a_refusal_with_its_kind() -> None:
    refused = render_chats(tiny_tokenizer(), "{{ 1 // 0 }}", [Chat(CHAT)])[0]
    assert (
        refused.refusal
        == "the chat template refuses these messages: ZeroDivisionError: integer division or modulo by zero"
    )
