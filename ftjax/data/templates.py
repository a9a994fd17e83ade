"""Chat templates: messages to token ids, with a mask over what the assistant wrote, inside a sandbox with limits.

    template = resolve_template(tokenizer, "chatml")    # a built-in name, a .jinja file, Jinja text; "": its own
    chat = render_chats(tokenizer, template, [Chat(messages)], mask=True)[0]
    chat.input_ids, chat.assistant                      # the mask needs {% generation %} markers

A template is code from whoever made the tokenizer. It runs in transformers' Jinja sandbox; time and memory are bounded
here, because a sandbox does not bound them.
"""

from __future__ import annotations

import ctypes
import re
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ftjax.errors import ConfigError, DataError, nearest

MAX_TEMPLATE_CHARS = 200_000
MAX_SECONDS = 20.0  # for one batch of conversations
MAX_GROWTH = 2 << 30  # bytes of address space that rendering a batch may take
MAX_RENDERED_CHARS = 20_000_000  # of one conversation
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_CHECK = """\
{%- set turns = messages[1:] if messages[0].role in ['system', 'developer'] else messages -%}
{%- for m in turns -%}
  {%- if m.role in ['system', 'developer'] -%}{{ raise_exception('a system message must come first') }}{%- endif -%}
  {%- if loop.first and m.role != 'user' -%}
    {{ raise_exception('the first turn must be the user\\'s, not of role ' ~ m.role) }}
  {%- endif -%}
  {%- if m.role == 'user' and loop.previtem is defined and loop.previtem.role == 'user' -%}
    {{ raise_exception('two user turns in a row: user and assistant must alternate') }}
  {%- endif -%}
{%- endfor -%}
"""
_CALLS = """{%- for call in m.tool_calls or [] -%}
      {{- '\\n<tool_call>\\n' ~ ((call.function or call) | tojson) ~ '\\n</tool_call>' -}}
    {%- endfor -%}"""

BUILTIN = {
    "chatml": _CHECK
    + """\
{{- bos_token or '' -}}
{%- if tools -%}{{- '<|im_start|>system\\nTools:\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' ~ m.role ~ '\\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}
    {{- (m.content or '') -}}"""
    + _CALLS
    + """
    {{- '<|im_end|>' -}}
    {%- if eos_token and eos_token != '<|im_end|>' -%}{{- eos_token -}}{%- endif -%}
    {%- endgeneration -%}{{- '\\n' -}}
  {%- else -%}
    {{- m.content ~ '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "alpaca": _CHECK
    + """\
{{- bos_token or '' -}}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '### Response:\\n' -}}{%- generation -%}{{- (m.content or '') -}}"""
    + _CALLS
    + """{{- eos_token or '' -}}{%- endgeneration -%}{{- '\\n\\n' if not loop.last else '' -}}
  {%- elif m.role == 'user' -%}
    {{- '### Instruction:\\n' ~ m.content ~ '\\n\\n' -}}
  {%- else -%}
    {{- ('### Input:\\n' if m.role == 'tool' else '') ~ m.content ~ '\\n\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
""",
}


@dataclass(frozen=True)
class Chat:
    """A conversation to render.

    Attributes:
      messages: ``{"role", "content"}`` dicts.
      tools: JSON schemas of callable tools, or None.
      prompt: end with the header of an assistant turn (for a prompt to be answered).
      origin: place of the row, for messages.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt: bool = False
    origin: str = ""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and, if asked for, 1 where the assistant wrote; or why the template refused it."""

    input_ids: list[int]
    assistant: list[int] | None = None
    refusal: str = ""


def resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str = "") -> str:
    """The Jinja text of the template to use.

    Args:
      tokenizer: whose own template is used when `chat_template` is empty.
      chat_template: a built-in name (see `BUILTIN`), the path of a ``.jinja`` file, or Jinja text.

    Raises:
      ConfigError: no such built-in or file.
      DataError: there is no template at all, or it is too long or not Jinja.
    """
    if not chat_template:
        own = tokenizer.chat_template
        template = own.get("default", "") if isinstance(own, dict) else own
        if not template:
            raise DataError(
                "these rows are conversations, and the tokenizer has no chat template. Set data.chat_template to "
                f"one of {', '.join(BUILTIN)}, to a .jinja file, or use a chat model's tokenizer"
            )
    elif chat_template in BUILTIN:
        template = BUILTIN[chat_template]
    elif "{%" in chat_template or "{{" in chat_template:
        template = chat_template
    elif Path(chat_template).is_file():
        template = Path(chat_template).read_text()
    else:
        near = nearest(chat_template, BUILTIN, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(BUILTIN)
        raise ConfigError(
            f"data.chat_template={chat_template!r} is neither a built-in nor a file.{hint} Built in: {known}"
        )
    if len(template) > MAX_TEMPLATE_CHARS:
        raise DataError(f"the chat template has {len(template):,} characters; the limit is {MAX_TEMPLATE_CHARS:,}")
    return template


def require_markers(template: str) -> None:
    """Raises a `DataError` if the template does not mark what the assistant wrote, naming the ways out."""
    if not MARKERS.search(template):
        raise DataError(
            "loss on assistant turns needs a chat template with {% generation %} ... {% endgeneration %} around them, "
            "and this one has none: every token would be masked. Set loader.loss_on=all, add the markers, or set "
            f"data.chat_template to one of {', '.join(BUILTIN)}"
        )


def render_chats(
    tokenizer: PreTrainedTokenizerBase, template: str, chats: Sequence[Chat], *, mask: bool = False
) -> list[Rendered]:
    """Renders and tokenizes conversations.

    Args:
      tokenizer: a fast tokenizer.
      template: Jinja text.
      chats: conversations; one that the template refuses (roles out of order, ...) comes back with its refusal.
      mask: also mark the assistant's tokens.

    Raises:
      DataError: the template is not Jinja, is blocked by the sandbox, or takes too much time or memory.
    """
    done: list[Rendered | None] = [None] * len(chats)
    for prompt in (False, True):  # one call for all that share the call's arguments
        group = [i for i, c in enumerate(chats) if c.prompt == prompt and not c.tools]
        for i, rendered in zip(group, _render(tokenizer, template, [chats[i] for i in group], mask), strict=True):
            done[i] = rendered
    for i, chat in enumerate(chats):
        if chat.tools:
            done[i] = _render(tokenizer, template, [chat], mask)[0]
    return [r for r in done if r is not None]


def _render(tokenizer: PreTrainedTokenizerBase, template: str, chats: list[Chat], mask: bool) -> list[Rendered]:
    if not chats:
        return []
    try:
        with limits():
            texts, spans = render_jinja_template(
                # as apply_chat_template does: many templates print a null as "None"
                [[{k: v for k, v in m.items() if v is not None} for m in c.messages] for c in chats],
                tools=chats[0].tools,  # type: ignore[arg-type]
                chat_template=template,
                add_generation_prompt=chats[0].prompt,
                return_assistant_tokens_mask=mask,
                **tokenizer.special_tokens_map,  # type: ignore[arg-type]
            )
    except jinja2.exceptions.SecurityError as e:
        raise DataError(f"chat template blocked by sandbox: {e}") from None
    except jinja2.exceptions.TemplateSyntaxError as e:
        raise DataError(f"the chat template is not Jinja: line {e.lineno}: {e.message}") from None
    except LimitExceeded as e:
        raise DataError(f"chat template blocked by sandbox: {e}") from None
    except Exception as e:
        if len(chats) > 1:  # find the row
            return [_render(tokenizer, template, [c], mask)[0] for c in chats]
        kind = "" if isinstance(e, jinja2.exceptions.TemplateError) else f"{type(e).__name__}: "
        return [Rendered([], refusal=f"the chat template refuses these messages: {kind}{e}")]
    longest = max(map(len, texts))
    if longest > MAX_RENDERED_CHARS:
        raise DataError(f"chat template blocked by sandbox: it made {longest:,} characters of one conversation")
    out = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    masks = [_assistant_mask(out, i, spans[i]) if mask else None for i in range(len(chats))]
    return [Rendered(ids, m) for ids, m in zip(out["input_ids"], masks, strict=True)]


def _assistant_mask(out: Any, i: int, spans: Any) -> list[int]:
    """1 for the tokens inside the character spans, by the rule of `apply_chat_template`."""
    mask = [0] * len(out["input_ids"][i])
    for start, stop in spans:
        first, last = out.char_to_token(i, start), out.char_to_token(i, stop - 1)
        if first is not None:
            for t in range(first, last + 1 if last else len(mask)):
                mask[t] = 1
    return mask


class LimitExceeded(Exception):  # noqa: N818 (raised into the rendering thread, with the text set afterwards)
    """Rendering took too long or too much memory."""


@contextmanager
def limits(seconds: float = MAX_SECONDS, growth: int = MAX_GROWTH) -> Iterator[None]:
    """Raises `LimitExceeded` inside the block once it runs too long, or needs more memory than `growth` bytes.

    A watching thread raises on time, so that a loop that never yields is interrupted too, in whatever thread it runs;
    the address-space limit makes one huge string fail at once rather than fill the machine.
    """
    me, lock, over = threading.get_ident(), threading.Lock(), threading.Event()

    def watch() -> None:
        if over.wait(seconds):
            return
        with lock:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), ctypes.py_object(LimitExceeded))

    threading.Thread(target=watch, name="template-limits", daemon=True).start()
    try:
        with _address_space(growth):
            yield
        with lock:  # from here on nothing is raised into this thread
            over.set()
    except LimitExceeded:
        raise LimitExceeded(f"rendering took more than {seconds:g} seconds") from None
    except MemoryError:
        raise LimitExceeded(f"rendering took more than {growth >> 20:,} MiB of memory") from None
    finally:
        over.set()


@contextmanager
def _address_space(growth: int) -> Iterator[None]:
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: only time is bounded
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = size + growth
    if soft == resource.RLIM_INFINITY or bound < soft:
        resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
