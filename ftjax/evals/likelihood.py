"""Log-likelihoods of continuations: how probable a model finds given answers.

    log p(y | x) = sum_t log softmax(z_t)[y_t],  with z_t after x and y_1 .. y_{t-1}

    found = likelihoods(model, params, [([1, 5, 7], [9, 2])])
    found[0].logprob, found[0].greedy            # -11.3, False

Pairs are sorted by length and padded to powers of two, a fixed number of rows at a time, so that few programs are compiled.
What is too long for the model's context loses its beginning, as in lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import ConfigError, DataError
from ftjax.generate.decode import bucket, soft_columns
from ftjax.ops import PAD_SEGMENT
from ftjax.params import Store

UNBOUNDED = 2048  # tokens where a model's context has no end, as in lm-evaluation-harness


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation, and whether greedy decoding would give it."""

    logprob: float
    greedy: bool


def room_of(model: Any, params: Store) -> int:
    """Tokens that the model reads at most, a soft prompt's columns aside."""
    if model.context is None:
        return UNBOUNDED
    return model.context - max(soft_columns(model, params), getattr(params.get("input/tap"), "shift", 0))


def likelihoods(
    model: Any,
    params: Store,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int = 8,
    room: int | None = None,
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context.

    Args:
      model: a decoder, or an encoder with one (which reads the context).
      params: its weights, adapters in place.
      pairs: (context, continuation) as token ids; of a decoder the context has at least one.
      batch: rows per call.
      room: tokens that the model reads at most; None: its context.

    Returns:
      One per pair, in their order.

    Raises:
      ConfigError: the model does not speak.
      DataError: a context or a continuation is empty, or a continuation does not fit into the model.
    """
    if model.head.kind not in ("causal_lm", "seq2seq_lm"):
        raise ConfigError(f"log-likelihoods of texts need a language model; the head of this one is {model.head.kind}")
    room = room_of(model, params) if room is None else room
    for i, (context, answer) in enumerate(pairs, 1):
        if not len(answer) or not (len(context) or model.reads_apart):
            raise DataError(f"pair {i} of {len(pairs)}: {'continuation' if not len(answer) else 'context'} is empty")
        if len(answer) > room:
            raise DataError(
                f"pair {i} of {len(pairs)}: a continuation of {len(answer)} tokens does not fit into {room}"
            )
    score = _apart if model.reads_apart else _continued
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    out: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        some = [pairs[i] for i in chosen] + [pairs[chosen[-1]]] * (batch - len(chosen))
        sums, greedy = jax.device_get(score(model, params, some, room))
        for i, total, all_right in zip(chosen, sums.tolist(), greedy.tolist(), strict=False):
            out[i] = Likelihood(total, all_right)
    return out


# Answers that continue the context ----------------------------------------------------------------------------------------


def _continued(model: Any, params: Store, pairs: Sequence[Any], room: int) -> Any:
    rows = [np.asarray([*c, *a][-(room + 1) :], np.int32) for c, a in pairs]
    lengths = np.array([len(r) for r in rows], np.int32)
    starts = lengths - np.array([len(a) for _, a in pairs], np.int32)
    width = min(bucket(int(lengths.max()) - 1), room)
    return _sums(model, params, _padded(rows, width + 1), lengths, starts)


@partial(jax.jit, static_argnames=("model",))
def _sums(model: Any, params: Store, ids: jax.Array, lengths: jax.Array, starts: jax.Array) -> Any:
    """ids [B, T + 1] of `lengths` [B], of which those from `starts` [B] on are scored."""
    at = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1, dtype=jnp.int32)[None], (ids.shape[0], ids.shape[1] - 1))
    real = at + 1 < lengths[:, None]  # the last token is only predicted
    inputs = {
        "input_ids": ids[:, :-1],
        "positions": jnp.where(real, at, 0),
        "segments": jnp.where(real, 0, PAD_SEGMENT),
        "prompt_len": jnp.broadcast_to(starts[:, None], at.shape),
    }
    out = model.apply(params, inputs).nll(ids[:, 1:])
    return _summed(out, real & (at + 1 >= starts[:, None]))


# Answers of a decoder whose encoder reads the context ---------------------------------------------------------------------


def _apart(model: Any, params: Store, pairs: Sequence[Any], room: int) -> Any:
    sources = [np.asarray(c[-room:], np.int32) for c, _ in pairs]
    answers = [np.asarray(a, np.int32) for _, a in pairs]
    lengths = [np.array([len(r) for r in rows], np.int32) for rows in (sources, answers)]
    widths = [bucket(max(1, int(n.max()))) for n in lengths]
    return _sums_apart(model, params, _padded(sources, widths[0]), lengths[0], _padded(answers, widths[1]), lengths[1])


@partial(jax.jit, static_argnames=("model",))
def _sums_apart(
    model: Any, params: Store, ids: jax.Array, lengths: jax.Array, answers: jax.Array, sizes: jax.Array
) -> Any:
    real, said = (
        jnp.arange(x.shape[1], dtype=jnp.int32)[None] < n[:, None] for x, n in ((ids, lengths), (answers, sizes))
    )
    inputs = {"input_ids": ids, "attention_mask": real.astype(jnp.int32), "labels": answers}
    return _summed(model.apply(params, inputs).nll(answers), said)


def _summed(out: Any, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    right = (out.correct > 0) | ~counted
    return -jnp.where(counted, out.nll, 0.0).sum(1), right.all(1)


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = np.zeros((len(rows), width), np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
