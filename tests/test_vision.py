"""Images: batch statistics as state, augmentation, the digits, training all or parts of a network, errors."""

from __future__ import annotations

import dataclasses as dc
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax import config
from ftjax.config import Loader
from ftjax.data.images import (
    ImageBatch,
    ImageExamples,
    Picture,
    Recipe,
    augment,
    encode_images,
    normalisation_of,
    normalise,
    resize,
    type_images,
    unit,
)
from ftjax.data.layouts import arrays_of, layout_of, meta_of, restored
from ftjax.data.pipeline import Batches
from ftjax.data.prepare import prepare
from ftjax.data.rows import BadRows, Row
from ftjax.data.tasks.digits import Digits
from ftjax.errors import ConfigError, DataError
from ftjax.headspec import HeadSpec, label_names
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.models.batchnorm import MOMENTUM, reestimate
from ftjax.models.resnet_cifar import CIFAR10, convert
from ftjax.objectives.image_classification import ImageClassification
from ftjax.params import cut
from ftjax.peft.base import FROZEN, bind, merge
from ftjax.peft.full import Full
from ftjax.train.state import whole
from tests import tiny, tinymodels

CONVNETS = ("resnet", "resnet_cifar")
KNOWN = tinymodels.known()


def only(*patterns):
    """A method that trains the weights of some patterns; the head is trained beside any method."""
    rules = [*((f"base/{p}", "part") for p in patterns), ("base/*", FROZEN)]
    return SimpleNamespace(labels=lambda table: rules, init=lambda key, table, params: {})


def run(t, batches, steps=3):
    step, state = jax.jit(t.program.train), t.state
    for _ in range(steps):
        state, metrics = step(state, t.frozen, batches)
    assert step._cache_size() == 1
    return state, metrics


def batches(rows=8, micro=2, seed=0):
    return tiny.batch_for(ImageClassification(), rows, micro=micro, seed=seed)


def stats_of(model):
    return {k for k, s in model.table.items() if s.kind == "stat"}


# Statistics as state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONVNETS)
def test_statistics_are_state_not_weights(family):
    t = tiny.tiny(Full(), ImageClassification(), model=KNOWN[family]())
    stats = stats_of(t.model)
    assert stats and set(t.state.mutable) == stats
    assert set(t.state.trainable["base"]) == set(t.base) - stats
    state, _ = run(t, batches())
    assert all((state.mutable[k] != t.state.mutable[k]).any() for k in stats)
    assert all(x.dtype == jnp.float32 for x in state.mutable.values())
    store = whole(state, t.frozen.store, state.mutable)
    assert set(store["base"]) == set(t.base)


@pytest.mark.parametrize("family", CONVNETS)
def test_frozen_statistics_are_used_and_stay_bit_identical(family):
    model = KNOWN[family](Numerics(batch_norm="frozen"))
    t = tiny.tiny(Full(), ImageClassification(), model=model)
    before = jax.tree.map(np.asarray, t.state.mutable)
    state, metrics = run(t, batches())
    for k, v in before.items():
        np.testing.assert_array_equal(np.asarray(state.mutable[k]), v)
    assert tiny.largest(state.trainable, t.state.trainable) > 1e-3
    inputs = {"pixel_values": batches().pixels[0]}
    used = model.apply(t.base, inputs, train=True)
    assert not used.mutable
    np.testing.assert_array_equal(used.logits, model.apply(t.base, inputs).logits)


def test_training_uses_the_batch_and_evaluation_the_running_statistics():
    t = tiny.tiny(Full(), ImageClassification(), model=KNOWN["resnet"]())
    b = jax.tree.map(lambda x: x[0], batches())
    shifted = dc.replace(b, pixels=3 * b.pixels + 5)
    inputs, moved = {"pixel_values": b.pixels}, {"pixel_values": shifted.pixels}
    trained = [t.model.apply(t.base, x, train=True).logits for x in (inputs, moved)]
    plain = [t.model.apply(t.base, x).logits for x in (inputs, moved)]
    # The first layer's statistics undo scale and shift, but for the zeros beyond the border.
    assert tiny.largest(*trained) < 0.5 * tiny.largest(*plain)
    one = t.program.evaluate(t.state, t.frozen, b)
    other = t.program.evaluate(dc.replace(t.state, mutable=jax.tree.map(lambda x: x + 1, t.state.mutable)), t.frozen, b)
    assert float(one["terms"]["cross_entropy"][0]) != float(other["terms"]["cross_entropy"][0])


def test_each_micro_batch_has_its_own_statistics_one_after_the_other():
    t = tiny.tiny(only(), ImageClassification(), model=KNOWN["resnet_cifar"]())
    data = batches(micro=2)
    state, _ = run(t, data, steps=1)
    mutable, store = t.state.mutable, t.base
    for i in range(2):
        mutable = t.model.apply(store | mutable, {"pixel_values": data.pixels[i]}, train=True).mutable
    assert tiny.largest(state.mutable, mutable) < 1e-6


def test_a_step_that_is_not_finite_leaves_the_statistics():
    t = tiny.tiny(Full(), ImageClassification(), model=KNOWN["resnet"]())
    data = batches()
    state, metrics = run(t, dc.replace(data, pixels=data.pixels * jnp.nan), steps=1)
    assert not bool(metrics["finite"])
    assert tiny.largest(state.mutable, t.state.mutable) == 0


def test_statistics_of_a_single_value_are_refused():
    t = tiny.tiny(Full(), ImageClassification(), model=KNOWN["resnet"]())
    with pytest.raises(ConfigError, match=r"single value per channel.*batch_norm=frozen"):
        t.model.apply(t.base, {"pixel_values": jnp.zeros((1, 3, 4, 4))}, train=True)


def test_reestimation_is_the_average_over_batches():
    t = tiny.tiny(Full(), ImageClassification(), model=KNOWN["resnet_cifar"](Numerics(batch_norm="frozen")))
    two = [{"pixel_values": batches(seed=s).pixels[0]} for s in (1, 2)]
    fresh = reestimate(t.model, t.base, two)
    follows = dc.replace(t.model, numerics=Numerics(batch_norm="train"))
    zero = t.base | {k: jnp.zeros_like(t.base[k]) for k in stats_of(t.model)}
    each = [follows.apply(zero, x, train=True).mutable for x in two]
    for k in stats_of(t.model):
        np.testing.assert_allclose(fresh[k], (each[0][k] + each[1][k]) / (2 * MOMENTUM), rtol=1e-5, atol=1e-7)
    assert all(fresh[k] is t.base[k] for k in set(t.base) - stats_of(t.model))
    with pytest.raises(DataError, match="no batch"):
        reestimate(t.model, t.base, [])
    with pytest.raises(ConfigError, match="no running statistics"):
        reestimate(KNOWN["vit"](), {}, two)


@pytest.mark.parametrize("family", CONVNETS)
def test_saved_with_the_statistics_that_it_was_trained_to(family, tmp_path):
    t = tiny.tiny(Full(), ImageClassification(), model=KNOWN[family]())
    state, _ = run(t, batches())
    store = whole(state, t.frozen.store, state.mutable)
    hf.save(t.model, merge(bind(store["base"], store["overlay"]), t.model.table), tmp_path)
    model, params = hf.load(str(tmp_path))
    assert model == t.model
    b = jax.tree.map(lambda x: x[0], batches())
    want = t.program.evaluate(state, t.frozen, b)["rows"]["logits"]
    assert tiny.largest(model.apply(params, {"pixel_values": b.pixels}).logits, want) < 1e-5
    assert sum(n.endswith("num_batches_tracked") for n in load_file(tmp_path / "model.safetensors")) == (
        len(stats_of(model)) / 2
    )


def test_a_reference_keeps_the_statistics_of_the_start():
    """An objective that looks at a reference sees the network as it was, statistics included."""

    class Looks(ImageClassification):
        needs_reference = True

        def __call__(self, policy, batch, *, reference, mutable, hyper):
            out = super().__call__(policy, batch, reference=None, mutable=mutable, hyper=hyper)
            return out.replace(metrics={"past": (reference(self.inputs(batch)).logits.sum(), jnp.float32(1))})

    t = tiny.tiny(Full(), Looks(), model=KNOWN["resnet"]())
    data = batches(micro=1)
    first, last = (run(t, data, steps=n)[1]["metrics"]["past"][0] for n in (1, 4))
    assert float(first) == float(last) != 0


# All or parts of a network ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    task = Digits(size=tiny.IMAGE, mean=(0.3,), std=(0.35,), padding=1)
    return prepare(task, Loader(), None, layout=layout_of(ImageClassification()), use_cache=False)


@pytest.mark.parametrize("family", [*CONVNETS, "vit"])
@pytest.mark.parametrize("part", ["all", "last block", "head"])
def test_training_all_or_parts_on_digits(part, family, digits):
    last = "layers[3:4]/*" if family == "vit" else "stage2/block0/*"
    method = {"all": Full(), "last block": only(last), "head": only()}[part]
    model = KNOWN[family](head=ImageClassification().head(digits.labels))
    base = cut(tiny.weights(model), {"layers": [3]})
    optim = config.Optim(lr=3e-2 if part == "head" else 5e-3, schedule="constant")
    t = tiny.tiny(method, ImageClassification(), model=model, base=base, optim=optim)
    step, state = jax.jit(t.program.train), t.state
    losses = []
    for i in range(12):
        rows = [[32 * i + j] for j in range(32)]
        flat = digits.train.build(rows, key=(0, i))
        state, metrics = step(state, t.frozen, jax.tree.map(lambda x: jnp.asarray(x)[None], flat))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05, losses
    after = whole(state, t.frozen.store, state.mutable)["base"]
    trained = {k for k, v in after.items() if (v != t.base[k]).any()} - stats_of(model)
    expected = {
        "all": set(t.base),
        "last block": {k for k in t.base if k.startswith(("head/", last.rstrip("*")))},
        "head": {"head/w", "head/b"},
    }[part]
    assert trained == expected - stats_of(model)


def test_the_objectives_loss_is_the_definition():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(4, 3)).astype(np.float32), np.array([0, 2, 1, 1], np.int32)
    row, w, e = np.array([1, 1, 1, 0], np.float32), np.array([1, 2, 3], np.float32), 0.2
    objective = ImageClassification(label_smoothing=e, class_weights=(1, 2, 3))
    batch = ImageBatch(jnp.zeros((4, 3, 2, 2)), jnp.asarray(y), jnp.asarray(row))
    policy = lambda inputs, mutable: (SimpleNamespace(logits=jnp.asarray(z)), mutable)  # noqa: E731
    out = objective(policy, batch, reference=None, mutable={}, hyper={"label_smoothing": jnp.float32(e)})
    nll = -(z - np.log(np.exp(z).sum(1, keepdims=True)))
    want = sum((1 - e) * w[c] * nll[i, c] + e / 3 * (w * nll[i]).sum() for i, c in enumerate(y[:3]))
    assert float(out.sums["cross_entropy"]) == pytest.approx(want, rel=1e-5)
    assert float(objective.weights(batch)["cross_entropy"]) == 1 + 3 + 2
    right = (z.argmax(1) == y)[:3]
    assert tuple(map(float, out.metrics["accuracy"])) == (right.sum(), 3)
    assert objective.summary(jax.device_get(out.rows))["accuracy"] == pytest.approx(right.mean())
    with pytest.raises(ConfigError, match="3 numbers for 2 classes"):
        objective.head(("a", "b"))


@pytest.mark.parametrize("family", [*CONVNETS, "vit"])
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 16, 16, 3), (3, 16, 16)], ids=str)
def test_images_of_another_shape_are_refused(family, shape):
    model = KNOWN[family]()
    with pytest.raises(ConfigError, match=r"pixel_values has the shape .* \[B, 3, H, W\]"):
        model.apply(tiny.weights(model), {"pixel_values": jnp.zeros(shape)})


def test_vit_refuses_images_of_another_size():
    model = KNOWN["vit"]()
    with pytest.raises(ConfigError, match="images of 8 x 16; the model takes 16 x 16"):
        model.apply(tiny.weights(model), {"pixel_values": jnp.zeros((1, 3, 8, 16))})


def test_bfloat16_is_near_float32():
    for family in (*CONVNETS, "vit"):
        model, x = KNOWN[family](), {"pixel_values": batches().pixels[0]}
        params = tiny.weights(model)
        half = dc.replace(model, numerics=Numerics(dtype="bfloat16"))
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        out = half.apply(low, x, train=True)
        assert all(v.dtype == jnp.float32 for v in out.mutable.values())
        assert 0 < tiny.largest(half.apply(low, x).logits, model.apply(params, x).logits) < 0.1


# Folders ---------------------------------------------------------------------------------------------------------------


def test_a_head_of_other_labels_is_new_and_says_so(tmp_path):
    model = KNOWN["resnet"](head=HeadSpec("image_classification", ("a", "b", "c")))
    hf.save(model, tiny.weights(model), tmp_path)
    said: list[str] = []
    for labels in (("x", "y", "z"), ("x", "y")):
        new, params = hf.load(str(tmp_path), head=HeadSpec("image_classification", labels), say=said.append)
        assert new.head.labels == labels and params["head/w"].shape == (16, len(labels))
        assert tiny.largest(params["embedder/conv/w"], tiny.weights(model)["embedder/conv/w"]) == 0
    assert "drawn from seed 0" in said[0] and "left out" in said[1] and len(said) == 4
    assert (params["head/w"] != tiny.weights(model)["head/w"][:, :2]).any()
    with_problem = HeadSpec("image_classification", ("a", "b", "c"), "single_label_classification")
    _, same = hf.load(str(tmp_path), head=with_problem, say=pytest.fail)
    assert tiny.largest(same["head/w"], tiny.weights(model)["head/w"]) == 0


def test_a_head_whose_labels_nobody_has_named_is_kept(tmp_path):
    model = KNOWN["vit"](head=HeadSpec("image_classification", label_names(3)))
    hf.save(model, tiny.weights(model), tmp_path)
    new, params = hf.load(str(tmp_path), head=HeadSpec("image_classification", ("x", "y", "z")), say=pytest.fail)
    assert new.head.labels == ("x", "y", "z")
    assert tiny.largest(params["head/w"], tiny.weights(model)["head/w"]) == 0


def test_convert_makes_a_folder_of_a_file(tmp_path):
    model = KNOWN["resnet_cifar"](head=HeadSpec("image_classification", CIFAR10))
    hf.save(model, tiny.weights(model), tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    source = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in tensors.items() if "tracked" not in k}, source)
    again, params = hf.load(str(convert(source, tmp_path / "second")))
    assert again == model
    assert tiny.largest(params, tiny.weights(model)) == 0
    assert len(normalisation_of(tmp_path / "second")[0]) == 3
    with pytest.raises(ConfigError, match="2 labels for 10 outputs"):
        convert(source, tmp_path / "third", labels=("a", "b"))
    save_file({"conv1.weight": tensors["conv1.weight"]}, source)
    with pytest.raises(DataError, match="does not hold a ResNet of this kind"):
        convert(source, tmp_path / "third")
    with pytest.raises(DataError, match="no file"):
        convert(tmp_path / "absent.safetensors", tmp_path / "third")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_type": "dense"}, r"layer_type='dense' is not supported; expected basic or bottleneck"),
        ({"depths": [1]}, "expected 2 numbers"),
        ({"depths": None}, "'depths' is missing"),
        ({"hidden_sizes": "16"}, "expected a list of integers"),
        ({"downsample_in_first_stage": None}, "'downsample_in_first_stage' is missing"),
        ({"groups": 32}, "unknown settings of this model: groups"),
    ],
)
def test_a_resnet_config_that_does_not_fit(change, message):
    model = KNOWN["resnet"]()
    with pytest.raises(DataError, match=message):
        type(model).Config.from_hf({**model.config.to_hf(), **change})


# Pictures --------------------------------------------------------------------------------------------------------------


def pictures(n=6, size=10, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


RECIPE = Recipe((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), padding=3, flip=True)


def examples(**changes):
    recipe = dc.replace(RECIPE, **changes)
    return ImageExamples.of(pictures(), [0, 1, 2, 0, 1, 2], names=("a", "b", "c"), recipe=recipe)


def test_augmentation_depends_on_key_and_index_alone():
    data = examples()
    rows = [[i] for i in range(6)]
    one = data.build(rows, key=(7, 3))
    np.testing.assert_array_equal(one.pixels, data.build(rows, key=(7, 3)).pixels)
    alone = data.build([[4]], key=(7, 3)).pixels[0]
    np.testing.assert_array_equal(one.pixels[4], alone)
    part = data.take(np.array([4, 1]))
    np.testing.assert_array_equal(part.build([[0]], key=(7, 3)).pixels[0], alone)
    for key in ((7, 4), (8, 3)):
        assert (data.build(rows, key=key).pixels != one.pixels).any()
    np.testing.assert_array_equal(data.build(rows).pixels, normalise(unit(data.images), RECIPE))


def test_batches_of_the_pipeline_resume_with_the_same_pictures():
    make = lambda: Batches(examples(), loader=Loader(packing="none"), batch=4, accumulate=2, seed=5)  # noqa: E731
    one = make()
    seen = [one.next() for _ in range(5)]
    assert seen[0].pixels.shape == (2, 2, 3, 10, 10) and seen[0].labels.shape == (2, 2)
    two = make()
    two.restore({"next_index": 3})
    for want in seen[3:]:
        got = two.next()
        np.testing.assert_array_equal(got.pixels, want.pixels)
        np.testing.assert_array_equal(got.labels, want.labels)
    plain = examples(padding=0, flip=False)
    assert (
        seen[0].pixels != Batches(plain, loader=Loader(packing="none"), batch=4, accumulate=2, seed=5).next().pixels
    ).any()


def test_augmentation_cuts_and_mirrors_every_way():
    x = unit(pictures(1)[0])
    seen = {augment(x, RECIPE, key=(0, 0), index=i).tobytes() for i in range(2000)}
    assert len(seen) == 7 * 7 * 2
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3)))
    cuts = {
        np.ascontiguousarray(c[:, :, ::s]).tobytes()
        for i in range(7) for j in range(7) for s in (1, -1) for c in (padded[:, i : i + 10, j : j + 10],)
    }  # fmt: skip
    assert seen == cuts
    plain = Recipe()
    np.testing.assert_array_equal(augment(x, plain, key=(0, 0), index=0), x)


def test_augmentation_is_the_same_on_every_machine():
    """Golden: if this fails, runs that were stopped no longer go on with the pictures that they would have seen."""
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    got = augment(x, Recipe(padding=1, flip=True), key=(1, 3), index=2)
    assert got[0].tolist() == GOLDEN


GOLDEN = [[6.0, 5.0, 4.0, 0.0], [10.0, 9.0, 8.0, 0.0], [14.0, 13.0, 12.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_rows_that_only_fill_a_batch_weigh_nothing():
    b = examples().build([[0]], count=3)
    assert b.pixels.shape == (3, 3, 10, 10) and b.weights.tolist() == [1, 0, 0] and not b.pixels[1:].any()


def test_fingerprints_tell_pictures_and_recipes_apart():
    same, other = examples().fingerprint(), examples(padding=2).fingerprint()
    assert same == examples().fingerprint() != other
    assert examples().take(np.array([1, 0])).fingerprint() != examples().take(np.array([0, 1])).fingerprint()


def test_the_cache_gives_the_same_examples():
    data = examples()
    back = restored(ImageExamples, arrays_of(data), json.loads(json.dumps(meta_of(data))))
    assert back.recipe == data.recipe and back.fingerprint() == data.fingerprint() and back.names == data.names


def test_enlarging_keeps_a_constant_and_a_slope():
    assert np.allclose(resize(np.full((1, 5, 5), 0.7), 12), 0.7)
    ramp = resize(np.tile(np.arange(8.0), (8, 1)), 32)
    assert np.allclose(np.diff(ramp[0, 2:-2]), 0.25) and np.allclose(ramp, ramp[0])


def test_rows_of_pictures():
    rows = [
        Row({"image": Picture(p, RECIPE), "label": y}, f"x:{i}")
        for i, (p, y) in enumerate(zip(pictures(), "abcabc", strict=True))
    ]
    encoded = encode_images(type_images(rows), None, Loader())
    assert encoded.examples.names == ("a", "b", "c") and encoded.report.examples == 6
    assert encoded.examples.recipe == RECIPE
    held_out = encode_images(type_images(rows[1:3]), None, Loader(), like=encoded.examples)
    assert held_out.examples.labels.tolist() == [1, 2]
    assert held_out.examples.recipe == Recipe(RECIPE.mean, RECIPE.std), "held-out pictures are never augmented"
    with pytest.raises(DataError, match=r"x:9: a picture .* of class 'd'; expected .* among a, b, c"):
        odd = Row({"image": Picture(pictures()[0]), "label": "d"}, "x:9")
        encode_images(type_images([odd, *rows]), None, Loader(), like=encoded.examples)
    with pytest.raises(DataError, match=r"x:8: a picture \[3, 4, 4\]"):
        small = Row({"image": Picture(pictures(1, 4)[0]), "label": "a"}, "x:8")
        encode_images(type_images([*rows, small]), None, Loader())
    with pytest.raises(DataError, match="nothing to tell apart"):
        encode_images(type_images(rows[:1]), None, Loader())
    bad = BadRows(1)
    assert len(type_images([Row({"text": "x"}, "x:7"), *rows], bad=bad).rows) == 6 and bad.count == 1
    with pytest.raises(ConfigError, match="for pictures of 3 channels"):
        ImageExamples.of(pictures(), [0] * 6, names=("a",), recipe=Recipe((0.5, 0.5), (1.0, 1.0)))


def test_normalisation_as_a_model_folder_says(tmp_path):
    def write(**config):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))

    with pytest.raises(DataError, match=r"no .*preprocessor_config.json"):
        normalisation_of(tmp_path)
    write(image_mean=[0.5], image_std=[0.25], rescale_factor=1 / 255)
    assert normalisation_of(tmp_path) == ((0.5,), (0.25,))
    write(do_normalize=False)
    assert normalisation_of(tmp_path) == ((), ())
    write(image_mean=[0.5], image_std=[0.25], rescale_factor=1.0)
    with pytest.raises(DataError, match="rescale_factor=1.0"):
        normalisation_of(tmp_path)
    write(image_mean=[0.5])
    with pytest.raises(DataError, match="two lists of one length"):
        normalisation_of(tmp_path)


def test_digits_are_split_once_and_for_all(digits):
    assert len(digits.train) + len(digits.eval) == 1797 and 300 < len(digits.eval) < 420
    assert digits.labels == tuple("0123456789") and digits.train.images.shape[1:] == (3, 16, 16)
    assert not digits.warnings, "the same picture on both sides"
    again = prepare(
        Digits(size=9, channels=1), Loader(), None, layout=layout_of(ImageClassification()), use_cache=False
    )
    assert again.eval.origins == digits.eval.origins
    assert digits.train.images.min() >= 0 and digits.train.images.max() <= 1
