"""Mix-up: pixels and targets are mixed alike, by the key alone, and held-out pictures never are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.images import ImageBatch, ImageExamples, Picture, Recipe, encode_images, type_images
from ftjax.data.layouts import layout_of
from ftjax.data.pipeline import Batches
from ftjax.data.rows import Row
from ftjax.objectives.image_classification import ImageClassification
from tests import tiny, tinymodels

ALPHA = 0.4


def pictures(n: int, *, mixup: float = ALPHA, like: ImageExamples | None = None) -> ImageExamples:
    draw = np.random.default_rng(n)
    recipe = Recipe((0.5,), (0.25,), padding=1, flip=True)
    rows = [
        Row({"image": Picture(draw.random((1, 4, 4), np.float32), recipe), "label": i % 3}, f"x:{i}") for i in range(n)
    ]
    return encode_images(type_images(rows), None, Loader(), like=like, mixup=mixup).examples


def test_pixels_and_targets_are_mixed_alike():
    examples, plain = pictures(600), pictures(600, mixup=0.0)
    rows = [[i] for i in range(600)]
    mixed, alone = examples.build(rows, key=(1, 2)), plain.build(rows, key=(1, 2))
    assert mixed.others is not None and mixed.share is not None and alone.others is None
    np.testing.assert_array_equal(mixed.labels, alone.labels)
    share = mixed.share[:, None, None, None]
    rest = (mixed.pixels - share * alone.pixels)[share.ravel() < 0.9] / (1 - share)[share.ravel() < 0.9]
    # what is left over is another picture of the same batch, augmented and normalised as that one is, with its class
    flat = alone.pixels.reshape(600, -1)
    nearest = [int(np.abs(flat - x.ravel()).max(1).argmin()) for x in rest]
    assert np.abs(flat[nearest] - rest.reshape(len(rest), -1)).max() < 1e-4
    np.testing.assert_array_equal(mixed.others[share.ravel() < 0.9], alone.labels[nearest])
    assert len(set(nearest)) == len(nearest), "an order of the batch: no picture is mixed in twice"
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1))
    assert mixed.share.mean() == pytest.approx(0.5, abs=0.04)
    assert mixed.share.var() == pytest.approx(1 / (4 * (2 * ALPHA + 1)), abs=0.01)


def test_the_key_decides():
    examples = pictures(12)
    one, again, other = (examples.build([[i] for i in range(12)], key=k) for k in ((1, 5), (1, 5), (1, 6)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.share != other.share).any() and (one.others != other.others).any()
    first, second = (Batches(examples, loader=Loader(packing="none"), batch=4, length=1, seed=7) for _ in range(2))
    steps = [first.next() for _ in range(4)]
    second.restore({"next_index": 3})
    np.testing.assert_array_equal(second.next().pixels, steps[3].pixels)
    first.close()
    second.close()


def test_held_out_pictures_are_never_mixed():
    train = pictures(12)
    held_out = pictures(6, like=train)
    plain = pictures(6, mixup=0.0, like=pictures(12, mixup=0.0))
    rows = [[i] for i in range(6)]
    batch, want = (x.build(rows, count=8, key=(0, 0)) for x in (held_out, plain))
    np.testing.assert_array_equal(batch.pixels, want.pixels)
    assert batch.share is not None and batch.share.tolist() == [1.0] * 8
    assert jax.tree.structure(batch) == jax.tree.structure(train.build([], count=8)) != jax.tree.structure(want)
    objective = ImageClassification(class_weights=(1.0, 2.0, 3.0))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    a, b = (loss(objective, x, z) for x in (batch, want))
    one, two = ([float(v) for v in jax.tree.leaves((x.sums, x.metrics))] for x in (a, b))
    assert one == pytest.approx(two)


def loss(objective, batch, z):
    class Output:
        logits = z

    def policy(inputs, mutable):
        return Output, mutable

    return objective(policy, batch, reference=None, mutable={}, hyper={"label_smoothing": jnp.float32(0.1)})


def test_the_loss_is_that_of_soft_targets():
    torch = pytest.importorskip("torch")
    z, share = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.array([1, 0.3, 0.5, 0.9], np.float32)
    a, b = np.array([0, 1, 2, 2], np.int32), np.array([1, 2, 2, 0], np.int32)
    batch = ImageBatch(np.zeros((4, 1, 2, 2), np.float32), a, np.ones(4, np.float32), b, share)
    objective = ImageClassification(label_smoothing=0.1, mixup=ALPHA)
    out, count = loss(objective, batch, jnp.asarray(z)), objective.weights(batch)["cross_entropy"]
    target = share[:, None] * np.eye(3)[a] + (1 - share)[:, None] * np.eye(3)[b]
    want = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(torch.tensor(z), torch.tensor(target, dtype=torch.float32))
    assert float(out.sums["cross_entropy"] / count) == pytest.approx(float(want), rel=1e-6)
    said = z.argmax(1)
    assert float(out.metrics["accuracy"][0]) == pytest.approx((share * (said == a) + (1 - share) * (said == b)).sum())
    weighted = ImageClassification(class_weights=(1.0, 2.0, 3.0))
    assert float(weighted.weights(batch)["cross_entropy"]) == pytest.approx(1 + 0.3 * 2 + 0.7 * 3 + 3 + 0.9 * 3 + 0.1)


def test_a_step_takes_mixed_batches():
    model = tinymodels.known()["resnet"](head=ImageClassification().head(("a", "b", "c")))
    assert layout_of(ImageClassification()).name == "images" and ImageClassification().data_options() == {}
    plain = tiny.images(4)
    half = np.full(4, 0.5, np.float32)
    batch = ImageBatch(plain.pixels, plain.labels, plain.weights, plain.labels[::-1].copy(), half)
    t = tiny.tiny(objective=ImageClassification(mixup=ALPHA), model=model)
    _, metrics = jax.jit(t.program.train)(t.state, t.frozen, jax.tree.map(lambda x: jnp.asarray(x)[None], batch))
    assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
