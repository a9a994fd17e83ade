"""Model folders: round trips, shards, stored dtypes, and what a user sees when a folder is broken."""

from __future__ import annotations

import json
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.errors import ConfigError, DataError
from ftjax.models import hf
from ftjax.models.llama import Rope
from ftjax.params import cut
from ftjax.peft.base import bind
from ftjax.peft.lora import LoRA
from ftjax.safefiles import open_tensors, read_json
from tests.tiny import llama, weights

EMBED, Q1 = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A good folder, to be broken."""
    model = llama(num_hidden_layers=2)
    return hf.save(model, weights(model), tmp_path / "model")


def change_tensors(folder, change):
    """Rewrites the weights after `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder, **changes):
    """Rewrites config.json; a value of None removes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def message(folder):
    """The error of loading."""
    with pytest.raises(DataError) as error:
        hf.load(str(folder))
    assert error.value.exit_code == 3
    return str(error.value)


# What works ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tied):
    model = llama(tie_word_embeddings=tied, attention_bias=True, rope=Rope(5e5, "llama3", 8.0, 1.0, 4.0, 16))
    params = weights(model)
    again, back = hf.load(str(hf.save(model, params, tmp_path)))
    assert again == model
    assert back.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert load_file(tmp_path / "model.safetensors")[Q1].shape == (32, 32)


def test_cut_stacks_are_saved_whole(folder):
    model, params = hf.load(str(folder))
    hf.save(model, cut(params, {"layers": [1]}), folder.parent / "again")
    before, after = (load_file(folder.parent / n / "model.safetensors") for n in ("model", "again"))
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_shards_equal_the_single_file(folder, monkeypatch):
    model, params = hf.load(str(folder))
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    shards = hf.save(model, params, folder.parent / "shards")
    names = sorted(p.name for p in shards.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    again, back = hf.load(str(shards))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_stored_dtypes(folder, stored, wanted):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(jnp.dtype(stored))

    change_tensors(folder, narrow)
    tensors = load_file(folder / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {stored}
    model, params = hf.load(str(folder), dtype=wanted)
    assert model.dtype == jnp.dtype(wanted)
    assert {str(x.dtype) for x in params.values()} == {wanted}
    np.testing.assert_array_equal(params["layers[0:2]/q/w"][1], tensors[Q1].T.astype(jnp.dtype(wanted)))


def test_saved_in_the_dtype_of_the_parameters(folder, tmp_path):
    model, params = hf.load(str(folder), dtype="bfloat16")
    again = hf.save(model, params, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(again / "model.safetensors")[EMBED].dtype == jnp.bfloat16


def test_tokenizer_files_come_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "secret.txt").write_text("no")
    model, params = hf.load(str(folder))
    again = hf.save(model, params, tmp_path / "again", tokenizer_from=folder)
    assert sorted(p.name for p in again.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    hf.save(model, params, again, tokenizer_from=again)  # onto itself
    assert (again / "tokenizer.json").read_text() == "{}"


def test_place_gets_every_parameter_once(folder):
    seen = []

    def place(model):
        return lambda key, x: seen.append(key) or jnp.asarray(x)

    model, params = hf.load(str(folder), place=place)
    assert sorted(seen) == sorted(params) and isinstance(params["layers[0:2]/q/w"], jax.Array)


def test_old_buffers_and_tied_copies_are_ignored(tmp_path):
    model = llama(tie_word_embeddings=True)
    folder = hf.save(model, weights(model), tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors[EMBED].copy()

    change_tensors(folder, add)
    jax.tree.map(np.testing.assert_array_equal, hf.load(str(folder))[1], weights(model))

    # transformers unties a head that differs, so it must not be dropped here in silence
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED] * 2}))
    assert "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight" in message(folder)


def test_first_bytes_of_a_good_file_are_no_evidence(tmp_path):
    """The header's length may look like the mark of a pickle (0x80) or of a zip archive (PK)."""
    for length in (0x80, 0x0480, 0x4B50):
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + struct.pack("<f", 7.0))
        with open_tensors(path) as f:
            assert f.get_tensor("a") == 7.0


# What is broken: files -------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path, folder):
    assert message(tmp_path / "nowhere") == f"no model folder at {tmp_path / 'nowhere'}"
    assert "is a file; a model is a folder with config.json" in message(folder / "config.json")
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty") == f"{tmp_path / 'empty'} has no config.json"


def test_an_unknown_hub_id_offline():
    text = message("nobody-here/no-such-model")
    assert text.startswith("no folder 'nobody-here/no-such-model', and the hub does not give it either")


def test_config_is_no_json(folder):
    (folder / "config.json").write_text("{'model_type': 'llama'}")
    assert "config.json: not valid JSON" in message(folder)
    (folder / "config.json").write_text("[1]")
    assert message(folder).endswith("config.json: expected an object, got list")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    assert "config.json: not valid JSON" in message(folder)
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json: not valid JSON" in message(folder)


def test_unreadable(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert message(folder).endswith("model.safetensors cannot be read: Is a directory")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_json(folder)


def test_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer, not the weights: run `git lfs pull`" in message(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"model.safetensors is truncated or not a safetensors file ({path.stat().st_size} bytes)" in message(folder)


def test_pickles_are_not_opened(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    assert "is a pickle, which can run code when opened" in message(folder)
    path.rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors (pytorch_model.bin is a pickle, which ftjax does not open" in message(folder)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "..\\model.safetensors", "C:\\x.safetensors", "sub/x", "..", ""]
)
def test_a_shard_outside_the_folder(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: shard}}))
    assert f"shard {shard!r} points outside the folder" in message(folder)


def test_broken_index(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {EMBED: "model-2.safetensors"}}))
    assert "names model-2.safetensors, which is not there" in message(folder)
    for bad in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {EMBED: 3}}):
        index.write_text(json.dumps(bad))
        assert message(folder).endswith("has no weight_map from tensor names to files")


# What is broken: tensors -----------------------------------------------------------------------------------------------


def test_missing_extra_misshapen_in_one_table(folder):
    def break_it(tensors):
        del tensors["model.norm.weight"], tensors[Q1]
        tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((3, 2), np.float32)
        tensors[EMBED] = tensors[EMBED][:-1]
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()

    change_tensors(folder, break_it)
    lines = message(folder).splitlines()
    assert lines[0] == f"{folder}: weights do not fit the model"
    assert set(lines[1:]) == {
        "  misshapen  lm_head.weight [32, 96], the model has [96, 32]",
        "  misshapen  model.embed_tokens.weight [95, 32], the model has [96, 32]",
        "  extra      model.layers.2.self_attn.q_proj.weight [3, 2]",
        "  missing    model.norm.weight",
        f"  missing    {Q1}",
    }


def test_a_long_table_is_cut(folder):
    change_tensors(folder, lambda t: t.update({f"x{i}": np.zeros(1, np.float32) for i in range(30)}))
    lines = message(folder).splitlines()
    assert len(lines) == 22 and lines[-1] == "  ... and 10 more"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_not_finite(folder, value, dtype):
    def break_it(tensors):
        tensors[Q1] = tensors[Q1].astype(jnp.dtype(dtype))
        tensors[Q1][3, 2] = value

    change_tensors(folder, break_it)
    assert f"non-finite {Q1} holds NaN or infinity" in message(folder)


def test_a_tensor_in_two_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({EMBED: tensors[EMBED]}, folder / "b.safetensors")
    names = dict.fromkeys(tensors, "model.safetensors") | {"again": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert f"extra  {EMBED}" in message(folder)


# What is broken: config.json -------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported. Did you mean 'llama'? Supported: "),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing; it decides what the model computes and has no safe default"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
        ({"hidden_size": "32"}, "hidden_size='32' is not supported; expected an integer"),
        ({"hidden_size": True}, "hidden_size=True is not supported; expected an integer"),
        ({"attention_bias": 1}, "attention_bias=1 is not supported; expected true or false"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
        ({"logit_softcap": 30.0}, "unknown settings of this model: logit_softcap"),
        ({"rope_parameters": None, "rope_theta": None}, "'rope_theta' is missing"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta='10000' is not supported; expected a number"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_scaling.rope_type='yarn' is not supported; expected default, linear or llama3",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'rope_scaling.factor' is missing"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3, "factor": "8"}},
            "rope_scaling.factor='8' is not supported; expected a number",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor=0.5 is not supported",
        ),
        ({"rope_parameters": [1]}, "rope_parameters=[1] is not supported; expected an object"),
    ],
)
def test_config_is_refused(folder, changes, text):
    change_config(folder, **changes)
    assert text in message(folder)


def test_harmless_settings_are_let_through(folder):
    change_config(folder, transformers_version="5.23.0", use_cache=True, attention_dropout=0.1, some_new_flag=False)
    assert hf.load(str(folder))[0] == llama(num_hidden_layers=2)


# Saving ----------------------------------------------------------------------------------------------------------------


def test_adapters_are_not_saved_as_a_plain_model(folder, tmp_path):
    model, params = hf.load(str(folder))
    overlay = LoRA(rank=2, targets=("q_proj",)).init(jax.random.key(0), model.table, params)
    with pytest.raises(ConfigError, match=r"layers\[0:2\]/q/w ...\): call ftjax.merge first, or save the adapter"):
        hf.save(model, bind(params, overlay), tmp_path / "out")
