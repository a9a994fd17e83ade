"""What the losses on answer pairs share: log-probabilities of answers, and the metrics by TRL's names.

log pi(y | x) = sum over the answer's tokens of log pi(y_t | x, y_<t)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.data.batches import TokenBatch
from ftjax.data.pairs import PairBatch
from ftjax.objectives.base import token_count
from ftjax.objectives.causal_lm import model_inputs, shift

Sums = dict[str, tuple[jax.Array, jax.Array]]


@struct.dataclass
class Answers:
    """Both answers of each pair under one model.

    Attributes:
      token: log-probability of each target [B, 2, T], 0 off the answer.
      mask: 1 at the answer's targets [B, 2, T].
      top: 1 where the target has the largest logit [B, 2, T].
      context: log-probability of every real target, the prompt's included [B, 2, T].
      real: 1 at every real target [B, 2, T].
    """

    token: jax.Array
    mask: jax.Array
    top: jax.Array
    context: jax.Array
    real: jax.Array

    @property
    def sums(self) -> jax.Array:
        """log pi of each answer [B, 2]."""
        return self.token.sum(-1)

    @property
    def lengths(self) -> jax.Array:
        """Tokens of each answer [B, 2], at least 1."""
        return jnp.maximum(self.mask.sum(-1), 1.0)


def flat(batch: PairBatch) -> TokenBatch:
    """The pairs as rows [2 B, T]: chosen and rejected of a pair are neighbours."""
    rows = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.positions, batch.segments, batch.weights))
    return TokenBatch(*rows)


def pair_inputs(batch: PairBatch) -> dict[str, jax.Array]:
    """What a policy is called with: both answers of every pair in one call."""
    return model_inputs(flat(batch))


def answers(output: object, batch: PairBatch) -> Answers:
    """Log-probabilities of a model's output for `pair_inputs(batch)`."""
    rows = flat(batch)
    targets, weights = shift(rows)
    token = output.nll(targets)  # type: ignore[attr-defined]
    shape = batch.tokens.shape
    mask = (weights > 0).astype(jnp.float32)
    everything = TokenBatch(rows.tokens, rows.positions, rows.segments, jnp.ones_like(rows.weights))
    real = jnp.where(rows.segments >= 0, shift(everything)[1], 0.0)
    log_p = -token.nll
    parts = (log_p * mask, mask, token.correct * mask, log_p * real, real)
    return Answers(*(x.reshape(shape) for x in parts))


def reference_log_p(objective: Any, batch: PairBatch, reference: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    """log ref of both answers [B, 2]: as the batch has them, else by the reference; not differentiated.

    Args:
      objective: whose ``log_p(answers)`` says how tokens are counted.
      batch: the pairs.
      reference: a policy; None where the batch knows.
      inputs: `pair_inputs(batch)`.
    """
    known = batch.reference
    return jax.lax.stop_gradient(objective.log_p(answers(reference(inputs), batch)) if known is None else known)


PRECOMPUTE = "Compute the reference's log-probabilities once, before training, and keep them in the cache of the data."


def alone(objective: Any, run: Any) -> Iterator[str]:
    """Lines where `precompute` cannot be honoured: among several tasks, or where gradients are wanted before it."""
    if objective.precompute and objective is not run.objective:
        yield "objective.precompute=True  is for a run with one task: the tasks of multi_task have no pass before training"
    if objective.precompute and getattr(run.peft, "batches_for_start", 0):
        yield (
            f"objective.precompute=True, peft={run.peft.name}  it begins with gradients, before the reference is asked: "
            "set objective.precompute=false"
        )


def answer_mask(batch: PairBatch) -> jax.Array:
    """1 at the answers' targets [B, 2, T], from the batch alone."""
    return (shift(flat(batch))[1] > 0).astype(jnp.float32).reshape(batch.tokens.shape)


def reward_metrics(rewards: jax.Array, log_p: jax.Array, policy: Answers, batch: PairBatch) -> Sums:
    """TRL's metrics of pairs as (sum, weight).

    Args:
      rewards: implied rewards of both answers [B, 2].
      log_p: log-probabilities of both answers, as the loss counts them [B, 2].
      policy: the answers under the policy.
      batch: the pairs.
    """
    n, (good, bad) = batch.rows, jnp.moveaxis(rewards, -1, 0)
    mean = {
        "rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": good - bad,
        "rewards/accuracies": (good > bad).astype(jnp.float32), "logps/chosen": log_p[:, 0], "logps/rejected": log_p[:, 1],
    }  # fmt: skip
    found = {k: ((v * n).sum(), n.sum()) for k, v in mean.items()}
    tokens = policy.mask[:, 0] * n[:, None]
    found["mean_token_accuracy"] = ((policy.top[:, 0] * n[:, None]).sum(), tokens.sum())
    return found | {"num_tokens": token_count(batch.segments)}
