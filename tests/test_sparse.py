"""Sparse tuning: which entries, the equation by hand, files of any share, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.errors import ConfigError, DataError
from ftjax.ops import Adapted, dense
from ftjax.params import bounds, cut
from ftjax.peft.base import bind, merge
from ftjax.peft.interop import load_adapter, save_adapter
from ftjax.peft.sparse import Sparse
from tests.tiny import largest, llama, weights

MODEL = llama()
Q = "layers[0:4]/q/w"


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


def made(method, params, seed=0):
    overlay = method.init(jax.random.key(seed), MODEL.table, params)
    return {
        k: d.replace(values=jax.random.normal(jax.random.key(i), d.values.shape))
        for i, (k, d) in enumerate(overlay.items())
    }


def places(delta):
    return [set(map(tuple, layer.T.tolist())) for layer in np.asarray(delta.index)]


def test_the_largest_entries(params):
    delta = Sparse(rank=2, targets=("q_proj",)).init(jax.random.key(0), MODEL.table, params)[Q]
    assert delta.values.shape == (4, 2 * 64) and not delta.values.any()
    for layer, found in enumerate(places(delta)):
        w = np.abs(np.asarray(params[Q][layer]))
        kept = np.zeros(w.shape, bool)
        kept[tuple(np.array(sorted(found)).T)] = True
        assert kept.sum() == 128 and w[kept].min() >= w[~kept].max()


def test_drawn_entries_follow_seed_and_layer(params):
    def drawn(seed=0, **settings):
        method = Sparse(share=0.1, choose="random", targets=("q_proj",), **settings)
        return method.init(jax.random.key(seed), MODEL.table, params)

    first = places(drawn()[Q])
    assert all(len(p) == 102 for p in first) and first[0] != first[1]
    assert first == places(drawn()[Q]) != places(drawn(1)[Q])
    assert places(drawn(1, draw=5)[Q]) == places(drawn(2, draw=5)[Q]) != first
    assert places(drawn(layers=(2, 3))["layers[2:4]/q/w"]) == first[2:]
    rows, columns = (np.array([list(x)[0][side] for x in first]) for side in (0, 1))
    assert (rows < 32).all() and (columns < 32).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equation(params, dtype):
    delta = made(Sparse(rank=3, targets=("q_proj",)), params)[Q]
    x = jax.random.normal(jax.random.key(3), (5, 32)).astype(dtype)
    bias = jnp.arange(32.0)
    for layer in range(4):
        one = jax.tree.map(lambda v, i=layer: v[i], delta)
        full = np.asarray(params[Q][layer]).copy()
        for (i, j), v in zip(np.asarray(one.index).T, np.asarray(one.values), strict=True):
            full[i, j] += v
        got = np.asarray(dense(x, Adapted(params[Q][layer].astype(dtype), one), bias), np.float32)
        want = np.asarray(x, np.float32) @ full + np.asarray(bias)
        assert np.abs(got - want).max() <= (1e-5 if dtype == "float32" else 2e-2) * np.abs(want).max()
        np.testing.assert_allclose(Adapted(params[Q][layer], one).materialize(), full, atol=1e-6)


def test_only_the_values_learn(params):
    overlay = made(Sparse(rank=2), params)
    ids = jnp.arange(12, dtype=jnp.int32)[None] + 3

    def loss(values):
        placed = {k: d.replace(values=values[k]) for k, d in overlay.items()}
        return (
            MODEL.apply(bind(params, placed), {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}).logits ** 2
        ).sum()

    def whole(store):
        return (MODEL.apply(store, {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}).logits ** 2).sum()

    grads = jax.grad(loss)({k: d.values for k, d in overlay.items()})
    dense_grads = jax.grad(whole)(merge(bind(params, overlay), MODEL.table))
    for key, grad in grads.items():
        for layer in range(4):
            want = dense_grads[key][layer][tuple(overlay[key].index[layer])]
            assert float(jnp.abs(grad[layer] - want).max()) <= 2e-4 * float(jnp.abs(want).max())


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_any_share_in_a_file(params, tmp_path, share):
    """PEFT keeps r (in + out) entries: zeros fill up the others."""
    method = Sparse(share=share, choose="random", targets=("q_proj", "down_proj"))
    overlay = made(method, params)
    save_adapter(tmp_path, overlay, MODEL.table, method, base_path="some/tiny")
    file = load_adapter(tmp_path, MODEL.table, params)
    both = (merge(bind(cut(params, bounds(o)), o), MODEL.table) for o in (overlay, file.overlay))
    assert largest(*both) == 0
    for delta in file.overlay.values():
        assert delta.values.shape[-1] == file.method.rank * sum(delta.shape)
        assert all(len(p) == delta.values.shape[-1] for p in places(delta))


def test_what_is_refused(params, tmp_path):
    with pytest.raises(ConfigError, match="1280 entries are more than the 1024"):
        Sparse(rank=20, targets=("q_proj",)).init(jax.random.key(0), MODEL.table, params)
    full = Sparse(share=1.0, targets=("q_proj", "down_proj"))
    with pytest.raises(ConfigError, match="smaller peft.share"):
        save_adapter(tmp_path, made(full, params), MODEL.table, full, base_path="some/tiny")
    method = Sparse(rank=2, targets=("q_proj",))
    save_adapter(tmp_path, made(method, params), MODEL.table, method, base_path="some/tiny")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(k for k in tensors if k.endswith("shira_indices"))
    as_floats = {k: v.astype(np.float32) for k, v in tensors.items()}
    save_file(as_floats, tmp_path / "adapter_model.safetensors")
    assert load_adapter(tmp_path, MODEL.table, params).overlay[Q].index.dtype == jnp.int32
    for wrong in (32, -1):
        damaged = tensors[name].copy()
        damaged[0, 0] = wrong
        save_file(tensors | {name: damaged}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(DataError, match="outside of the weight"):
            load_adapter(tmp_path, MODEL.table, params)
