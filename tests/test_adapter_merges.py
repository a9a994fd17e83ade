"""LoRAs made of others: what DARE drops, layers of their own, conversion of other updates, merges taken off again."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ftjax import registry
from ftjax.errors import ConfigError
from ftjax.params import bounds, cut
from ftjax.peft.adapters import load_adapters
from ftjax.peft.base import bind, merge
from ftjax.peft.convert import to_lora, unmerge
from ftjax.peft.interop import AdapterFile, load_adapter, save_adapter
from ftjax.peft.lora import LoRA
from ftjax.peft.merges import merge_adapters
from tests.test_adapters import moved
from tests.tiny import largest, llama, weights

MODEL = llama()
TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


def made(params, method, seed=0):
    leaves = getattr(type(method), "trained", ("a", "b"))
    return moved(method.init(jax.random.key(seed), MODEL.table, params), seed, leaves)


def folded(params, overlay):
    return merge(bind(cut(params, bounds(overlay)), overlay), MODEL.table)


@pytest.fixture(scope="module")
def adapters(params):
    methods = {
        "one": LoRA(rank=8, alpha=8.0, targets=TARGETS),
        "two": LoRA(rank=8, alpha=3.0, targets=TARGETS),
        "few": LoRA(rank=3, alpha=4.0, targets=("q_proj", "up_proj"), layers=(1, 3)),
    }
    return load_adapters(
        MODEL, params, {n: AdapterFile(m, made(params, m, i), "") for i, (n, m) in enumerate(methods.items())}
    )


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd"])
def test_dare_drops_the_share_and_keeps_the_mean(adapters, how):
    alone = {"one": 1.0, "two": 0.0}  # a weight of zero: the other's entries are dropped unseen
    if how == "dare_linear":
        thin, full = (merge_adapters(adapters, alone, how, density=d).overlay for d in (0.3, 1.0))
        for key, delta in thin.items():
            for x, y in ((delta.a, full[key].a), (delta.b, full[key].b)):
                kept = np.asarray(x != 0)
                assert abs(kept.mean() - 0.3) < 4 * np.sqrt(0.21 / kept.size)
                np.testing.assert_allclose(np.asarray(x)[kept], np.asarray(y)[kept] / 0.3, rtol=1e-5)
                assert not (kept[0] == kept[1]).all()
    both = {"one": 0.7, "two": 0.4}
    first, again, other = (merge_adapters(adapters, both, how, density=0.5, seed=s, rank=4).overlay for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert largest(first, other) > 1e-2


def test_layers_of_their_own(params, adapters):
    """Joined ranks are the sum of the updates, wherever each is."""
    file = merge_adapters(adapters, {"one": 0.5, "few": -2.0}, "cat")
    want = dict(params)
    for name, weight in {"one": 0.5, "few": -2.0}.items():
        alone = folded(params, adapters.files[name].overlay)
        want = {k: v + weight * (alone[k] - params[k]) for k, v in want.items()}
    assert largest(folded(params, file.overlay), want) < 2e-6
    assert largest(params, want) > 0.1


def test_svd_of_enough_rank_is_exact(params, adapters):
    exact, short = (merge_adapters(adapters, {"one": 1.0, "few": 0.5}, "svd", rank=r) for r in (11, 4))
    want = folded(params, merge_adapters(adapters, {"one": 1.0, "few": 0.5}, "cat").overlay)
    assert largest(folded(params, exact.overlay), want) < 5e-6 < 1e-2 < largest(folded(params, short.overlay), want)
    assert exact.method.rank == 11 and short.method.rank == 4


@pytest.mark.parametrize(
    ("weights", "how", "settings", "match"),
    [
        ({"one": 1.0, "few": 1.0}, "linear", {}, r"equal ranks; these have \[3, 8\]"),
        ({"one": 1.0, "two": 1.0}, "ties", {}, "needs a density"),
        ({"one": 1.0, "two": 1.0}, "dare_ties_svd", {"density": 0.0}, "needs a density"),
        ({"one": 1.0}, "tise", {}, "ties"),
        ({"onne": 1.0}, "svd", {}, "one"),
        ({}, "svd", {}, "no adapters"),
    ],
)
def test_merges_that_are_refused(adapters, weights, how, settings, match):
    with pytest.raises(ConfigError, match=match):
        merge_adapters(adapters, weights, how, **settings)


OTHERS = {
    "loha": dict(rank=2, alpha=2.0), "lokr": dict(rank=2, alpha=2.0), "oft": dict(block_size=4), "vera": dict(rank=4),
    "dora": dict(rank=2), "ia3": {},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_updates_as_lora(params, tmp_path, name):
    cls = registry.get("peft", name)
    method = cls(**OTHERS[name], **({} if name == "ia3" else {"targets": TARGETS}))
    overlay = made(params, method)
    bound, want = bind(cut(params, bounds(overlay)), overlay), folded(params, overlay)
    exact = to_lora(bound, MODEL.table, 32)
    assert max(exact.errors.values()) < 1e-5 and exact.left == ()
    assert largest(folded(params, exact.file.overlay), want) < 1e-5 * 10
    low = to_lora(bound, MODEL.table, 2)
    again = folded(params, low.file.overlay)
    for module, error in low.errors.items():
        layer, part = int(module.split(".")[2]), module.rsplit(".", 1)[-1]
        key = next(k for k, s in MODEL.table.items() if s.kind == "kernel" and f".{part}." in s.hf)
        update = np.asarray(want[key][layer] - params[key][layer])
        measured = np.linalg.norm(want[key][layer] - again[key][layer]) / np.linalg.norm(update)
        tail = np.linalg.svd(update, compute_uv=False)
        assert abs(measured - error) < 1e-4
        assert abs(error - np.sqrt((tail[2:] ** 2).sum() / (tail**2).sum())) < 1e-4
    save_adapter(tmp_path, low.file.overlay, MODEL.table, low.file.method, base_path="some/tiny")
    opened = load_adapter(tmp_path, MODEL.table, params)
    assert largest(folded(params, opened.overlay), again) == 0


def test_a_difference_of_models_as_lora(params, adapters):
    tuned = folded(params, adapters.files["few"].overlay)
    norm = next(k for k, s in MODEL.table.items() if s.kind == "norm")
    tuned[norm] = tuned[norm] + 1
    converted = to_lora(tuned, MODEL.table, 3, base=params)
    assert converted.left == (norm,) and max(converted.errors.values()) < 1e-5
    want = {**tuned, norm: params[norm]}
    assert largest(folded(params, converted.file.overlay), want) < 5e-6
    with pytest.raises(ConfigError, match="no kernel differs"):
        to_lora(params, MODEL.table, 3, base=params)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "vera"])
def test_unmerged_is_the_base(params, name):
    overlay = made(params, registry.get("peft", name)(rank=2, targets=TARGETS))
    tuned = folded(params, overlay)
    assert largest(tuned, params) > 1e-2
    assert largest(unmerge(tuned, overlay), params) < 1e-6


@pytest.mark.parametrize("name", ["oft", "ia3", "dora"])
def test_only_additions_can_be_taken_off(params, name):
    overlay = made(params, registry.get("peft", name)(**OTHERS[name]))
    with pytest.raises(ConfigError, match="keep the base"):
        unmerge(folded(params, overlay), overlay)


def test_taps_are_no_updates(params):
    overlay = registry.get("peft", "prefix")().init(jax.random.key(0), MODEL.table, params)
    with pytest.raises(ConfigError, match="not a weight"):
        to_lora(bind(params, overlay), MODEL.table, 2)
    with pytest.raises(ConfigError, match="not a weight"):
        unmerge(params, overlay)
