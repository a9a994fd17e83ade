"""Adapters at run time: switching without recompiling, rows with adapters of their own, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftjax
from ftjax.errors import ConfigError
from ftjax.peft.adapters import load_adapters
from ftjax.peft.base import bind, cut_for, merge
from ftjax.peft.ia3 import IA3
from ftjax.peft.interop import AdapterFile, save_adapter
from ftjax.peft.lora import LoRA
from tests.tiny import llama, weights

MODEL = llama()
METHODS = {
    "small": LoRA(rank=2, alpha=8.0, targets=("q_proj", "v_proj")),
    "large": LoRA(rank=5, alpha=3.0, targets=("v_proj", "down_proj"), rslora=True),
    "few": LoRA(rank=3, alpha=4.0, targets=("q_proj",), layers=(1, 2)),
    "pissa": LoRA(rank=2, alpha=2.0, targets=("up_proj", "q_proj"), start="pissa"),
}


def moved(overlay, seed, leaves=("a", "b")):
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def one(path, x):
        return x + 0.2 * jax.random.normal(next(keys), x.shape) if path[-1].name in leaves else x

    return jax.tree_util.tree_map_with_path(one, overlay)


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


@pytest.fixture(scope="module")
def overlays(params):
    return {n: moved(m.init(jax.random.key(0), MODEL.table, params), i) for i, (n, m) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def folders(overlays, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, overlay in overlays.items():
        save_adapter(root / name, overlay, MODEL.table, METHODS[name], base_path="some/tiny")
    return {name: root / name for name in overlays}


@pytest.fixture(scope="module")
def adapters(params, folders):
    return load_adapters(MODEL, params, folders)


def inputs(rows, seed=0):
    ids = np.random.default_rng(seed).integers(3, 90, (rows, 12)).astype(np.int32)
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones_like(ids)}


def alone(params, overlays, name, batch):
    if name is None:
        return MODEL.apply(params, batch).logits
    return MODEL.apply(bind(cut_for(params, overlays[name], METHODS[name], MODEL.table), overlays[name]), batch).logits


def apart(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def test_switching_compiles_once(params, overlays, adapters):
    forward, batch = jax.jit(lambda p, x: MODEL.apply(p, x).logits), inputs(3)
    plain = alone(params, overlays, None, batch)
    for name in [*METHODS, None, "small"]:
        logits = forward(adapters.use(name), batch)
        assert apart(logits, alone(params, overlays, name, batch)) < 1e-5
        assert name is None or apart(logits, plain) > 1e-2
    assert forward._cache_size() == 1


def test_every_row_has_its_adapter(params, overlays, adapters):
    forward, batch = jax.jit(lambda p, x: MODEL.apply(p, x).logits), inputs(6)
    for names in (["large", None, "few", "small", "large", "pissa"], ["pissa", "pissa", None, None, "small", "few"]):
        logits = forward(adapters.rows(names), batch)
        for i, name in enumerate(names):
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
            assert apart(logits[i : i + 1], alone(params, overlays, name, one)) < 1e-5
    assert forward._cache_size() == 1


def test_half_precision(overlays, adapters):
    """In bfloat16 a mixed batch is what its rows are, up to the order of sums."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(MODEL))
    files = {n: AdapterFile(METHODS[n], o, "") for n, o in overlays.items()}
    mixed, batch, names = load_adapters(MODEL, low, files), inputs(4), ["large", None, "few", "small"]
    logits = MODEL.apply(mixed.rows(names), batch).logits.astype(jnp.float32)
    for i, name in enumerate(names):
        want = MODEL.apply(mixed.use(name), batch).logits[i].astype(jnp.float32)
        assert apart(logits[i], want) < 2e-2


def test_merging_one_of_them(params, overlays, adapters):
    folded = merge(adapters.use("few"), MODEL.table)
    want = merge(bind(cut_for(params, overlays["few"], METHODS["few"], MODEL.table), overlays["few"]), MODEL.table)
    assert set(folded) == set(want)
    for key, value in want.items():
        np.testing.assert_allclose(folded[key], value, atol=1e-6)
    with pytest.raises(ConfigError, match="no one merged weight"):
        merge(adapters.rows(["few"]), MODEL.table)


def test_what_is_refused(params, overlays, adapters):
    with pytest.raises(ConfigError, match="'lagre'.*large"):
        adapters.use("lagre")
    with pytest.raises(ConfigError, match="2 rows, but the batch is \\[3, 12"):
        MODEL.apply(adapters.rows(["few", "large"]), inputs(3))
    method = IA3()
    other = AdapterFile(method, method.init(jax.random.key(0), MODEL.table, params), "")
    lora = AdapterFile(METHODS["few"], overlays["few"], "")
    both = load_adapters(MODEL, params, {"ia3": other, "few": lora})
    assert apart(MODEL.apply(both.use("few"), inputs(2)).logits, alone(params, overlays, "few", inputs(2))) < 1e-5
    with pytest.raises(ConfigError, match="'ia3' is no LoRA"):
        both.rows(["few", "ia3"])


def test_weights_of_the_base_that_an_adapter_brings(params, overlays):
    norm = next(k for k, s in MODEL.table.items() if s.kind == "norm" and k.startswith("layers["))
    brought = np.asarray(params[norm]) + 0.5
    files = {n: AdapterFile(METHODS[n], overlays[n], "") for n in ("few", "large")}
    files["few"] = AdapterFile(METHODS["few"], overlays["few"], "", {norm: brought})
    both, batch = load_adapters(MODEL, params, files), inputs(2)
    assert (
        apart(MODEL.apply(both.use("few"), batch).logits, alone(params | {norm: brought}, overlays, "few", batch))
        < 1e-5
    )
    assert apart(MODEL.apply(both.use("large"), batch).logits, alone(params, overlays, "large", batch)) < 1e-5
    both.rows(["large", None])
    with pytest.raises(ConfigError, match="brings layers"):
        both.rows(["large", "few"])


def test_public_names():
    assert ftjax.load_adapters is load_adapters and callable(ftjax.merge_adapters) and callable(ftjax.to_lora)
