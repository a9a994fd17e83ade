"""AdapterHub's folders: names and settings as that library writes them, our files both ways, what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax import registry
from ftjax.errors import DataError
from ftjax.headspec import HeadSpec, label_names
from ftjax.models.base import Model
from ftjax.peft.interop import head_of, load_adapter, save_adapter
from tests import tiny, tinymodels

METHODS = {
    "houlsby": dict(reduction=4, activation="tanh", layers=(0, 1)),
    "pfeiffer": dict(reduction=8),
    "parallel": dict(reduction=4, scale=2.0),
}
SHARED = {
    "llama": "model.shared_parameters.default.phm_rule",
    "bert": "bert.shared_parameters.default.phm_rule",
    "vit": "vit.shared_parameters.default.phm_rule",
}
WHERE = {
    "llama": ("model.layers.1.", "attention_adapters.adapters.", "output_adapters.adapters."),
    "bert": ("bert.encoder.layer.1.", "attention.output.adapters.", "output.adapters."),
    "vit": ("vit.encoder.layer.1.", "attention_adapters.adapters.", "output.output_adapters.adapters."),
}


def made(name, family="bert", **changes):
    """(model, base, method, overlay with random numbers)."""
    model: Model = tinymodels.known()[family]()
    method = registry.get("peft", name)(**METHODS.get(name, {}) | changes)
    base = tiny.weights(model)
    leaves, tree = jax.tree.flatten(method.init(jax.random.key(0), model.table, base))
    drawn = [jax.random.normal(jax.random.key(i), x.shape) if x.ndim > 1 else x for i, x in enumerate(leaves)]
    return model, base, method, jax.tree.unflatten(tree, drawn)


@pytest.mark.parametrize("family", WHERE)
@pytest.mark.parametrize("name", METHODS)
def test_round_trip(tmp_path, name, family):
    model, base, method, overlay = made(name, family)
    save_adapter(tmp_path, overlay, model.table, method, base_path="the/base")
    file = load_adapter(tmp_path, model.table, base)
    assert (file.method, file.base_path) == (method, "the/base")
    assert jax.tree.structure(file.overlay) == jax.tree.structure(overlay)
    assert tiny.largest(file.overlay, overlay) == 0

    outer = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "peft_type" not in outer and (outer["name"], outer["model_name"]) == ("default", "the/base")
    inner = outer["config"]
    assert inner["mh_adapter"] == (name == "houlsby") and inner["output_adapter"] and not inner["phm_layer"]
    assert (inner["is_parallel"], inner["original_ln_before"]) == (name == "parallel", name == "pfeiffer")
    tensors = load_file(tmp_path / "adapter.safetensors")
    for site in ["attn_out", "mlp_out"] if name == "houlsby" else ["mlp_out"]:
        layer, *parts = WHERE[family]
        at = f"{layer}{parts[site == 'mlp_out']}default."
        D = model.config.hidden_size
        tap = next(t for k, t in overlay.items() if k.endswith(site))
        assert tensors[at + "adapter_down.0.weight"].shape == (D // method.reduction, D)
        np.testing.assert_array_equal(tensors[at + "adapter_up.weight"], np.asarray(tap.up[1]).T)


@pytest.mark.parametrize(
    "family, options",
    [("llama", dict(plus=True, rank=2)), ("bert", dict(rank=0)), ("vit", dict(layers=(1,), activation="relu"))],
)
def test_compacter(tmp_path, family, options):
    model, base, method, overlay = made("compacter", family, reduction=4, **options)
    save_adapter(tmp_path, overlay, model.table, method, base_path="the/base")
    file = load_adapter(tmp_path, model.table, base)
    assert file.method == method and jax.tree.structure(file.overlay) == jax.tree.structure(overlay)
    assert tiny.largest(file.overlay, overlay) == 0
    inner = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert inner["phm_layer"] and inner["shared_phm_rule"] and inner["factorized_phm_W"] == (method.rank > 0)
    assert (inner["mh_adapter"], inner["original_ln_before"]) == (not method.plus, method.plus)
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert tensors.pop(SHARED[family]).shape == (4, 4, 4)
    D = model.config.hidden_size
    layer, _, part = WHERE[family]
    w = tensors[f"{layer}{part}default.adapter_up.{'W_right' if method.rank else 'W'}"]
    assert w.shape == (4, method.rank or D // 16, D // 4)
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(DataError, match="phm_rule  missing"):
        load_adapter(tmp_path, model.table, base)


def published(folder, **changes):
    """A Pfeiffer adapter for the tiny BERT as AdapterHub writes it, under a name of its own."""
    model, base, _, _ = made("pfeiffer")
    D, m, rng = model.config.hidden_size, model.config.hidden_size // 8, np.random.default_rng(0)
    shapes = {"down.0.weight": (m, D), "down.0.bias": (m,), "up.weight": (D, m), "up.bias": (D,)}
    tensors = {
        f"bert.encoder.layer.{i}.output.adapters.mrpc.adapter_{k}": rng.normal(size=s).astype(np.float32)
        for i in range(model.config.num_hidden_layers)
        for k, s in shapes.items()
    }
    settings = {
        "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
        "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
        "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False, "learn_phm": True,
        "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False, "non_linearity": "relu",
        "original_ln_after": True, "original_ln_before": True, "output_adapter": True, "phm_bias": True,
        "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
        "reduction_factor": 8, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
        "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
    }  # fmt: skip
    outer = {
        "config": settings | changes, "config_id": "9076f36a74755ac4", "hidden_size": D,
        "model_class": "BertAdapterModel", "model_name": "bert-tiny", "model_type": "bert", "name": "mrpc",
        "version": "adapters.1.0.0",
    }  # fmt: skip
    save_file(tensors, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(outer))
    return model, base, tensors


def test_a_file_of_adapterhub(tmp_path):
    model, base, tensors = published(tmp_path)
    file = load_adapter(tmp_path, model.table, base)
    assert (file.method.name, file.method.reduction, file.base_path) == ("pfeiffer", 8, "bert-tiny")
    (tap,) = file.overlay.values()
    np.testing.assert_array_equal(
        tap.down[1].T, tensors["bert.encoder.layer.1.output.adapters.mrpc.adapter_down.0.weight"]
    )


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(use_gating=True), "use_gating=True  is not supported"),
        (dict(inv_adapter="nice"), "inv_adapter='nice' +is not supported; supported: None"),
        (dict(scaling="learned"), "scaling='learned'"),
        (dict(reduction_factor={"default": 16, "1": 8}), "reduction_factor=.*one whole number"),
        (dict(non_linearity="mish"), "non_linearity='mish'.*supported: relu, gelu"),
        (dict(tuned="yes"), "tuned='yes' +is not supported"),
        (dict(reduction_factor=4), r"adapter_down.0.weight +misshapen \[\d, \d+\], expected \[\d, \d+\]"),
    ],
)
def test_what_is_refused(tmp_path, changes, match):
    model, base, _ = published(tmp_path, **changes)
    with pytest.raises(DataError, match=match):
        load_adapter(tmp_path, model.table, base)


def test_tensors_missing_and_left_over(tmp_path):
    model, base, tensors = published(tmp_path)
    lost = next(iter(tensors))
    tensors["bert.encoder.layer.9.output.adapters.mrpc.adapter_up.bias"] = tensors.pop(lost)
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(DataError, match=rf"{lost} +missing[\s\S]*layer\.9.*is not of this adapter"):
        load_adapter(tmp_path, model.table, base)


def test_a_head_comes_along(tmp_path):
    """A task's head stands beside the adapter under PEFT's names, and is found again."""
    model = tinymodels.known()["bert"](head=HeadSpec("sequence_classification", label_names(3)))
    base, method = tiny.weights(model), registry.get("peft", "pfeiffer")(reduction=4)
    head = {k: v + 1 for k, v in base.items() if k.startswith("head/")}
    overlay = method.init(jax.random.key(0), model.table, base)
    save_adapter(tmp_path, overlay, model.table, method, base_path="b", task_type="SEQ_CLS", saved=head)
    found = head_of(tmp_path)
    assert found is not None and (found.kind, len(found.labels)) == ("sequence_classification", 3)
    file = load_adapter(tmp_path, model.table, base)
    assert set(file.saved) == set(head) and all((np.asarray(head[k]) == v).all() for k, v in file.saved.items())


@pytest.mark.parametrize("family", [f for f in tinymodels.known() if "resnet" not in f])
def test_every_family_says_what_adapters_read(family):
    """Traced only: a site that forgets the residual is found here."""
    model = tinymodels.known()[family]()
    base = jax.eval_shape(lambda: tiny.weights(model))
    ids = jax.ShapeDtypeStruct((1, 4), np.int32)
    images = jax.ShapeDtypeStruct((1, 3, tiny.IMAGE, tiny.IMAGE), np.float32)
    inputs = {"pixel_values": images} if family == "vit" else {"input_ids": ids, "labels": ids}
    for name in METHODS:
        method = registry.get("peft", name)(reduction=4)
        overlay = jax.eval_shape(lambda m=method: m.init(jax.random.key(0), model.table, {}))
        bound = {**base, **overlay}
        assert jax.eval_shape(lambda p, x: model.apply(p, x).logits, bound, inputs).ndim in (2, 3)
