"""A user's own Linen and NNX modules under full, LoRA and bias-only training, through the one step."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ftjax import tree
from ftjax.config import Run
from ftjax.errors import ConfigError
from ftjax.headspec import HeadSpec
from ftjax.models.base import Numerics
from ftjax.models.user import FlaxModule
from ftjax.objectives.base import LossOutput
from ftjax.objectives.classification import smoothed
from ftjax.ops import dense
from ftjax.peft.base import bind, merge
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from tests import tiny

CNN = FlaxModule(
    target="tests.userland:CNN", settings=("features=8", "classes=3"), inputs=("x",), shapes=((8, 8, 1),),
    trained=("Dense_1/*",),
)  # fmt: skip
MLP = FlaxModule(
    target="tests.userland:MLP", settings=("inputs=8", "hidden=16", "classes=3"), inputs=("x",), shapes=((8,),)
)
HEAD = HeadSpec("image_classification", ("a", "b", "c"))


@struct.dataclass
class Batch:
    x: jax.Array
    y: jax.Array


class Plain:
    """Cross entropy of (x, y)."""

    needs_reference: ClassVar[bool] = False

    def coefficients(self):
        return {"loss": 1.0}

    def hyper(self):
        return {}

    def weights(self, batch):
        return {"loss": jnp.float32(batch.y.shape[0])}

    def __call__(self, policy, batch, *, reference, mutable, hyper):
        out, mutable = policy({"x": batch.x}, mutable)
        return LossOutput({"loss": smoothed(out.logits, batch.y, 0.0).sum()}, mutable, {})


class BiasOnly(Full):
    """Every bias, nothing else."""

    def labels(self, table):
        return [("base/*bias", "bias"), ("base/*", "frozen")]


def built(source, peft, **options):
    model, base = source.load(Numerics(), seed=0, vocab=0, head=HEAD)
    return tiny.tiny(peft, Plain(), model=model, base=base, **options)


def data(source, n=16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, *source.shapes[0])).astype(np.float32)
    y = (x.reshape(n, -1).sum(1) > 0).astype(np.int32)
    return Batch(jnp.asarray(x)[None], jnp.asarray(y)[None])


@pytest.mark.parametrize("source", [CNN, MLP], ids=["linen", "nnx"])
@pytest.mark.parametrize(
    "peft", [Full(), LoRA(rank=2, targets=("all-linear",)), BiasOnly()], ids=["full", "lora", "bias"]
)
def test_training(source, peft):
    t = built(source, peft)
    step, state, batch = jax.jit(t.program.train), t.state, data(source)
    losses = []
    for _ in range(30):
        state, metrics = step(state, t.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert losses[-1] < 0.9 * losses[0]
    for a, b in zip(jax.tree.leaves(t.frozen.store), jax.tree.leaves(t.parts.frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    if source is CNN:
        assert any((state.mutable[k] != t.state.mutable[k]).any() for k in state.mutable)


def test_table():
    model = CNN.model(Numerics(), HEAD)
    kinds = {k: s.kind for k, s in model.table.items()}
    assert kinds["Conv_0/kernel"] == "conv" and kinds["Dense_0/kernel"] == "kernel"
    assert kinds["Conv_0/bias"] == "bias" and kinds["BatchNorm_0/scale"] == "norm"
    assert kinds["batch_stats/BatchNorm_0/mean"] == "stat"
    assert MLP.model(Numerics(), HEAD).table["first/kernel"].shape == (8, 16)


def test_lora_equals_the_same_layers_written_with_ours():
    """The MLP by hand with `Adapted` weights: the same logits and gradients of A and B."""
    t = built(MLP, LoRA(rank=2, targets=("all-linear",)), randomize=True)
    x = data(MLP).x[0]

    def theirs(trainable):
        return t.model.apply(params_of(tree.combine(trainable, t.frozen.store), t), {"x": x}).logits

    def ours(trainable):
        store = params_of(tree.combine(trainable, t.frozen.store), t)
        h = x
        for i, name in enumerate(("first", "second", "third")):
            h = dense(h, store[f"{name}/kernel"], store[f"{name}/bias"])
            h = h if i == 2 else jax.nn.relu(h)
        return h

    trainable = t.parts.trainable
    np.testing.assert_allclose(theirs(trainable), ours(trainable), atol=1e-5)
    one, two = (jax.grad(lambda p, f=f: (f(p) ** 2).sum())(trainable) for f in (theirs, ours))
    assert tiny.relative(one, two) < 1e-4


def params_of(store, t):
    whole = tree.combine(store, t.parts.const)
    return bind(whole["base"], whole["overlay"])


def test_merge():
    t = built(MLP, LoRA(rank=2, targets=("all-linear",)), randomize=True)
    bound = params_of(tree.combine(t.parts.trainable, t.frozen.store), t)
    folded = merge(bound, t.model.table)
    x = {"x": data(MLP).x[0]}
    np.testing.assert_allclose(t.model.apply(folded, x).logits, t.model.apply(bound, x).logits, atol=1e-5)


def test_what_cannot_work():
    with pytest.raises(ConfigError, match=r"model.target='tests.userland:CNM'"):
        FlaxModule(target="tests.userland:CNM", shapes=((8,),), inputs=("x",)).model(Numerics()).table  # noqa: B018
    model, base = MLP.load(Numerics(), seed=0, vocab=0, head=HEAD)
    with pytest.raises(ConfigError, match="no sites"):
        model.apply(base | {"layers[0:1]/attn_kv": 1}, {"x": data(MLP).x[0]})
    with pytest.raises(ConfigError, match="has no 'x'. Did you mean"):
        model.apply(base, {"xx": data(MLP).x[0]})


def test_dropout_on_inputs_is_refused():
    """Materialised weights have no input of A to drop."""
    run = Run(model=MLP, peft=LoRA(rank=2, dropout=0.1))
    assert any("peft.dropout=0.1" in line for line in MLP.check(run))
    assert not list(MLP.check(Run(model=MLP, peft=LoRA(rank=2))))
