"""Attention maps as a target: which are given, what they cost where they are not asked for, which keys count, refusals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from ftjax.errors import ConfigError
from ftjax.models.base import Numerics
from ftjax.objectives.attention_hints import DISTANCES, UNSEEN
from ftjax.objectives.distill import DistillCausalLM
from ftjax.ops import PAD_SEGMENT
from ftjax.peft.full import Full
from ftjax.peft.prefix import Prefix
from ftjax.peft.prompt import Prompt
from tests import tiny, tinymodels

T = tiny.LENGTH


def inputs(rows=3):
    batch = tiny.batch(rows)
    return {"input_ids": batch.tokens, "positions": batch.positions, "segments": batch.segments}


@pytest.fixture(scope="module")
def plain() -> Any:
    """A model of 4 layers, its weights and all of its scores."""
    model: Any = tiny.llama()
    weights = tiny.weights(model)
    return model, weights, jax.jit(lambda w, x: model.apply(w, x, attentions=True))(weights, inputs())


# What is given -----------------------------------------------------------------------------------------------------------


def test_every_query_sees_what_stands_before_it_in_its_own_example(plain):
    _, _, out = plain
    assert out.attentions.shape == (4, 3, 4, T, T) and out.attentions.dtype == jnp.float32
    given = inputs()
    same = given["segments"][:, :, None] == given["segments"][:, None, :]
    seen = same & (np.arange(T)[:, None] >= np.arange(T))
    assert (np.asarray(out.attentions > UNSEEN) == np.asarray(seen)[None, :, None]).all()
    np.testing.assert_allclose(jax.nn.softmax(out.attentions, -1).sum(-1), 1, atol=1e-6)


def test_named_layers_are_those_of_all_and_nothing_else_changes(plain):
    model, weights, every = plain
    for layers in ((1, 3), (0,)):
        out = jax.jit(lambda w, x, n=layers: model.apply(w, x, attentions=n, layers=True))(weights, inputs())
        np.testing.assert_array_equal(out.attentions, every.attentions[np.asarray(layers)])
        assert out.layers.shape[0] == 4
        np.testing.assert_array_equal(out.hidden, every.hidden)


@pytest.mark.parametrize("numerics", [Numerics(layers="unroll"), Numerics(remat="full"), Numerics(remat="dots")])
def test_however_the_layers_run(plain, numerics):
    _, weights, every = plain
    model: Any = tiny.llama(numerics)
    out = jax.jit(lambda w, x: model.apply(w, x, attentions=(0, 3)))(weights, inputs())
    np.testing.assert_allclose(out.attentions, every.attentions[np.asarray([0, 3])], atol=1e-5)


def arrays(jaxpr):
    """Every array that a program makes, inner programs included."""
    for e in jaxpr.eqns:
        yield from (v.aval for v in e.outvars)
    for inner in subjaxprs(jaxpr):
        yield from arrays(inner)


def test_who_does_not_ask_does_not_pay(plain):
    """Without the option no program hands maps out; with it, those of the layers that are compared, even under remat."""

    def maps(objective, **numerics):
        run = tiny.tiny(Full(), objective, model=tiny.llama(Numerics(**numerics), num_hidden_layers=3))
        jaxpr = jax.jit(run.program.train).trace(run.state, run.frozen, tiny.batch(2, micro=1)).jaxpr.jaxpr
        return {x.shape[:-4] for x in arrays(jaxpr) if x.shape[-4:] == (2, 4, T, T)}

    one = DistillCausalLM(attention=1.0, attention_layers=((2, 1),))
    assert not maps(DistillCausalLM())
    for numerics in ({}, {"layers": "unroll"}, {"remat": "full"}):
        assert maps(one, **numerics) == {
            (),
            (1,),
        }  # a layer's, on its way; and what is carried, kept once and not by layer


# What counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_by_hand(distance):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 6))
    seen = rng.random((5, 6)) < 0.6
    seen[:, 0] = True
    hidden = np.where(seen, 0.0, -1e30)
    got = DISTANCES[distance](jnp.float32(a + hidden), jnp.float32(b + hidden), jnp.asarray(seen))
    for i, (x, y, on) in enumerate(zip(a, b, seen, strict=True)):
        s, t = (np.exp(z[on]) / np.exp(z[on]).sum() for z in (x, y))
        want = ((x - y)[on] ** 2).mean() if distance == "mse" else (t * np.log(t / s)).sum()
        assert float(got[i]) == pytest.approx(want, rel=1e-5, abs=1e-7)


def term(run, batch):
    return float(jax.jit(run.program.evaluate)(run.state, run.frozen, batch)["terms"]["attention"][0])


@pytest.mark.parametrize("distance", DISTANCES)
def test_packed_rows_and_padding_count_as_the_texts_alone(distance):
    run = tiny.tiny(Full(), DistillCausalLM(attention=1.0, attention_distance=distance))
    packed = tiny.batch(3)
    row = jax.tree.map(lambda x: x[2:], packed)
    half = T // 2
    apart = jax.tree.map(lambda x: jnp.concatenate([x[:, :half], x[:, half:]]), row)
    apart = apart.replace(segments=jnp.zeros_like(apart.segments))
    longer = lambda x, fill: jnp.pad(x, ((0, 0), (0, half)), constant_values=fill)  # noqa: E731
    apart = jax.tree.map(lambda x: longer(x, 0), apart).replace(segments=longer(apart.segments, PAD_SEGMENT))
    assert (row.segments.max(), apart.tokens.shape) == (1, (2, T))
    want = term(run, row)
    assert want > 0.01 and term(run, apart) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("method", [Prompt(tokens=3), Prefix(tokens=3)], ids=["prompt", "prefix"])
def test_virtual_tokens_are_no_keys(method):
    run = tiny.tiny(method, DistillCausalLM(attention=1.0, attention_distance="kl"))
    assert 0 < term(run, tiny.batch(2)) < 1e3


def test_the_term_alone_brings_the_student_nearer():
    """Of one pair of layers, each recomputed in the backward pass."""
    objective = DistillCausalLM(attention=10.0, alpha=0.0, attention_distance="kl", attention_layers=((1, 1),))
    run = tiny.tiny(Full(), objective, model=tiny.llama(Numerics(remat="full"), num_hidden_layers=2))
    step, state, batch, far = jax.jit(run.program.train), run.state, tiny.batch(4, micro=2), []
    for _ in range(5):
        state, metrics = step(state, run.frozen, batch)
        total, weight = metrics["terms"]["attention"]
        far.append(float(total / weight))
    assert far[-1] < 0.9 * far[0]


# Refusals ----------------------------------------------------------------------------------------------------------------


def test_refusals():
    rng, small, large = jax.random.key(0), tiny.llama(num_hidden_layers=2), tiny.llama(hidden_size=48)
    assert DistillCausalLM(attention=1.0).learned(small, large, rng) == {}
    with pytest.raises(ConfigError, match=r"attention_layers: \(2, 0\) is no pair of layers; the student has 2"):
        DistillCausalLM(attention=1.0, attention_layers=((2, 0),)).learned(small, large, rng)
    with pytest.raises(ConfigError, match="the student has 4 heads, the teacher 2; maps are compared head by head"):
        DistillCausalLM(attention=1.0).learned(small, tiny.llama(num_attention_heads=2), rng)
    with pytest.raises(ConfigError, match="the teacher, t5, gives no attention maps"):
        DistillCausalLM(attention=1.0).learned(small, tinymodels.known()["t5"](), rng)
    told = "".join(DistillCausalLM(attention_layers=((0, 0),)).advise_hints())
    assert "without objective.attention" in told
