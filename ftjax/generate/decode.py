"""Batched decoding with a KV cache: a prefill, then up to `CHUNK` tokens per call, each compiled once per shape bucket.

for new in decode(model, params, [prompt_a, prompt_b], Sampling(), limits=[64, 64], eos=[2], pad=0):
    new                      # [[319, 278], [29871]]: tokens that continue each row

Prompts are padded on the left, so that all rows end at the same column; the columns of padding are in no segment and are
seen by nobody. The cache is donated from call to call and updated in place.
"""

from __future__ import annotations

import dataclasses as dc
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.generate.sampling import Sampling, SamplingArrays, draw
from ftjax.models.base import Output
from ftjax.params import nest

CHUNK = 64  # most tokens per call; fewer where the host looks at the text in between


class Speaker(Protocol):
    """A model that answers: a `Decoder`, or one that reads the prompt apart (T5)."""

    reads_apart: ClassVar[bool]

    @property
    def config(self) -> Any: ...
    @property
    def context(self) -> int | None: ...
    def before(self, lengths: np.ndarray) -> np.ndarray: ...
    def begin(self, params: Any, ids: jax.Array, lengths: jax.Array, *, room: int, soft: int) -> Output: ...
    def enter(self, p: dict[str, Any], inputs: dict[str, jax.Array], *, first: bool) -> Any: ...
    def apply(self, params: Any, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True) -> Output: ...


@struct.dataclass
class Rows:
    """What stays the same while a batch is decoded.

    Attributes:
      lengths: tokens before the first of each answer [B].
      limits: most new tokens [B].
      keys: one per row [B].
    """

    lengths: jax.Array
    limits: jax.Array
    keys: jax.Array


@struct.dataclass
class Rules:
    """How tokens are chosen: `numbers` None is greedy; ids `eos` [E] end a row; `pad` is what ended rows give."""

    numbers: SamplingArrays | None
    eos: jax.Array
    pad: jax.Array

    def choose(self, logits: jax.Array, rows: Rows, count: jax.Array) -> jax.Array:
        """The new token number `count` of each row [B]. Its draw depends on the row's key and the token's position."""
        if self.numbers is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return draw(logits, jax.vmap(jax.random.fold_in)(rows.keys, rows.lengths + count), self.numbers)

    def ended(self, token: jax.Array, rows: Rows, count: jax.Array) -> jax.Array:
        """Rows that give nothing after `token`, their `count`-th [B]."""
        return (token[:, None] == self.eos).any(-1) | (count >= rows.limits)


@struct.dataclass
class Carry:
    """Decoding between two tokens.

    Attributes:
      cache: keys and values of all columns but the last token's.
      token: the last token [B].
      count: new tokens so far.
      done: rows that have ended [B].
    """

    cache: Any
    token: jax.Array
    count: jax.Array
    done: jax.Array


def bucket(n: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


def soft_columns(model: Speaker, params: Any) -> int:
    """Columns that a soft prompt in `params` puts in front of the tokens."""
    one = {"input_ids": jax.ShapeDtypeStruct((1, 1), jnp.int32)}
    return jax.eval_shape(lambda p, x: model.enter(nest(p), x, first=True).positions, params, one).shape[1] - 1


@partial(jax.jit, static_argnames=("model", "room"))
def prefill(
    model: Speaker, params: Any, ids: jax.Array, lengths: jax.Array, rows: Rows, rules: Rules, *, room: int
) -> Carry:
    """Reads left-padded prompts [B, P] of `lengths` [B] into a new cache, and gives the first of up to `room` tokens."""
    out = model.begin(params, ids, lengths, room=room, soft=soft_columns(model, params))
    token = rules.choose(out.head(out.hidden[:, -1]).astype(jnp.float32), rows, jnp.int32(0))
    return Carry(out.cache, token, jnp.int32(1), rules.ended(token, rows, jnp.int32(1)))


@partial(jax.jit, static_argnames=("model",), donate_argnames=("carry",))
def advance(
    model: Speaker, params: Any, carry: Carry, rows: Rows, rules: Rules, steps: jax.Array
) -> tuple[Carry, jax.Array]:
    """Up to `steps` (at most CHUNK) more tokens for every row, less where all rows have ended.

    Returns:
      (carry, tokens [B, CHUNK]); the first ``carry.count - count before`` columns of the tokens hold something.
    """
    before = carry.count

    def step(state: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        c, tokens = state
        inputs = {
            "input_ids": c.token[:, None],
            "positions": (rows.lengths + c.count - 1)[:, None],
            "segments": jnp.zeros_like(c.token)[:, None],
            "prompt_len": rows.lengths[:, None],
        }
        out = model.apply(params, inputs, cache=c.cache, first=False)
        token = rules.choose(out.head(out.hidden[:, -1]).astype(jnp.float32), rows, c.count)
        token = jnp.where(c.done, rules.pad, token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (jnp.int32(0), c.count - before))
        done = c.done | rules.ended(token, rows, c.count + 1)
        return dc.replace(c, cache=out.cache, token=token, count=c.count + 1, done=done), tokens

    def more(state: tuple[Carry, jax.Array]) -> jax.Array:
        return (state[0].count - before < steps) & ~state[0].done.all()

    blank = jnp.full((carry.token.shape[0], CHUNK), rules.pad, jnp.int32)
    return jax.lax.while_loop(more, step, (carry, blank))


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
    model: Speaker,
    params: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    limits: Sequence[int],
    eos: Sequence[int],
    pad: int,
    every: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """Answers to token prompts, piece by piece: first one token, then up to `every`, until all rows have ended.

    Args:
      model: a decoder, or an encoder with one.
      params: with adapters in place.
      prompts: token ids, each at least one.
      sampling: how to choose; its `max_new_tokens` and stop texts are the caller's business.
      limits: most new tokens of each row.
      eos: ids that end a row.
      pad: id that fills rows on the device.
      every: tokens per call, at most CHUNK.

    Yields:
      The new tokens of each row, without the one that ends it.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = bucket(int(lengths.max()))
    ids = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    numbers = SamplingArrays.of(sampling) if sampling.temperature > 0 else None
    rules = Rules(numbers, jnp.asarray(list(eos) or [-1], jnp.int32), jnp.int32(pad))
    rows = Rows(jnp.asarray(model.before(lengths)), jnp.asarray(limits, jnp.int32), row_keys(prompts, sampling.seed))

    carry = prefill(model, params, ids, lengths, rows, rules, room=bucket(max(limits)))
    piece, count = np.asarray(carry.token)[:, None], 1
    open_, left = [True] * len(prompts), list(limits)
    while True:
        new = [_taken(row, n, eos) if going else [] for row, n, going in zip(piece.tolist(), left, open_, strict=True)]
        left = [n - len(row) for n, row in zip(left, new, strict=True)]
        open_ = [a and len(row) == piece.shape[1] and n > 0 for a, row, n in zip(open_, new, left, strict=True)]
        yield new
        if not any(open_):
            return
        carry, tokens = advance(model, params, carry, rows, rules, jnp.int32(every))
        now = int(carry.count)
        piece, count = np.asarray(tokens)[:, : now - count], now


def _taken(row: Sequence[int], limit: int, eos: Sequence[int]) -> list[int]:
    """The tokens of a row up to its end."""
    end = next((i for i, token in enumerate(row) if token in eos), len(row))
    return list(row[: min(end, limit)])
