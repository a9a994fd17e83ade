"""Text in, text out: batches of prompts, or one prompt streamed.

generate(model, params, tokenizer, ["Once upon a time"], max_new_tokens=80)      # [", there was ..."]
for piece in stream(model, params, tokenizer, "Once upon a time", Sampling(temperature=0.8)): print(piece, end="")
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ftjax.data.encode import encode_prompt
from ftjax.errors import ConfigError, DataError
from ftjax.generate.decode import CHUNK, Speaker, decode, soft_columns
from ftjax.generate.sampling import Sampling
from ftjax.params import Store

LOOK = 16  # tokens between two looks for stop texts
FLOW = 4  # tokens between two pieces of a stream
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def generate(
    model: Speaker,
    params: Store,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    min_p: float = 0.0,
) -> list[str]:
    """Continues each prompt; see `Sampling` for the options. An answer does not depend on the rest of the batch.

    Args:
      model: a decoder, or an encoder with one.
      params: its weights, adapters in place.
      tokenizer: of transformers; begins the prompt as it begins every text.
      prompts: texts. Equal ones are drawn independently.
      max_new_tokens, temperature, top_k, top_p, stop, seed, min_p: as in `Sampling`.

    Returns:
      The continuations alone, without special tokens, ended before the first stop text.

    Raises:
      DataError: a prompt is empty or leaves no room in the model's context.
      ConfigError: options out of range.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts={prompts[:40]!r}: expected a list of texts, got one text. Write [text]")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, stops, seed, min_p)
    ids = [prompt_ids(tokenizer, p, end=model.reads_apart) for p in prompts]
    answers = generate_ids(model, params, tokenizer, ids, sampling)
    return [completion(tokenizer, continued(model, p), a, stops) for p, a in zip(ids, answers, strict=True)]


def continued(model: Speaker, prompt: np.ndarray) -> Sequence[int] | np.ndarray:
    """The tokens that an answer goes on from: the prompt's, unless an encoder reads that apart."""
    return () if model.reads_apart else prompt


def generate_ids(
    model: Speaker, params: Store, tokenizer: Any, prompts: Sequence[np.ndarray], sampling: Sampling
) -> list[list[int]]:
    """Token ids that continue each prompt: without the EOS that ends them, and up to the token that completes a stop text.

    Raises:
      DataError: a prompt leaves no room in the model's context.
    """
    if not len(prompts):
        return []
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for new in _decode(model, params, tokenizer, prompts, sampling, every=LOOK if sampling.stop else CHUNK):
        for i, tokens in enumerate(new):
            if stopped[i] or not tokens:
                continue
            answers[i] += tokens
            if sampling.stop and _stops(
                tokenizer, continued(model, prompts[i]), _whole(tokenizer, answers[i]), sampling.stop
            ):
                stopped[i] = True
                while _stops(tokenizer, continued(model, prompts[i]), answers[i][:-1], sampling.stop):
                    answers[i].pop()
        if all(stopped):
            break
    return answers


def stream(model: Speaker, params: Store, tokenizer: Any, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The continuation of one prompt, piece by piece; joined, the pieces are what `generate` returns.

    A piece never splits a character or a run of byte tokens, nor shows the beginning of a stop text.

    Raises:
      DataError: the prompt is empty or leaves no room in the model's context.
    """
    ids, stop = prompt_ids(tokenizer, prompt, end=model.reads_apart), sampling.stop
    before = continued(model, ids)
    answer: list[int] = []
    given = 0
    for new in _decode(model, params, tokenizer, [ids], sampling, every=FLOW):
        answer += new[0]
        text = completion(tokenizer, before, _whole(tokenizer, answer))
        if any(s in text for s in stop):
            break
        safe = len(text.rstrip("\ufffd"))
        safe -= _beginning(text[:safe], stop)
        if safe > given:
            yield text[given:safe]
            given = safe
    if rest := completion(tokenizer, before, answer, stop)[given:]:
        yield rest


def completion(
    tokenizer: Any, prompt: Sequence[int] | np.ndarray, answer: Sequence[int], stop: Sequence[str] = ()
) -> str:
    """The text that `answer` adds to `prompt`: decoded together, because alone it loses its first space.

    Args:
      tokenizer: of transformers.
      prompt: its token ids.
      answer: the token ids after it.
      stop: the text ends before the first of these to be complete.
    """
    head = [int(t) for t in prompt]
    before, text = (
        # Cleaning up spaces would change text that was already given away.
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (head, [*head, *answer])
    )
    text = text[len(before) :]
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)[1]] if found else text


def prompt_ids(tokenizer: Any, prompt: str, *, end: bool = False) -> np.ndarray:
    """Token ids of a prompt, begun as the tokenizer begins a text and, where `end` is false, without an end, int32 [n].

    Raises:
      DataError: nothing is left to start from.
    """
    ids = encode_prompt(prompt, tokenizer, end=end)
    if not len(ids) and tokenizer.bos_token_id is not None:
        ids = np.array([tokenizer.bos_token_id], np.int32)
    if not len(ids):
        raise DataError("the prompt is empty, and the tokenizer has no BOS token to begin a text with")
    return ids


def eos_ids(model: Speaker, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's and those of the model's config."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return sorted({*own, *model.config.eos_token_id})


def _decode(
    model: Speaker, params: Store, tokenizer: Any, prompts: Sequence[np.ndarray], sampling: Sampling, *, every: int
) -> Iterator[list[list[int]]]:
    limits = _limits(model, params, prompts, sampling.max_new_tokens)
    ends, pad = eos_ids(model, tokenizer), int(tokenizer.pad_token_id or 0)
    return decode(model, params, prompts, sampling, limits=limits, eos=ends, pad=pad, every=every)


def _limits(model: Speaker, params: Store, prompts: Sequence[np.ndarray], wanted: int) -> list[int]:
    """Most new tokens per prompt, within the model's context; warns where that is less than wanted.

    Raises:
      DataError: a prompt fills the context.
    """
    # A prefix has no columns of its own, but the tokens' positions begin behind it all the same.
    soft = max(soft_columns(model, params), getattr(params.get("input/tap"), "shift", 0))
    size = model.context
    if size is None:
        return [wanted] * len(prompts)
    context = f"the model's context of {size}" + (f" less {soft} for the soft prompt" if soft else "")
    room = [size - soft - len(p) for p in prompts]
    tightest = min(range(len(prompts)), key=room.__getitem__)
    which = f"prompt {tightest + 1} of {len(prompts)}: {len(prompts[tightest])} tokens"
    if room[tightest] < 1:
        raise DataError(f"{which} leave no room for an answer in {context}")
    if (short := sum(r < wanted for r in room)) > 0:
        more = f" ({short} prompts are too long for {wanted}; this is the longest)" if short > 1 else ""
        text = f"{which} + {wanted} new ones exceed {context}: its answer ends after {room[tightest]}{more}"
        warnings.warn(text, stacklevel=4)
    return [min(wanted, r) for r in room]


def _stops(tokenizer: Any, prompt: Sequence[int] | np.ndarray, answer: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the answer's text holds a stop text."""
    return any(s in completion(tokenizer, prompt, answer) for s in stop)


def _beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that could be the beginning of a stop text."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def _whole(tokenizer: Any, answer: Sequence[int]) -> Sequence[int]:
    """The answer without the run of byte tokens at its end: one wrong byte to come would change the text of them all."""
    n = len(answer)
    while n and _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(int(answer[n - 1])))):
        n -= 1
    return answer[:n]
