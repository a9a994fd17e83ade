"""Objectives on problems small enough to know the answer: policies and rewards that are tables over K answers of one token."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.data.pairs import PairBatch
from ftjax.objectives.dpo import DPO
from ftjax.objectives.reward_model import RewardModel

K = 5


def all_pairs(reward) -> PairBatch:
    """Every ordered pair of answers, counted by how often Bradley and Terry's judge prefers the first."""
    first, second = (x.ravel() for x in np.meshgrid(np.arange(K), np.arange(K), indexing="ij"))
    first, second = first[first != second], second[first != second]
    tokens = np.stack([np.full((len(first), 2), K), np.stack([first, second], 1)], -1).astype(
        np.int32
    )  # prompt, answer
    shape = tokens.shape
    return PairBatch(
        tokens=jnp.asarray(tokens), positions=jnp.broadcast_to(jnp.arange(2), shape), segments=jnp.zeros(shape, jnp.int32),
        weights=jnp.broadcast_to(jnp.array([0.0, 1.0]), shape), labels=jnp.zeros(len(first)),
        rows=jax.nn.sigmoid(reward[first] - reward[second]),
    )  # fmt: skip


def tabular(logits):
    """A policy whose next token has these logits [K], whatever came before."""
    log_p = jax.nn.log_softmax(logits)

    def nll(targets):
        each = -log_p[jnp.minimum(targets, K - 1)]
        return SimpleNamespace(nll=each, correct=jnp.zeros_like(each))

    return SimpleNamespace(nll=nll)


def minimum(loss, start):
    """Where a smooth function of an array is least."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(x, state):
        value, grad = value_and_grad(x, state=state)
        updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(x, updates), state

    x, state = start, solver.init(start)
    for _ in range(200):
        x, state = step(x, state)
    return x


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_finds_the_reference_tilted_by_the_reward(beta):
    """pi(y) = ref(y) exp(r(y) / beta) / Z (Rafailov et al. 2023, eq. 4), from preferences alone."""
    reward, known = (jax.random.normal(jax.random.key(i), (K,)) for i in (0, 1))
    batch, objective = all_pairs(reward), DPO(beta=beta)
    hyper = {k: jnp.float32(v) for k, v in objective.hyper().items()}

    def loss(logits):
        out = objective(
            lambda inputs, mutable: (tabular(logits), mutable), batch, reference=lambda inputs: tabular(known),
            mutable={}, hyper=hyper,
        )  # fmt: skip
        return out.sums["sigmoid"] / objective.weights(batch)["sigmoid"]

    assert loss(known) == pytest.approx(np.log(2), abs=1e-7)
    found = jax.nn.softmax(minimum(loss, known))
    np.testing.assert_allclose(found, jax.nn.softmax(known + reward / beta), atol=2e-4)


def test_bradley_terry_recovers_the_rewards():
    reward = jax.random.normal(jax.random.key(2), (K,))
    batch, objective = all_pairs(reward), RewardModel(centre=0.01)

    def loss(table):
        def policy(inputs, mutable):
            return SimpleNamespace(logits=table[inputs["input_ids"][:, 1]][:, None]), mutable

        out = objective(policy, batch, reference=None, mutable={}, hyper={})
        weights, factors = objective.weights(batch), {"bradley_terry": 1.0, "centre": 0.0}
        return jnp.stack([factors[k] * v / weights[k] for k, v in out.sums.items()]).sum()

    found = minimum(loss, jnp.zeros(K))
    np.testing.assert_allclose(found - found.mean(), reward - reward.mean(), atol=1e-3)
