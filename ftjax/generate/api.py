"""Text in, text out: batches of prompts, or one prompt streamed.

generate(model, params, tokenizer, ["Once upon a time"], max_new_tokens=80)      # [", there was ..."]
for piece in stream(model, params, tokenizer, "Once upon a time", Sampling(temperature=0.8)): print(piece, end="")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ftjax.errors import DataError
from ftjax.generate.decode import decode
from ftjax.generate.sampling import Sampling
from ftjax.models.base import Decoder
from ftjax.params import Store


def generate(
    model: Decoder,
    params: Store,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """Continues each prompt; see `Sampling` for the options.

    Returns:
      The continuations alone, without special tokens, ended before the first stop text.

    Raises:
      DataError: a prompt is empty or leaves no room in the model's context.
      ConfigError: an option is out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, tuple(stop), seed)
    ids = [prompt_ids(tokenizer, p) for p in prompts]
    answers = generate_ids(model, params, tokenizer, ids, sampling)
    return [completion(tokenizer, p, a, sampling.stop) for p, a in zip(ids, answers, strict=True)]


def generate_ids(
    model: Decoder, params: Store, tokenizer: Any, prompts: Sequence[np.ndarray], sampling: Sampling
) -> list[list[int]]:
    """Token ids that continue each prompt, without the one that ends them."""
    if not len(prompts):
        return []
    sampling = _fit(model, prompts, sampling)
    ends, pad = eos_ids(model, tokenizer), pad_id(tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for tokens, _ in decode(model, params, prompts, sampling, eos=ends, pad=pad):
        for i, row in enumerate(tokens.tolist()):
            stopped[i] = stopped[i] or _take(answers[i], row, ends)
            if not stopped[i] and sampling.stop:
                stopped[i] = any(s in completion(tokenizer, prompts[i], answers[i]) for s in sampling.stop)
        if all(stopped):
            break
    return answers


def stream(model: Decoder, params: Store, tokenizer: Any, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The continuation of one prompt in pieces that never split a character, nor show the beginning of a stop text."""
    ids = prompt_ids(tokenizer, prompt)
    sampling = _fit(model, [ids], sampling)
    ends, answer, given = eos_ids(model, tokenizer), [], 0
    for tokens, _ in decode(model, params, [ids], sampling, eos=ends, pad=pad_id(tokenizer)):
        over = _take(answer, tokens[0].tolist(), ends)
        text = completion(tokenizer, ids, answer)
        cut = completion(tokenizer, ids, answer, sampling.stop)
        if len(cut) < len(text):
            yield cut[given:]
            return
        safe = len(text) if over else _settled(text, sampling.stop)
        if safe > given:
            yield text[given:safe]
            given = safe
        if over:
            return
    yield completion(tokenizer, ids, answer)[given:]


def completion(
    tokenizer: Any, prompt: Sequence[int] | np.ndarray, answer: Sequence[int], stop: Sequence[str] = ()
) -> str:
    """The text that `answer` adds to `prompt`: decoded together, because alone it loses its first space."""
    head = [int(t) for t in prompt]
    before = tokenizer.decode(head, skip_special_tokens=True)
    text = tokenizer.decode([*head, *answer], skip_special_tokens=True)[len(before) :]
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def prompt_ids(tokenizer: Any, prompt: str) -> np.ndarray:
    """Token ids of a prompt, as the tokenizer begins a text, without an end.

    Raises:
      DataError: nothing is left to start from.
    """
    ids = list(tokenizer(prompt).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise DataError("the prompt is empty, and the tokenizer has no token to begin a text with")
    return np.asarray(ids, np.int32)


def eos_ids(model: Decoder, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's and those of the model's config."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return sorted({*own, *model.config.eos_token_id})


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows."""
    return int(tokenizer.pad_token_id or 0)


def _take(answer: list[int], row: Sequence[int], ends: Sequence[int]) -> bool:
    """Appends tokens up to an end; whether there was one."""
    for token in row:
        if token in ends:
            return True
        answer.append(token)
    return False


def _settled(text: str, stop: Sequence[str]) -> int:
    """How much of a growing text is final: no half character at its end, no beginning of a stop text."""
    end = len(text.rstrip("\ufffd"))
    for s in stop:
        for n in range(min(len(s) - 1, end), 0, -1):
            if text[:end].endswith(s[:n]):
                end -= n
                break
    return end


def _fit(model: Decoder, prompts: Sequence[np.ndarray], sampling: Sampling) -> Sampling:
    """Clips the answer to the model's context.

    Raises:
      DataError: a prompt fills it.
    """
    context, longest = model.config.max_position_embeddings, max(len(p) for p in prompts)
    if longest >= context:
        raise DataError(f"the prompt has {longest} tokens, the model's context {context}: no room for an answer")
    if longest + sampling.max_new_tokens <= context:
        return sampling
    room = context - longest
    text = (
        f"prompt of {longest} + {sampling.max_new_tokens} new tokens exceed the context of {context}: {room} new tokens"
    )
    warnings.warn(text, stacklevel=3)
    return Sampling(room, sampling.temperature, sampling.top_k, sampling.top_p, sampling.stop, sampling.seed)
