"""Batched decoding with a KV cache: a prefill, then a few tokens per call, each compiled once per shape bucket.

Prompts are padded on the left, so that all rows end at the same column; the columns of padding are in no segment and are
seen by nobody. The cache is donated from call to call and updated in place.
"""

from __future__ import annotations

import dataclasses as dc
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.generate.sampling import Sampling, SamplingArrays, draw
from ftjax.models.base import Decoder
from ftjax.ops import PAD_SEGMENT

STEPS = 8  # tokens per call: between calls the host looks for stop texts, and streams


@struct.dataclass
class Carry:
    """Decoding between two calls.

    Attributes:
      cache: keys and values of all columns so far.
      logits: of the last column, float32 [B, V].
      positions: of the next token [B].
      prompt_len: [B].
      done: rows that have ended [B].
      keys: one per row [B].
    """

    cache: Any
    logits: jax.Array
    positions: jax.Array
    prompt_len: jax.Array
    done: jax.Array
    keys: jax.Array


def bucket(n: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


@partial(jax.jit, static_argnames=("model", "length"))
def prefill(model: Decoder, params: Any, ids: jax.Array, lengths: jax.Array, keys: jax.Array, *, length: int) -> Carry:
    """Reads left-padded prompts [B, P] into a new cache of `length` columns."""
    B, P = ids.shape
    column = jnp.arange(P, dtype=jnp.int32)[None] - (P - lengths)[:, None]
    inputs = {
        "input_ids": ids,
        "positions": jnp.maximum(column, 0),
        "segments": jnp.where(column >= 0, 0, PAD_SEGMENT),
        "prompt_len": jnp.broadcast_to(lengths[:, None], (B, P)),
    }
    out = model.apply(params, inputs, cache=model.new_cache(B, length))
    last = out.head(out.hidden[:, -1]).astype(jnp.float32)
    return Carry(out.cache, last, lengths, lengths, jnp.zeros((B,), bool), keys)


@partial(jax.jit, static_argnames=("model", "greedy"), donate_argnames=("carry",))
def advance(
    model: Decoder, params: Any, carry: Carry, numbers: SamplingArrays, eos: jax.Array, pad: jax.Array, *, greedy: bool
) -> tuple[Carry, jax.Array]:
    """`STEPS` more tokens for every row: (carry, tokens [B, STEPS]); rows that have ended give `pad`."""

    def one(c: Carry, _: None) -> tuple[Carry, jax.Array]:
        if greedy:
            token = jnp.argmax(c.logits, axis=-1).astype(jnp.int32)
        else:
            token = draw(c.logits, jax.vmap(jax.random.fold_in)(c.keys, c.positions), numbers)
        token = jnp.where(c.done, pad, token)
        done = c.done | (token[:, None] == eos[None]).any(-1)
        inputs = {
            "input_ids": token[:, None],
            "positions": c.positions[:, None],
            "segments": jnp.zeros_like(token)[:, None],
            "prompt_len": c.prompt_len[:, None],
        }
        out = model.apply(params, inputs, cache=c.cache, first=False)
        logits = out.head(out.hidden[:, -1]).astype(jnp.float32)
        return dc.replace(c, cache=out.cache, logits=logits, positions=c.positions + 1, done=done), token

    carry, tokens = jax.lax.scan(one, carry, length=STEPS)
    return carry, tokens.T


def row_keys(prompts: Sequence[np.ndarray], seed: int) -> jax.Array:
    """One key per prompt, from its tokens and how often it came before: a row's draws do not depend on its batch."""
    seen: Counter[int] = Counter()
    folds = []
    for prompt in prompts:
        content = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        folds.append((content, seen[content]))
        seen[content] += 1
    words = jnp.asarray(np.array(folds, np.uint32))
    base = jax.random.key(seed)
    return jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(base, w[0]), w[1]))(words)


def decode(
    model: Decoder, params: Any, prompts: Sequence[np.ndarray], sampling: Sampling, *, eos: Sequence[int], pad: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Answers to token prompts, a few tokens at a time.

    Args:
      model: a decoder.
      params: with adapters in place.
      prompts: token ids, each at least one.
      sampling: how; the stop texts are the caller's.
      eos: ids that end a row.
      pad: id given by rows that have ended.

    Yields:
      (tokens [B, n], done [B]); the tokens add up to at most `max_new_tokens` columns, less when all rows have ended.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = bucket(int(lengths.max()))
    ids = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    room = bucket(sampling.max_new_tokens)
    carry = prefill(model, params, ids, lengths, row_keys(prompts, sampling.seed), length=width + room)
    numbers, ends = SamplingArrays.of(sampling), jnp.asarray(list(eos) or [-1], jnp.int32)
    for start in range(0, sampling.max_new_tokens, STEPS):
        greedy = sampling.temperature == 0
        carry, tokens = advance(model, params, carry, numbers, ends, jnp.int32(pad), greedy=greedy)
        done = np.asarray(carry.done)
        yield np.asarray(tokens)[:, : sampling.max_new_tokens - start], done
        if done.all():
            return
