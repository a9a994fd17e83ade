"""NEFTune: the noise's size and place, off at evaluation, the same on resume, no parameter; with every kind of method."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import config, tree
from ftjax.errors import ConfigError
from ftjax.objectives.image_classification import ImageClassification
from ftjax.objectives.seq2seq import Seq2Seq
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.peft.prompt import Prompt
from ftjax.train.neftune import NoisyTable, noisy
from ftjax.train.optimizer import hyper_of
from ftjax.train.state import Frozen
from tests import tiny, tinymodels

ALPHA = 5.0
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile


def with_noise(t: tiny.Tiny, alpha: float = ALPHA) -> tiny.Tiny:
    return dc.replace(t, state=dc.replace(t.state, hyper=t.state.hyper | {"neftune": jnp.float32(alpha)}))


def table(rows: int = 50, dim: int = 16) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, dim))


def test_the_noise_is_that_of_transformers():
    """The same range for the same shape as the hook of transformers, and uniform in it."""
    torch = pytest.importorskip("torch")
    hook = pytest.importorskip("transformers.integrations.neftune").neftune_post_forward_hook
    ids = jax.random.randint(jax.random.key(0), (64, 24), 0, 50)
    wrapped = NoisyTable(table(), jnp.float32(ALPHA), jax.random.key(2))
    noise = np.asarray(wrapped.embed(ids, jnp.float32) - table()[ids])
    module = torch.nn.Embedding(50, 16)
    module.neftune_noise_alpha = ALPHA
    plain = torch.nn.functional.embedding(torch.tensor(np.array(ids)), module.weight)
    theirs = (hook(module, None, plain) - plain).detach().numpy()
    size = ALPHA / np.sqrt(24 * 16)
    for x in (noise, theirs):
        assert np.abs(x).max() == pytest.approx(size, rel=1e-3) and np.abs(x).max() <= size * (1 + 1e-5)
        assert x.mean() == pytest.approx(0, abs=0.01 * size) and x.std() == pytest.approx(size / 3**0.5, rel=0.01)
    assert wrapped.embed(ids, jnp.bfloat16).dtype == jnp.bfloat16


def test_the_tied_head_is_plain_and_lookups_differ():
    wrapped = NoisyTable(table(), jnp.float32(ALPHA), jax.random.key(2))
    x = jax.random.normal(jax.random.key(3), (4, 16))
    assert tiny.largest(wrapped.unembed(x), x @ table().T) < 1e-5 and (wrapped.materialize() == table()).all()
    one, other = jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8), jnp.int32)
    noise = [wrapped.embed(i, jnp.float32) - table()[i] for i in (one, one, other)]
    assert (noise[0] == noise[1]).all() and tiny.largest(noise[0], noise[2]) > 0.1


METHODS: dict[str, Any] = {
    "full": Full(), "lora-embed": LoRA(rank=4, dropout=0.1, targets=("q", "embed")), "prompt": Prompt(tokens=3)
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_training_evaluation_and_resume(name):
    """Packed rows; under full training the head is tied to the noisy table."""
    model = tiny.llama(tie_word_embeddings=name == "full")
    optim = config.Optim(lr=1e-2, eps=1e-4)
    plain = tiny.tiny(METHODS[name], model=model, optim=optim)
    t, data = with_noise(plain), tiny.batch(6, micro=2)
    step: Any = jax.jit(t.program.train, compiler_options=QUICK)
    _, loud = step(t.state, t.frozen, data)
    _, quiet = step(with_noise(plain, 0.0).state, t.frozen, data)
    assert abs(float(loud["loss"]) - float(quiet["loss"])) > 1e-4
    if name == "full":
        _, never = jax.jit(t.program.train, compiler_options=QUICK)(plain.state, t.frozen, data)
        assert float(quiet["loss"]) == pytest.approx(float(never["loss"]), rel=1e-6)
        assert float(quiet["grad_norm"]) == pytest.approx(float(never["grad_norm"]), rel=1e-5)
    states = [t.state]
    for _ in range(3):
        states.append(step(states[-1], t.frozen, data)[0])
    held = jax.device_get(states[1])  # a checkpoint
    again = step(step(jax.tree.map(jnp.asarray, held), t.frozen, data)[0], t.frozen, data)[0]
    assert tiny.largest(again.trainable, states[3].trainable) == 0
    one = jax.tree.map(lambda x: x[0], data)
    found = [jax.make_jaxpr(t.program.evaluate)(s, t.frozen, one).jaxpr for s in (t.state, plain.state)]
    drawn = [str(found[0]).count(w) for w in ("random_bits", "threefry")]
    assert drawn == [0, 0] and len(found[0].eqns) == len(found[1].eqns), "no noise at evaluation"
    assert "random_bits" in str(jax.make_jaxpr(t.program.train)(t.state, t.frozen, data))
    assert set(tree.leaves_by_path(t.state.trainable)) == set(tree.leaves_by_path(plain.state.trainable))


def test_each_step_and_micro_batch_has_its_own():
    t = with_noise(tiny.tiny(LoRA(rank=4)))
    rng = t.state.rng
    ids = jnp.zeros((2, 8), jnp.int32)

    def noise(step: int, micro: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(rng, step), micro)
        return noisy(t.base, jnp.float32(ALPHA), key)["embed/w"].embed(ids, jnp.float32)

    assert tiny.largest(noise(0, 0), noise(0, 1)) > 0.01 and tiny.largest(noise(0, 0), noise(1, 0)) > 0.01


def test_soft_prompts_get_none_and_other_models():
    model: Any = tiny.llama()
    overlay = Prompt(tokens=3).init(jax.random.key(0), model.table, tiny.weights(model))
    params = noisy(tiny.weights(model) | overlay, jnp.float32(ALPHA), jax.random.key(1))
    from ftjax.params import nest

    seq = model.enter(nest(params), {"input_ids": jnp.ones((2, 5), jnp.int32)}, first=True)
    plain = model.enter(nest(tiny.weights(model) | overlay), {"input_ids": jnp.ones((2, 5), jnp.int32)}, first=True)
    gap = jnp.abs(seq.h - plain.h)
    assert gap.shape[1] == 8 and float(gap[:, :3].max()) == 0 < float(gap[:, 3:].min(-1).max())
    t5 = with_noise(tiny.tiny(objective=Seq2Seq(), model=tinymodels.known()["t5"]()))
    out = jax.eval_shape(t5.program.train, t5.state, t5.frozen, tiny.batch_for(Seq2Seq(), 4, micro=2))
    assert set(out[1]["terms"]) == {"nll"}
    images = tinymodels.known()["resnet"](head=ImageClassification().head(("a", "b", "c")))
    t = with_noise(tiny.tiny(objective=ImageClassification(), model=images))
    with pytest.raises(ConfigError, match=r"train\.neftune  is noise on embedded tokens, and this model has none"):
        jax.eval_shape(t.program.train, t.state, t.frozen, tiny.batch_for(ImageClassification(), 4, micro=2))
    assert isinstance(t.frozen, Frozen)


def test_it_comes_from_the_config():
    run = config.Run(train=config.Train(neftune=5.0))
    assert float(hyper_of(run)["neftune"]) == 5.0 and "neftune" not in hyper_of(config.Run())
