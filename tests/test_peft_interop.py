"""Adapter folders in PEFT's format without PEFT: exact round trips, what is written, and what is refused."""

from __future__ import annotations

import dataclasses as dc
import json
import pickle
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from safetensors.numpy import load_file, save_file

from ftjax import registry
from ftjax.errors import ConfigError, DataError
from ftjax.headspec import HeadSpec
from ftjax.peft.full import Full
from ftjax.peft.interop import head_of, load_adapter, save_adapter
from ftjax.peft.lora import LoRA
from ftjax.peft.modules import ModuleCodec
from ftjax.schema import Component
from tests.tiny import llama, weights

MODEL = llama()
A, B = "lora_A.weight", "lora_B.weight"
Q2 = "base_model.model.model.layers.2.self_attn.q_proj."


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


def drawn(method, table=MODEL.table):
    """An overlay with nothing zero."""
    overlay = method.init(jax.random.key(0), table, {})
    return {k: d.replace(b=jax.random.normal(jax.random.key(i), d.b.shape)) for i, (k, d) in enumerate(overlay.items())}


def saved(folder, method=None, overlay=None, **changes):
    """An adapter folder; `changes` go into its configuration."""
    method = method or LoRA(rank=4, targets=("q_proj", "v_proj"))
    save_adapter(folder, drawn(method) if overlay is None else overlay, MODEL.table, method, base_path="some/tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    if changes:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return config


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def message(folder, params, **options):
    with pytest.raises(DataError) as error:
        load_adapter(folder, MODEL.table, params, **options)
    assert type(error.value) is DataError and error.value.exit_code == 3
    return str(error.value)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# What works ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, targets, layers",
    [
        (LoRA(), 7, None),
        (LoRA(rank=3, alpha=0.1, targets=("q", "v"), rslora=True, dropout=0.1), ["q_proj", "v_proj"], None),
        (LoRA(rank=7, alpha=13.37, targets=("k_proj",), layers=(0, 2, 3)), ["k_proj"], [0, 2, 3]),
        (LoRA(rank=1, targets=("lm_head",)), ["lm_head"], None),
        (
            LoRA(rank=2, targets=("lm_head", "q_proj"), layers=(1,)),
            ["1.self_attn.q_proj", "lm_head"],
            None,
        ),
    ],
)
def test_round_trip_is_exact(tmp_path, params, method, targets, layers):
    overlay = drawn(method)
    config = saved(tmp_path, method, overlay)
    file = load_adapter(tmp_path, MODEL.table, params)
    same(file.overlay, overlay)
    assert file.base_path == "some/tiny"
    assert len(config["target_modules"]) == 7 if targets == 7 else sorted(config["target_modules"]) == targets
    assert config["layers_to_transform"] == layers
    got = file.method
    assert (got.rank, got.alpha, got.dropout, got.rslora) == (method.rank, method.alpha, method.dropout, method.rslora)
    if method.layers == (1,):  # targets and layers cannot say this one; the overlay is the truth
        assert sorted(got.targets) == ["lm_head", "self_attn.q_proj"]
    else:
        assert got.keys(MODEL.table) == method.keys(MODEL.table)
    # and a second time
    save_adapter(tmp_path / "again", file.overlay, MODEL.table, file.method, base_path="some/tiny")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_is_written(tmp_path):
    method = LoRA(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    save_adapter(
        tmp_path, drawn(method), MODEL.table, method, base_path="my/base", task_type="SEQ_CLS", card="# card\n"
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "my/base", "revision": None,
        "auto_mapping": None, "inference_mode": True, "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "fan_in_fan_out": False,
        "modules_to_save": None, "target_modules": ["down_proj", "q_proj"], "layers_to_transform": None,
        "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    assert (tmp_path / "README.md").read_text() == "# card\n"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4
    assert tensors[Q2 + A].shape == (4, 32) and tensors[Q2 + B].shape == (32, 4)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj." + A].shape == (4, 64)
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(tensors[Q2 + B], drawn(method)["layers[0:4]/q/w"].b[2].T)


def test_ranks_and_scales_are_the_overlays_own(tmp_path, params):
    """A sweep varies alpha as an array and pads ranks with zeros; the file must say what was trained, not the config."""
    method = LoRA(rank=4, alpha=8.0, targets=("q", "v"))
    overlay = drawn(method)
    q, v = overlay["layers[0:4]/q/w"], overlay["layers[0:4]/v/w"]
    overlay["layers[0:4]/q/w"] = q.replace(scale=jnp.asarray([2, 2, 0.3, 2], jnp.float32))
    overlay["layers[0:4]/v/w"] = v.replace(a=v.a[..., :2], b=v.b[:, :2])
    config = saved(tmp_path, method, overlay)
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert config["rank_pattern"] == {f"model.layers.{i}.self_attn.v_proj": 2 for i in range(4)}
    assert config["alpha_pattern"] == {
        "model.layers.2.self_attn.q_proj": 1.2, **{f"model.layers.{i}.self_attn.v_proj": 4 for i in range(4)}
    }  # fmt: skip
    same(load_adapter(tmp_path, MODEL.table, params).overlay, overlay)


def test_unequal_ranks_become_ranges(tmp_path, params):
    def narrow(tensors):
        tensors[Q2 + A], tensors[Q2 + B] = tensors[Q2 + A][:1].copy(), tensors[Q2 + B][:, :1].copy()

    saved(tmp_path, LoRA(rank=4, targets=("q",)), rank_pattern={r"layers\.2\.self_attn\.q_proj": 1})
    change_tensors(tmp_path, narrow)
    overlay = load_adapter(tmp_path, MODEL.table, params).overlay
    assert {k: d.a.shape for k, d in overlay.items()} == {
        "layers[0:2]/q/w": (2, 32, 4), "layers[2:3]/q/w": (1, 32, 1), "layers[3:4]/q/w": (1, 32, 4),
    }  # fmt: skip
    assert float(overlay["layers[2:3]/q/w"].scale[0]) == 16.0 and float(overlay["layers[0:2]/q/w"].scale[0]) == 4.0


def test_a_weight_that_is_stored_as_ours_is_declared(tmp_path):
    """GPT-2's Conv1D holds [in, out]; PEFT calls that fan_in_fan_out."""
    table = {k: dc.replace(s, transposed=False) if k.endswith("/q/w") else s for k, s in MODEL.table.items()}
    for targets, straight in ((("q",), True), (("v",), False)):
        method = LoRA(rank=2, targets=targets)
        save_adapter(tmp_path, drawn(method, table), table, method, base_path="")
        assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is straight


def test_a_copy_of_the_base_is_let_through(tmp_path, params):
    """PEFT writes the frozen head beside its adapter when the head is among the targets."""
    name = "base_model.model.lm_head.base_layer.weight"
    head = np.asarray(params["head/w"]).T
    saved(tmp_path, LoRA(rank=2, targets=("lm_head",)))
    change_tensors(tmp_path, lambda t: t.update({name: head.copy()}))
    assert list(load_adapter(tmp_path, MODEL.table, params).overlay) == ["head/w"]
    change_tensors(tmp_path, lambda t: t.update({name: head + 1}))
    assert "a weight of the base, with other values than here" in message(tmp_path, params)
    change_tensors(tmp_path, lambda t: t.update({name: np.concatenate([head, head[:1]])}))
    assert f"extra  {name} [97, 32]  a weight of the base, with other values" in message(tmp_path, params)


@pytest.mark.parametrize(
    "named, given, warns",
    [
        ("some/tiny", "/models/tiny", False),
        ("C:\\models\\Tiny\\", "other/tiny", False),
        ("..\\..\\tiny", "tiny", False),
        ("../../etc/passwd", "tiny", True),
        ("some/tiny", "some/huge", True),
        (None, "some/huge", False),
    ],
)
def test_another_base_is_a_warning(tmp_path, params, named, given, warns):
    """The base's name is compared and never opened; folders move, so that only its last part counts."""
    saved(tmp_path, base_model_name_or_path=named)
    if not warns:
        load_adapter(tmp_path, MODEL.table, params, base_path=given)
        return
    with pytest.warns(UserWarning) as warning:
        load_adapter(tmp_path, MODEL.table, params, base_path=given)
    assert str(warning[0].message) == f"{tmp_path} was made for {named!r}; it is laid over {given!r}"


# What is refused: files ------------------------------------------------------------------------------------------------


def test_files(tmp_path, params):
    assert message(tmp_path / "nowhere", params) == f"no adapter folder at {tmp_path / 'nowhere'}"
    saved(tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    assert message(config, params) == f"no adapter folder at {config} (a file is)"

    good = tensors.read_bytes()
    tensors.write_bytes(good[:-3])
    assert "adapter_model.safetensors is truncated or not a safetensors file" in message(tmp_path, params)
    tensors.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer, not the weights" in message(tmp_path, params)
    tensors.unlink()
    assert message(tmp_path, params) == f"{tmp_path}: no adapter_model.safetensors"
    config.write_text("{")
    assert "adapter_config.json: not valid JSON" in message(tmp_path, params)
    config.unlink()
    assert message(tmp_path, params) == f"{tmp_path} has no adapter_config.json"


def test_pickles_are_not_opened(tmp_path, params):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    saved(tmp_path)
    tensors = tmp_path / "adapter_model.safetensors"
    tensors.write_bytes(pickle.dumps(Bomb()))
    assert "is a pickle, which can run code when opened" in message(tmp_path, params)
    tensors.rename(tmp_path / "adapter_model.bin")
    text = message(tmp_path, params)
    assert text.endswith(
        "no adapter_model.safetensors; adapter_model.bin is a pickle, which can run code when opened: convert it"
    )
    assert not (tmp_path / "boom").exists()


# What is refused: settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["LORRA", None, "BOFT", 3])
def test_unknown_type(tmp_path, params, value):
    saved(tmp_path, peft_type=value)
    text = message(tmp_path, params)
    assert f"adapter_config.json: peft_type {str(value)!r} is not supported." in text and "Supported: " in text
    assert "LORA" in text.split("Supported: ")[1]
    assert ("Did you mean 'LORA'?" in text) == (value == "LORRA")


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"lora_bias": True}, "lora_bias=True  is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only'  is not supported; supported: 'none'"),
        ({"bias": "all"}, "bias='all'  is not supported; supported: 'none'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=[1, 2]  is not supported"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices=[5]  is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]]  is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters=['x']  is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'  is not supported; supported: True, 'gaussian'"),
        ({"use_qalora": True}, "use_qalora=True  is not supported"),
        ({"something_of_2027": 1}, "something_of_2027=1  is not supported"),
        ({"r": 0}, "r=0  expected an integer above 0"),
        ({"r": None}, "r=None  expected an integer above 0"),
        ({"r": True}, "r=True  expected an integer above 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj=1.5  expected an integer above 0"),
        ({"rank_pattern": [1]}, "rank_pattern=[1]  expected an object"),
        ({"lora_alpha": None}, "lora_alpha=None  expected a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha='16'  expected a number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0  expected a number of at least 0 and below 1"),
        ({"use_rslora": 1}, "use_rslora=1  expected true or false"),
    ],
)
def test_settings_that_would_be_ignored(tmp_path, params, changes, line):
    saved(tmp_path, **changes)
    text = message(tmp_path, params)
    assert text.startswith(f"{tmp_path}: adapter_config.json has settings that cannot be honoured\n") and line in text


def test_harmless_settings_are_let_through(tmp_path, params):
    saved(tmp_path, peft_version="0.21.2", loftq_config={}, megatron_core="megatron.core", qalora_group_size=16,
          something_of_2027=None, revision="main", init_lora_weights="gaussian")  # fmt: skip
    load_adapter(tmp_path, MODEL.table, params)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"target_modules": None}, "adapter_config.json: target_modules is missing"),
        ({"target_modules": "(q_proj"}, "target_modules='(q_proj' is neither a list nor a pattern: missing )"),
        ({"target_modules": 5}, "target_modules=5 is neither a list nor a pattern"),
        ({"target_modules": [5]}, "target_modules=[5] is neither a list nor a pattern"),
        ({"rank_pattern": {"(q": 4}}, "adapter_config.json: '(q' is no regular expression"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform=['1']"),
        ({"layers_pattern": "(h", "layers_to_transform": [1]}, "layers_pattern"),
    ],
)
def test_targets_that_cannot_be_read(tmp_path, params, changes, text):
    saved(tmp_path, **changes)
    assert text in message(tmp_path, params)


# What is refused: tensors ----------------------------------------------------------------------------------------------


def test_missing_extra_misshapen_in_one_table(tmp_path, params):
    def break_it(tensors):
        del tensors[Q2 + A]
        tensors[Q2 + B] = tensors[Q2 + B].T.copy()
        tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 96), np.float32)
        tensors["base_model.model.model.layers.1.input_layernorm.ln_tuning_layers.weight"] = np.zeros(32, np.float32)

    saved(tmp_path)
    change_tensors(tmp_path, break_it)
    lines = message(tmp_path, params).splitlines()
    assert lines[0] == f"{tmp_path}: the adapter does not fit the model"
    body = "\n".join(lines[1:])
    assert len(lines) == 7
    assert f"missing    {Q2}{A} [4, 32]" in body
    assert f"misshapen  {Q2}{B} [4, 32], expected [32, 4]" in body
    assert "extra      base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight [4, 32]\n" in body
    assert (
        "layers.9.self_attn.q_proj.lora_A.weight [4, 32]  the model has no such module. Nearest: model.layers." in body
    )
    assert "extra      base_model.model.model.embed_tokens.lora_embedding_A [4, 96]" in body
    assert "ln_tuning_layers.weight [32]  adapters of this kind on embeddings and norms are not supported" in body


def test_another_family(tmp_path, params):
    saved(tmp_path, target_modules=["query", "value"])
    text = message(tmp_path, params)
    assert "target_modules=['query', 'value']  no module of the model is called so" in text
    assert text.count("extra") == 16

    saved(tmp_path, target_modules=["proj"])  # a whole part of the dotted name, not the end of one
    assert "target_modules=['proj']  no module of the model is called so" in message(tmp_path, params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, params, value):
    saved(tmp_path)
    change_tensors(tmp_path, lambda t: t[Q2 + B].__setitem__((0, 0), value))
    assert message(tmp_path, params).endswith(f"adapter_model.safetensors holds NaN or infinity: {Q2}{B}")


def test_a_method_without_such_a_format(tmp_path):
    with pytest.raises(
        ConfigError, match=r"peft=full has no form in Hugging Face PEFT's format. Methods that have: .*lora"
    ):
        save_adapter(tmp_path / "out", {}, MODEL.table, Full(), base_path="")
    assert not (tmp_path / "out").exists()


# A new method is one file ----------------------------------------------------------------------------------------------


@struct.dataclass
class Rescale:
    """y = (x W + b) * l"""

    scale: jax.Array


class RescaleCodec(ModuleCodec):
    """``ia3_l`` [out, 1] per module."""

    peft_type = "IA3"

    def refuse(self, config):
        return []

    def shapes(self, config, module):
        return {"ia3_l": (module.spec.shape[1], 1)}

    def arrays(self, entry):
        return {"ia3_l": entry.scale[:, None]}

    def entry(self, config, module, arrays):
        return Rescale(arrays["ia3_l"][:, 0])

    def settings(self, method, entries):
        return {"feedforward_modules": []}

    def method(self, config, targets):
        return IA3(targets=targets.unnumbered)


class IA3(Component):
    """The method of the new file."""

    hf_codec: ClassVar[Any] = RescaleCodec()
    name: Literal["ia3_of_a_test"] = "ia3_of_a_test"
    targets: tuple[str, ...] = ()


def test_a_new_method_brings_its_own_codec(tmp_path, params):
    overlay = {"layers[1:3]/v/w": Rescale(jax.random.normal(jax.random.key(0), (2, 16)))}
    with registry.scratch():
        registry.register("peft")(LoRA)
        registry.register("peft")(IA3)
        save_adapter(tmp_path, overlay, MODEL.table, IA3(), base_path="b")
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert {k: x.shape for k, x in tensors.items()} == {
            f"base_model.model.model.layers.{i}.self_attn.v_proj.ia3_l": (16, 1) for i in (1, 2)
        }
        file = load_adapter(tmp_path, MODEL.table, params)
        same(file.overlay, overlay)
        assert file.method.targets == ("v_proj",)


def test_methods_may_share_a_type(tmp_path, params):
    """DoRA is a LORA to PEFT: the first method that does not refuse the settings reads them."""

    class DoraCodec(type(LoRA.hf_codec)):
        def refuse(self, config):
            lines = super().refuse({k: v for k, v in config.items() if k != "use_dora"})
            return lines if config.get("use_dora") else ["use_dora=False  is not DoRA", *lines]

        def method(self, config, targets):
            return "a DoRA"

    class Dora(Component):
        hf_codec: ClassVar[Any] = DoraCodec()
        name: Literal["dora_of_a_test"] = "dora_of_a_test"

    with registry.scratch():
        registry.register("peft")(Dora)
        registry.register("peft")(LoRA)
        saved(tmp_path, use_dora=True)
        assert load_adapter(tmp_path, MODEL.table, params).method == "a DoRA"
        saved(tmp_path)
        assert isinstance(load_adapter(tmp_path, MODEL.table, params).method, LoRA)
        saved(tmp_path, use_dora=True, bias="all")
        assert "bias='all'" in message(tmp_path, params) and "use_dora" not in message(tmp_path, params)


# A head beside the adapter -----------------------------------------------------------------------------------------------


def test_a_head_travels_with_the_adapter(tmp_path):
    model = llama(head=HeadSpec("sequence_classification", ("a", "b", "c")))
    params = weights(model)
    method = LoRA(rank=2, targets=("q",))
    overlay = method.init(jax.random.key(0), model.table, params)
    trained = {"head/w": np.asarray(params["head/w"]) + 1}
    save_adapter(tmp_path, overlay, model.table, method, base_path="", task_type="SEQ_CLS", saved=trained)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"
    assert head_of(tmp_path) == HeadSpec("sequence_classification", ("LABEL_0", "LABEL_1", "LABEL_2"))
    file = load_adapter(tmp_path, model.table, params)
    np.testing.assert_array_equal(file.saved["head/w"], trained["head/w"])
    same(file.overlay, overlay)
    with pytest.raises(DataError, match="modules_to_save=.score. +the model has no such module"):
        load_adapter(tmp_path, MODEL.table, weights(MODEL))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score", "model.norm"]}))
    with pytest.raises(DataError, match=r"model.norm.weight +missing, expected \[32\]"):
        load_adapter(tmp_path, model.table, params)
