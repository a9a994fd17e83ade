"""ReFT: which places are edited, R after every step, packed rows, decoding, files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from ftjax import registry
from ftjax.data.batches import Example, Examples, build_rows
from ftjax.errors import ConfigError, DataError
from ftjax.generate.decode import decode
from ftjax.generate.sampling import Sampling
from ftjax.models.layers import Seq
from ftjax.objectives.causal_lm import model_inputs
from ftjax.params import bounds, cut
from ftjax.peft.base import bind
from ftjax.peft.interop import load_adapter, save_adapter
from ftjax.peft.reft import DiReFT, LoReFT, NoReFT, orthonormal, parse_positions
from ftjax.rows import places, prompt_lengths
from ftjax.train.setup import check_prompts
from tests import tiny, tinymodels

NAMES = ("loreft", "noreft", "direft")


def test_places_and_prompt_lengths():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 6, 4)
        sizes[0] = 20 - sizes[1:].sum()
        segments = np.concatenate([[-2] * sizes[0], *([i] * n for i, n in enumerate(sizes[1:]))])[None]
        trained = rng.random(segments.shape) < 0.3
        at, n = places(jnp.asarray(segments))
        prompts = np.asarray(prompt_lengths(jnp.asarray(segments), jnp.asarray(trained)))
        start = 0
        for size in sizes:
            here = slice(start, start + size)
            np.testing.assert_array_equal(at[0, here], np.arange(size))
            assert (np.asarray(n)[0, here] == size).all()
            first = np.flatnonzero(trained[0, here])
            assert (prompts[0, here] == (first[0] if len(first) else size)).all()
            start += size


@pytest.mark.parametrize("positions, want", [("f7+l7", (7, 7)), ("f1", (1, 0)), ("l12", (0, 12)), ("all", (0, 0))])
def test_positions(positions, want):
    assert parse_positions(positions) == want


@pytest.mark.parametrize("positions", ["", "7", "f0", "l3+f3", "f3+l", "f-1", "f1,l1", "all+f1", "All"])
def test_positions_that_mean_nothing(positions):
    with pytest.raises(ValidationError, match="positions"):
        LoReFT(positions=positions)


def test_which_places_are_edited():
    """Two packed examples after padding: 9 tokens with a prompt of 7, 4 with one of 3."""
    segments = jnp.asarray([[-2, -2] + [0] * 9 + [1] * 4])
    prompt = jnp.asarray([[0, 0] + [7] * 9 + [3] * 4])
    h = jax.random.normal(jax.random.key(0), (1, 15, 32))
    table, want = tiny.llama().table, {}
    want["f2+l5"] = [2, 3, 6, 7, 8, 11, 13]  # 2 and 3 of 7 (half of it), 1 and 1 of 3
    want["l1"] = [8, 13]
    want["f2"] = [2, 3, 11]
    for positions, columns in want.items():
        (tap,) = NoReFT(positions=positions).init(jax.random.key(1), table, {}).values()
        one = jax.tree.map(lambda x: x[0], tap)
        moved = (one(h, Seq(None, segments, segments, prompt)) != h).any(-1)
        assert np.flatnonzero(moved[0]).tolist() == columns
        later = Seq(None, segments, segments, prompt, first=False)
        assert one(h, later) is h
    (tap,) = NoReFT(positions="all").init(jax.random.key(1), table, {}).values()
    one = jax.tree.map(lambda x: x[0], tap)
    for first in (True, False):
        moved = (one(h, Seq(None, segments, segments, prompt, first=first)) != h).any(-1)
        assert np.flatnonzero(moved[0]).tolist() == list(range(2, 15))


def test_rows_stay_orthonormal_after_every_step():
    from ftjax import config

    t = tiny.tiny(LoReFT(rank=3), optim=config.Optim(lr=0.1, weight_decay=0.1))
    state, step = t.state, jax.jit(t.program.train)
    data = tiny.batch(8, micro=1)
    seen = []
    for _ in range(5):
        (tap,) = [e for e in state.trainable["overlay"].values() if e is not None]
        R = tap.rotation
        np.testing.assert_allclose(R @ R.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (*R.shape[:2], 3, 3)), atol=2e-6)
        seen.append(R)
        state, _ = step(state, t.frozen, data)
    assert float(jnp.abs(seen[-1] - seen[0]).max()) > 0.1


def test_orthonormal_is_gram_schmidt():
    a = jax.random.normal(jax.random.key(0), (5, 4, 16)) * jnp.asarray([1.0, 10.0, 0.1, 3.0])[:, None]
    q = orthonormal(a)
    np.testing.assert_allclose(q @ q.swapaxes(-1, -2), np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-6)
    mix = np.asarray(a @ q.swapaxes(-1, -2))
    assert np.abs(np.triu(mix, 1)).max() < 1e-4 and (np.diagonal(mix, axis1=1, axis2=2) > 0).all()
    np.testing.assert_allclose(orthonormal(q), q, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_equal_single_ones(name):
    """Three examples of unequal prompts in one row and in a row each."""
    rng = np.random.default_rng(0)
    examples = []
    for n, prompt in ((9, 5), (6, 4), (12, 11)):
        weights = (np.arange(n) >= prompt).astype(np.float32)
        examples.append(Example(rng.integers(3, tiny.VOCAB, n).astype(np.int32), weights))
    method = registry.get("peft", name)(positions="f2+l3", layers=(0, 2))
    model = tiny.llama()
    base = tiny.weights(model)
    overlay = method.init(jax.random.key(0), model.table, base)
    params = bind(cut(base, bounds(overlay)), overlay)
    assert {k for k in overlay} == {"layers[0:1]/residual", "layers[2:3]/residual"}

    apply = jax.jit(model.apply)

    def logits(rows, length):
        batch = jax.tree.map(jnp.asarray, build_rows(rows, length))
        return np.asarray(apply(params, model_inputs(batch)).logits)

    lengths = model_inputs(jax.tree.map(jnp.asarray, build_rows([examples], 30)))["prompt_len"][0, [0, 9, 15]]
    assert lengths.tolist() == [5, 4, 11]
    packed = logits([examples], 30)[0]
    start = 0
    for row in examples:
        n = len(row)
        np.testing.assert_allclose(packed[start : start + n], logits([[row]], 14)[0, :n], atol=2e-5)
        start += n


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, dict(tied=True, rank=2), dict(positions="l3", layers=(1,)), dict(positions="all")], ids=str
)
def test_round_trip(tmp_path, family, name, options):
    model = tinymodels.known()[family]()
    base, method = tiny.weights(model), registry.get("peft", name)(**options)
    overlay = method.init(jax.random.key(0), model.table, base)
    save_adapter(tmp_path, overlay, model.table, method, base_path="the/base")
    file = load_adapter(tmp_path, model.table, base)
    assert (file.method, file.base_path) == (method, "the/base")
    assert jax.tree.structure(file.overlay) == jax.tree.structure(overlay)
    assert tiny.largest(file.overlay, overlay) < (2e-6 if name == "loreft" else 1e-30)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    unseen = name == "loreft" or method.positions == "all"
    assert ("config" in config) != unseen  # what AdapterHub would read in part, or not at all, it does not find
    layer = {"llama": "model.layers.1.", "bert": "bert.encoder.layer.1."}[family]
    tensor = load_file(tmp_path / "adapter.safetensors")[f"{layer}reft_layer.refts.default.units.0.projection.weight"]
    assert tensor.shape == (method.rank, model.config.hidden_size)


def hub_file(folder, *, tensors=None, **changes):
    """A NoReFT or DiReFT of rank 2 on the prompt's last 3 tokens behind layer 1, as AdapterHub writes it: two units."""
    model = tiny.llama()
    rng = np.random.default_rng(0)
    shapes = {"learned_source.weight": (2, 32), "learned_source.bias": (2,), "projection.weight": (2, 32)}
    drawn = {
        f"model.layers.1.reft_layer.refts.edit.units.{u}.{k}": rng.normal(size=s).astype(np.float32)
        for u in range(2)
        for k, s in shapes.items()
    }
    settings = {
        "architecture": "reft", "dropout": 0.05, "dtype": None, "layers": [1], "non_linearity": None,
        "orthogonality": False, "output_reft": True, "prefix_positions": 0, "r": 2, "suffix_positions": 3,
        "tied_weights": False,
    }  # fmt: skip
    outer = {"config": settings | changes, "model_name": "some/llama", "name": "edit", "version": "adapters.1.1.0"}
    save_file(drawn | (tensors or {}), folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(outer))
    return model, tiny.weights(model), drawn


def test_a_file_of_adapterhub(tmp_path):
    model, base, drawn = hub_file(tmp_path)
    file = load_adapter(tmp_path, model.table, base)
    assert file.method == NoReFT(rank=2, positions="l3", layers=(1,))
    (tap,) = file.overlay.values()
    stem = "model.layers.1.reft_layer.refts.edit.units.1."  # the suffix's, although it is alone
    np.testing.assert_array_equal(tap.w[0, 0], drawn[stem + "learned_source.weight"])
    np.testing.assert_array_equal(tap.r[0, 0], drawn[stem + "projection.weight"])
    hub_file(tmp_path, subtract_projection=False)
    assert load_adapter(tmp_path, model.table, base).method == DiReFT(rank=2, positions="l3", layers=(1,))


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(non_linearity="relu"), "non_linearity='relu' +is not supported"),
        (dict(suffix_positions=0), "edit nothing"),
        (dict(all_positions=True), "suffix_positions=3 +and all_positions=True exclude each other"),
        (dict(all_positions=1), "all_positions=1 +expected true or false"),
        (dict(orthogonality=True), "rows of a projection are not orthonormal"),
        (dict(orthogonality=True, subtract_projection=False), "is not supported"),
        (dict(layers=[1, 2]), r"layers\.2.*missing"),
        (dict(r=3), r"misshapen \[2, 32\], expected \[3, 32\]"),
    ],
)
def test_what_is_refused(tmp_path, changes, match):
    model, base, _ = hub_file(tmp_path, **changes)
    with pytest.raises(DataError, match=match):
        load_adapter(tmp_path, model.table, base)


@pytest.mark.parametrize(
    "method, match",
    [
        (LoReFT(rank=33), "peft.rank=33 exceeds 32"),
        (LoReFT(layers=(4,)), r"peft.layers=4: the model has no such layer"),
    ],
)
def test_settings_that_do_not_fit(method, match):
    with pytest.raises(ConfigError, match=match):
        method.labels(tiny.llama().table)


def test_no_prompt_no_reft():
    with pytest.raises(ConfigError, match="no prompt of tokens"):
        LoReFT().labels(tinymodels.known()["vit"]().table)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_position_when_decoding(family):
    """Answers made with the cache are those of the whole text, prompt and answer edited; of two sides both are."""
    model = tinymodels.known()[family]()
    base, method = tiny.weights(model), DiReFT(positions="all", rank=8)
    drawn = method.init(jax.random.key(0), model.table, base)
    overlay = {k: tap.replace(w=5 * tap.w, r=5 * tap.r) for k, tap in drawn.items()}
    stacks = {"llama": ["layers"], "t5": ["encoder", "decoder"]}[family]
    assert [k.split("[")[0] for k in overlay] == stacks
    params = bind(cut(base, bounds(overlay)), overlay)
    prompts = [np.asarray(row, np.int32) for row in ([5, 9, 31, 7, 8, 44], [61, 12, 3])]
    pieces = list(decode(model, params, prompts, Sampling(), limits=[8] * 2, eos=[], pad=0))
    made = [[t for piece in pieces for t in piece[i]] for i in range(2)]
    for prompt, answer in zip(prompts, made, strict=True):
        inputs = {
            "input_ids": jnp.asarray([[*prompt, *answer]]),
            "prompt_len": jnp.full((1, len(prompt) + 8), len(prompt)),
        }
        at = len(prompt) - 1
        if family == "t5":
            inputs = {"input_ids": jnp.asarray(prompt)[None], "decoder_input_ids": jnp.asarray([[0, *answer]])}
            at = 0
        whole, plain = (model.apply(p, inputs).logits[0, at : at + 8].argmax(-1).tolist() for p in (params, base))
        assert whole == answer != plain


def test_texts_without_prompts():
    examples = Examples.of([Example(np.arange(3, 9, dtype=np.int32), np.asarray([0, 1, 1, 1, 1, 1], np.float32))])
    with pytest.raises(ConfigError, match="peft.positions=all"):
        check_prompts(LoReFT(), examples)
    check_prompts(LoReFT(positions="all"), examples)
