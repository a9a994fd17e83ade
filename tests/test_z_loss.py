"""The z-loss through the chunked vocabulary loss: values and gradients of full logits, as a term with its own coefficient."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.config import Run
from ftjax.kernels.vocab_loss import token_nll
from ftjax.models.base import Head
from ftjax.objectives.causal_lm import CausalLM, shift
from ftjax.objectives.dft import DFT
from ftjax.objectives.distill import DistillCausalLM
from ftjax.objectives.seq2seq import Seq2Seq
from tests import tiny, tinymodels

B, T, D, V = 3, 11, 8, 40


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(0)
    hidden, w = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((B, T, D), (D, V)))
    weights = jnp.asarray(draw.random((2, B, T)), jnp.float32)
    return w, hidden, jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32), weights


@pytest.mark.parametrize("trained", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize("chunk", [0, 9])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_are_those_of_full_logits(arrays, trained, chunk, smoothing):
    w, hidden, targets, (a, b) = arrays

    def plain(w, h):
        z = h @ w
        lse, log_p = jax.nn.logsumexp(z, -1), jax.nn.log_softmax(z)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return (((1 - smoothing) * nll - smoothing * log_p.mean(-1)) * a).sum() + (lse**2 * b).sum()

    def ours(w, h):
        token = token_nll(Head(w, False), h, targets, smoothing=smoothing, chunk=chunk, lse=True)
        assert token.lse is not None
        return (token.nll * a).sum() + (token.lse**2 * b).sum()

    which = (0, 1) if trained else 1
    want, got = (jax.jit(jax.value_and_grad(f, which))(w, hidden) for f in (plain, ours))
    assert got[0] == pytest.approx(float(want[0]), rel=1e-6)
    assert tiny.relative(got[1], want[1]) < 2e-6


def test_the_normalizer_alone_and_unused(arrays):
    """One of the two outputs may have no cotangent."""
    w, hidden, targets, (a, _) = arrays

    def of(h, pick):
        return (pick(token_nll(Head(w, False), h, targets, chunk=9, lse=True)) * a).sum()

    want = jax.grad(lambda h: (jax.nn.logsumexp(h @ w, -1) * a).sum())(hidden)
    assert tiny.relative(jax.grad(lambda h: of(h, lambda t: t.lse))(hidden), want) < 2e-6
    plain = jax.grad(lambda h: (token_nll(Head(w, False), h, targets, chunk=9).nll * a).sum())(hidden)
    assert tiny.relative(jax.grad(lambda h: of(h, lambda t: t.nll))(hidden), plain) < 2e-6
    assert token_nll(Head(w, False), hidden, targets).lse is None


def test_it_is_a_term_of_its_own():
    """Sum and weight in the step's report, and a step that follows the coefficient as an array."""
    data = tiny.batch(4, micro=2)
    t, plain = tiny.tiny(objective=CausalLM(z_loss=1e-2)), tiny.tiny(objective=CausalLM())
    step: Any = jax.jit(t.program.train)
    _, metrics = step(t.state, t.frozen, data)
    logits = t.model.apply(t.base, t.program.objective.inputs(jax.tree.map(lambda x: x.reshape(4, -1), data))).logits
    flat = jax.tree.map(lambda x: x.reshape(4, -1), data)
    weights = shift(flat)[1]
    want = float((jax.nn.logsumexp(logits, -1) ** 2 * weights).sum())
    total, count = metrics["terms"]["z_loss"]
    assert float(total) == pytest.approx(want, rel=1e-5) and float(count) == float(weights.sum())
    nll = metrics["terms"]["nll"]
    assert float(metrics["loss"]) == pytest.approx(float(nll[0] / nll[1]) + 1e-2 * want / float(count), rel=1e-5)
    off = dc.replace(t.state, hyper=t.state.hyper | {"coef": {"nll": jnp.float32(1), "z_loss": jnp.float32(0)}})
    _, zero = step(off, t.frozen, data)
    _, bare = jax.jit(plain.program.train)(plain.state, plain.frozen, data)
    assert step._cache_size() == 1 and set(bare["terms"]) == {"nll"}
    assert float(zero["grad_norm"]) == pytest.approx(float(bare["grad_norm"]), rel=1e-5)
    assert float(metrics["grad_norm"]) != pytest.approx(float(bare["grad_norm"]), rel=1e-3)


def test_the_other_objectives_that_have_it():
    model = tinymodels.known()["t5"]()
    params, batch = tiny.weights(model), jax.tree.map(jnp.asarray, tiny.answered(3))
    objective = Seq2Seq(z_loss=1e-3)
    out = objective(lambda x, m: (model.apply(params, x), m), batch, reference=None, mutable={}, hyper={})
    lse = jax.nn.logsumexp(model.apply(params, objective.inputs(batch)).logits, -1)
    assert float(out.sums["z_loss"]) == pytest.approx(float((lse**2 * batch.weights).sum()), rel=1e-5)
    assert set(objective.weights(batch)) == {"nll", "z_loss"} == set(objective.coefficients())
    assert set(DFT(z_loss=1e-3).coefficients()) == {"nll", "z_loss"}
    run = Run(objective=DistillCausalLM(z_loss=1e-3))
    assert any(x.startswith("objective.z_loss=0.001") for x in run.objective.check(run))
