"""Weight-level methods without PEFT: their equations by hand, exact round trips of their files, what they refuse."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.configfile import load
from ftjax.errors import ConfigError, DataError
from ftjax.headspec import HeadSpec
from ftjax.peft.base import bind
from ftjax.peft.dora import DoRA
from ftjax.peft.interop import load_adapter, save_adapter
from ftjax.peft.lora import LoRA
from ftjax.peft.norms import Norms, norm_keys
from ftjax.peft.oft import OFT, divisor
from ftjax.peft.vera import VeRA
from tests import tinymodels
from tests.tiny import llama, weights

MODEL = llama()


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


def drawn(method, params):
    """The method's overlay with every trained leaf moved at random."""
    overlay = method.init(jax.random.key(0), MODEL.table, params)
    keys = iter(jax.random.split(jax.random.key(9), 1000))

    def one(path, x):
        return x + 0.2 * jax.random.normal(next(keys), x.shape) if path[-1].name in type(method).trained else x

    return jax.tree_util.tree_map_with_path(one, overlay)


def saved(folder, method, params, **changes):
    overlay = drawn(method, params)
    save_adapter(folder, overlay, MODEL.table, method, base_path="some/tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    if changes:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return overlay


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refusal(folder, params):
    with pytest.raises(DataError) as error:
        load_adapter(folder, MODEL.table, params)
    return str(error.value)


FILES = [
    VeRA(rank=5, targets=("q", "down")),
    VeRA(rank=3, dropout=0.25, layers=(1, 3), targets=("k",), d_initial=0.5),
    OFT(block_size=4, targets=("q", "down")),
    OFT(blocks=3, exact=True, targets=("k",), layers=(0, 2)),
    OFT(block_size=16, share=True, terms=7),
]


@pytest.mark.parametrize("method", FILES, ids=repr)
def test_a_file_comes_back_exactly(tmp_path, params, method):
    overlay = saved(tmp_path, method, params)
    file = load_adapter(tmp_path, MODEL.table, params)
    assert jax.tree.structure(file.overlay) == jax.tree.structure(overlay)
    jax.tree.map(np.testing.assert_array_equal, file.overlay, overlay)
    same = {k: v for k, v in file.method.model_dump().items() if k != "targets"}
    assert same == {k: v for k, v in method.model_dump().items() if k != "targets"}
    assert file.method.keys(MODEL.table) == method.keys(MODEL.table)


# VeRA ------------------------------------------------------------------------------------------------------------------


def test_vera_shares_one_pair_of_projections(params):
    overlay = VeRA(rank=5, targets=("q", "k", "down")).init(jax.random.key(0), MODEL.table, params)
    q, k, down = (overlay[f"layers[0:4]/{name}/w"] for name in ("q", "k", "down"))
    assert down.p.shape == (4, 64, 5) and q.q.shape == (4, 5, 32) and k.q.shape == (4, 5, 16)
    np.testing.assert_array_equal(q.p[0], down.p[3][:32])
    np.testing.assert_array_equal(k.q[1], q.q[2][:, :16])
    assert float(jnp.abs(down.p).max()) <= (6 / 64) ** 0.5 and float(q.d.min()) == float(q.d.max()) == np.float32(0.1)
    assert not q.e.any()
    some = VeRA(rank=5, targets=("q", "k", "down"), layers=(2,)).init(jax.random.key(0), MODEL.table, params)
    np.testing.assert_array_equal(some["layers[2:3]/q/w"].p[0], q.p[0])


def test_vera_by_hand(params):
    delta = jax.tree.map(lambda x: x[1], drawn(VeRA(rank=3, targets=("q",)), params)["layers[0:4]/q/w"])
    x, w, b = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(2, 32), (32, 32), 32])
    )
    p, q, d, e = (np.asarray(getattr(delta, n), np.float64) for n in "pqde")
    want = x @ w + b + (x @ p * d) @ q * e
    np.testing.assert_allclose(delta.dot(jnp.asarray(x), jnp.asarray(w), jnp.asarray(b), None), want, atol=1e-4)
    np.testing.assert_allclose(x @ delta.merge(jnp.asarray(w)) + b, want, atol=1e-4)


def test_vera_files_need_their_projections(tmp_path, params):
    saved(tmp_path, VeRA(rank=4, targets=("q",)), params)
    change_tensors(tmp_path, lambda t: t.pop("base_model.vera_A"))
    assert "base_model.vera_A and base_model.vera_B are not in the file" in refusal(tmp_path, params)
    saved(tmp_path, VeRA(rank=4, targets=("q",)), params, save_projection=False)
    assert "torch's random numbers cannot be drawn again here" in refusal(tmp_path, params)
    saved(tmp_path, VeRA(rank=4, targets=("q",)), params)
    change_tensors(tmp_path, lambda t: t.update({"base_model.vera_B": t["base_model.vera_B"][:-1]}))
    assert "misshapen  base_model.vera_B [31, 4], expected [32, 4]" in refusal(tmp_path, params)


def test_vera_of_two_draws_has_no_file(tmp_path, params):
    method = VeRA(rank=4, targets=("q", "v"))
    overlay, other = drawn(method, params), method.init(jax.random.key(7), MODEL.table, params)
    overlay["layers[0:4]/v/w"] = other["layers[0:4]/v/w"]
    with pytest.raises(ConfigError, match="unlike projections"):
        save_adapter(tmp_path, overlay, MODEL.table, method, base_path="b")


# OFT -------------------------------------------------------------------------------------------------------------------


def oft_delta(params, **settings):
    method = OFT(targets=("q",), **settings)
    delta = method.init(jax.random.key(0), MODEL.table, params)["layers[0:4]/q/w"]
    g = 0.05 * jax.random.normal(jax.random.key(3), delta.g.shape)
    return jax.tree.map(lambda x: x[1], delta.replace(g=g))


def skew(g):
    size = int((1 + (1 + 8 * len(g)) ** 0.5) / 2)
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = g
    return q - q.T


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
def test_oft_by_hand(params, terms, share):
    delta = oft_delta(params, block_size=8, terms=terms, share=share)
    x, w, b = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(2, 32), (32, 32), 32])
    )
    whole = np.zeros((32, 32))
    for i in range(4):
        q = skew(np.asarray(delta.g, np.float64)[0 if share else i])
        power = np.linalg.matrix_power
        series = {
            2: np.eye(8) + 2 * q,
            3: np.eye(8) + 2 * q + 2 * power(q, 2) + power(q, 3),
            4: np.eye(8) + 2 * q + 2 * power(q, 2) + power(q, 3),
            5: np.eye(8) + 2 * q + 2 * power(q, 2) + 2 * power(q, 3) + power(q, 4),
            6: np.eye(8) + 2 * (q + power(q, 2) + power(q, 3) + power(q, 4)) + power(q, 5),
        }
        whole[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] = series[terms]
    want = x @ whole @ w + b
    np.testing.assert_allclose(delta.dot(jnp.asarray(x), jnp.asarray(w), jnp.asarray(b), None), want, atol=1e-4)
    np.testing.assert_allclose(delta.merge(jnp.asarray(w)), whole @ w, atol=1e-4)


def test_oft_is_orthogonal(params):
    """The exact form to rounding, the series to its first missing power; they turn opposite ways."""
    exact = np.asarray(oft_delta(params, block_size=8, exact=True).turn()) + np.eye(8)
    np.testing.assert_allclose(exact @ exact.swapaxes(-1, -2), np.broadcast_to(np.eye(8), exact.shape), atol=1e-6)
    gaps = []
    for terms in (2, 5, 9):
        series = np.asarray(oft_delta(params, block_size=8, terms=terms).turn()) + np.eye(8)
        gaps.append(np.abs(series @ exact - np.eye(8)).max())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-5


def test_oft_blocks(params):
    assert [divisor(24, n) for n in (1, 5, 7, 9, 10, 30)] == [1, 4, 6, 8, 8, 24]
    overlay = OFT(block_size=5, targets=("q", "down")).init(jax.random.key(0), MODEL.table, params)
    assert {k: d.g.shape for k, d in overlay.items()} == {
        "layers[0:4]/q/w": (4, 8, 6), "layers[0:4]/down/w": (4, 16, 6),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="the 32 inputs of layers/q/w fall into blocks of one feature"):
        OFT(blocks=32, targets=("q",)).keys(MODEL.table)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"coft": True}, "coft=True  is not supported"),
        ({"module_dropout": 0.5}, "module_dropout=0.5  is not supported"),
        ({"r": 2}, "r=2, oft_block_size=4  expected one of them"),
        ({"oft_block_size": None}, "oft_block_size=None  expected one of them"),
        ({"peft_version": None}, "PEFT before 0.18 means another series"),
        ({"peft_version": "0.17.1"}, "PEFT before 0.18 means another series"),
        ({"num_cayley_neumann_terms": 1}, "rotates nothing"),
        ({"num_cayley_neumann_terms": 2.5}, "expected a whole number above 0"),
    ],
)
def test_oft_settings_that_cannot_be_honoured(tmp_path, params, changes, line):
    saved(tmp_path, OFT(block_size=4, targets=("q",)), params, **changes)
    assert line in refusal(tmp_path, params)


# Norms -----------------------------------------------------------------------------------------------------------------


def norms_file(folder, params, keys=None, **changes):
    moved = {k: np.asarray(params[k]) + 1 for k in keys or norm_keys(MODEL.table)}
    save_adapter(folder, {}, MODEL.table, Norms(), base_path="some/tiny", saved=moved)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return moved, config


def test_norms_come_back_exactly(tmp_path, params):
    moved, config = norms_file(tmp_path, params)
    assert config["peft_type"] == "LN_TUNING" and config["modules_to_save"] is None
    assert sorted(config["target_modules"]) == ["input_layernorm", "norm", "post_attention_layernorm"]
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == 9 and names["base_model.model.model.norm.ln_tuning_layers.weight"].shape == (32,)
    file = load_adapter(tmp_path, MODEL.table, params)
    assert type(file.method) is Norms and file.overlay == {} and set(file.saved) == set(moved)
    jax.tree.map(np.testing.assert_array_equal, file.saved, moved)


def test_norms_of_some_layers(tmp_path, params):
    """What the file leaves out keeps the base's values."""
    norms_file(tmp_path, params, ["layers[0:4]/ln1/w"], target_modules=r"model\.layers\.[13]\.input_layernorm")
    change_tensors(tmp_path, lambda t: [t.pop(n) for n in list(t) if ".0." in n or ".2." in n])
    (key, value), *none = load_adapter(tmp_path, MODEL.table, params).saved.items()
    assert key == "layers[0:4]/ln1/w" and not none
    np.testing.assert_array_equal(value - np.asarray(params[key]), np.array([0, 1, 0, 1])[:, None] * np.ones(32))


def test_norms_that_do_not_fit(tmp_path, params):
    norms_file(tmp_path, params, target_modules=["LayerNorm"])
    assert "target_modules=['LayerNorm']  no norm of the model is called so" in refusal(tmp_path, params)
    norms_file(tmp_path, params, target_modules=["norm"])
    assert "layers.0.input_layernorm.ln_tuning_layers.weight [32]  no norm of the model" in refusal(tmp_path, params)
    norms_file(tmp_path, params)
    change_tensors(tmp_path, lambda t: t.pop("base_model.model.model.norm.ln_tuning_layers.weight"))
    assert "model.norm.ln_tuning_layers.weight  missing   expected [32]" in refusal(tmp_path, params)


def test_norms_beside_a_head(tmp_path):
    """The norms of a head that is trained as a whole are written with it."""
    model = tinymodels.known()["modernbert"](head=HeadSpec("sequence_classification", ("a", "b")))
    table, params = model.table, weights(model)
    trained = {k: np.asarray(params[k]) + 1 for k in {*norm_keys(table), *(k for k in table if k.startswith("head/"))}}
    save_adapter(tmp_path, {}, table, Norms(), base_path="b", task_type="SEQ_CLS", saved=trained)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "head"]
    assert not any("head.norm.ln_tuning" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    saved = load_adapter(tmp_path, table, params).saved
    assert set(saved) == set(trained)
    for key, value in saved.items():  # a layer without such a norm has no place in the file
        np.testing.assert_array_equal(value[table[key].since :], trained[key][table[key].since :])


def test_norms_with_statistics_have_no_such_file():
    tables = {name: make().table for name, make in tinymodels.known().items() if name in ("resnet", "llama", "vit")}
    held = {name: Norms.hf_codec.holds_base(table) for name, table in tables.items()}
    assert held == {"resnet": False, "llama": True, "vit": True}


# LoRA ------------------------------------------------------------------------------------------------------------------

INPUTS = {"input_ids": jnp.asarray(np.random.default_rng(0).integers(3, 96, (2, 9)), jnp.int32)}


@pytest.mark.parametrize("cls", [LoRA, DoRA])
def test_ranks_and_alphas_of_some_targets(params, cls):
    method = cls(
        rank=4,
        alpha=8.0,
        targets=("q", "v", "down"),
        ranks={"*.self_attn.*": 2, "q": 7, "down_proj": 6},
        alphas={"v": 1.0},
    )
    overlay = method.init(jax.random.key(0), MODEL.table, params)
    found = {k.split("/")[1]: (d.a.shape[-1], d.b.shape[-2], float(d.scale[0])) for k, d in overlay.items()}
    assert found == {"q": (2, 2, 4.0), "v": (2, 2, 0.5), "down": (6, 6, np.float32(8 / 6))}
    assert hash(method) and cls.model_validate_json(method.model_dump_json()) == method


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"ranks": {"qq": 2}}, "peft.ranks='qq' matches no weight"),
        ({"alphas": {"o": 2.0}}, "peft.alphas: 'o' is not among the targets"),
        ({"ranks": {"k": 17}}, "peft.rank=17 exceeds 16, the smaller side of layers/k/w"),
    ],
)
def test_ranks_that_cannot_be(settings, text):
    with pytest.raises(ConfigError) as error:
        LoRA(targets=("q", "k"), **settings).keys(MODEL.table)
    assert text in str(error.value)
    with pytest.raises(ValueError, match="k: 0 is not above 0"):
        LoRA(ranks={"k": 0})


def test_ranks_in_a_config(tmp_path):
    (tmp_path / "c.py").write_text(
        "from ftjax.config import Run\nfrom ftjax.data.tasks.local import Local\n"
        "from ftjax.models.sources import Pretrained\nfrom ftjax.peft.lora import LoRA\n"
        "def get_config():\n    return Run(name='x', model=Pretrained(path='m'), data=Local(path='d'),"
        " peft=LoRA(ranks={'q': 4}))\n"
    )
    assert load(tmp_path / "c.py").peft.ranks == (("q", 4),)
    assert load(tmp_path / "c.py", ['peft.ranks=[["v", 2]]', 'peft.alphas=[["v", 2]]']).peft == LoRA(
        ranks={"v": 2}, alphas={"v": 2.0}
    )
    with pytest.raises(ConfigError, match="peft.ranks.0.1  is missing: LoRA needs an int"):
        load(tmp_path / "c.py", ["peft.ranks=3"])


def test_ranks_come_back(tmp_path, params):
    method = LoRA(rank=4, alpha=8.0, targets=("q", "v"), ranks={"v": 2}, alphas={"v": 5.0})
    overlay = method.init(jax.random.key(0), MODEL.table, params)
    save_adapter(tmp_path, overlay, MODEL.table, method, base_path="b")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert set(config["rank_pattern"].values()) == {2} and set(config["alpha_pattern"].values()) == {5}
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, MODEL.table, params).overlay, overlay)


def test_lora_fa_trains_only_b():
    rules = dict(LoRA(train_a=False).labels(MODEL.table))
    assert rules["overlay/*/a"] == "const" and rules["overlay/*/b"] == "lora_b"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_starts_leave_the_base_as_it_is(params, start, dtype):
    """Bit for bit, whatever A and B hold."""
    base = jax.tree.map(lambda x: x.astype(dtype), params)
    method = LoRA(rank=4, alpha=6.0, start=start, layers=(0, 2))
    overlay = method.init(jax.random.key(0), MODEL.table, base)
    apply = jax.jit(lambda p: MODEL.apply(p, INPUTS).logits)
    np.testing.assert_array_equal(apply(bind(base, overlay)), apply(base))
    moved = {k: d.replace(b=d.b + 0.1) for k, d in overlay.items()}
    assert float(jnp.abs(apply(bind(base, moved)) - apply(base)).max()) > 1e-3


def test_pissa_takes_the_largest_parts(params):
    delta = LoRA(rank=3, alpha=6.0, start="pissa", targets=("down",)).init(jax.random.key(0), MODEL.table, params)
    w, d = (
        np.asarray(params["layers[0:4]/down/w"])[2],
        jax.tree.map(lambda x: np.asarray(x[2]), delta["layers[0:4]/down/w"]),
    )
    values = np.linalg.svd(w, compute_uv=False)
    rest = np.linalg.svd(w - d.scale * d.a @ d.b, compute_uv=False)
    np.testing.assert_allclose(rest[:-3], values[3:], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(d.a, axis=0), np.linalg.norm(d.b, axis=1), rtol=1e-4)


def test_two_pairs_are_written_as_one(tmp_path, params):
    method = LoRA(rank=3, alpha=6.0, start="olora", targets=("q", "down"), dropout=0.25)
    overlay = method.init(jax.random.key(0), MODEL.table, params)
    overlay = {k: d.replace(a=d.a + 0.1, b=d.b - 0.2) for k, d in overlay.items()}
    save_adapter(tmp_path, overlay, MODEL.table, method, base_path="b")
    file = load_adapter(tmp_path, MODEL.table, params)
    assert (file.method.rank, file.method.alpha, file.method.start) == (6, 12.0, "uniform")
    for key, d in overlay.items():
        np.testing.assert_allclose(file.overlay[key].merge(params[key]), d.merge(params[key]), atol=1e-5)
    x, key = jnp.ones((2, 32)), jax.random.key(0)
    delta, w = jax.tree.map(lambda x: x[0], (overlay["layers[0:4]/q/w"], params["layers[0:4]/q/w"]))
    kept = jnp.where(jax.random.bernoulli(key, 0.75, x.shape), x / 0.75, 0)
    want = x @ w + delta.scale * (
        kept @ delta.a @ delta.b - x @ delta.a0 @ delta.b0
    )  # dropout is on what is trained alone
    np.testing.assert_allclose(delta.dot(x, w, None, key), want, atol=1e-4)
