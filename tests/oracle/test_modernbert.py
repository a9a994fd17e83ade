"""ModernBERT against transformers, and its adapters against PEFT: logits, every gradient, both ways of the files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import api  # noqa: E402
from ftjax.errors import DataError  # noqa: E402
from ftjax.headspec import HeadSpec  # noqa: E402
from ftjax.models import hf  # noqa: E402
from ftjax.models.base import Numerics  # noqa: E402
from ftjax.models.tensors import to_file_tensors  # noqa: E402
from ftjax.params import init_params  # noqa: E402
from ftjax.peft.base import bind, merge  # noqa: E402
from ftjax.peft.interop import TASK_TYPES, load_adapter, save_adapter  # noqa: E402
from ftjax.peft.lora import LoRA  # noqa: E402
from ftjax.peft.norms import Norms, norm_keys  # noqa: E402
from tests.oracle import apart, rows  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=64, local_attention=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
    sep_token_id=2, attn_implementation="eager",
)  # fmt: skip
FULL, LOCAL = "full_attention", "sliding_attention"
ROPES = {
    FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    LOCAL: {"rope_type": "default", "rope_theta": 50.0},
}
ODD = [
    {},
    {
        "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "local_attention": 7,
        "layer_types": [LOCAL, FULL, LOCAL, LOCAL], "classifier_pooling": "mean", "norm_eps": 1e-3,
    },
    {
        "hidden_activation": "gelu_new", "classifier_activation": "relu", "decoder_bias": False, "vocab_size": 101,
        "rope_parameters": ROPES, "layer_types": [FULL] * 4, "num_attention_heads": 2, "classifier_pooling": "cls",
    },
]  # fmt: skip
HEADS = {
    "MaskedLM": {}, "SequenceClassification": {"num_labels": 3}, "TokenClassification": {"num_labels": 4},
    "QuestionAnswering": {},
}  # fmt: skip


def torch_model(folder, head="MaskedLM", *, tied=True, **changes):
    """A tiny random model with every parameter drawn, saved to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = transformers.ModernBertConfig(**(SIZES | HEADS[head] | changes | {"tie_word_embeddings": tied}))
    model = getattr(transformers, f"ModernBertFor{head}")(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if n.endswith("norm.weight") else 0.0))
    model.save_pretrained(folder)
    return model


def batch(vocab, *, left=False):
    ids, mask = rows(vocab, left=left)
    return {"input_ids": np.where(mask > 0, ids, 0), "attention_mask": mask}


def logits_of(out):
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits


def torch_logits(model, inputs):
    with torch.no_grad():
        return logits_of(model(**{k: torch.tensor(v) for k, v in inputs.items()})).float().numpy()


def our_logits(model, params, inputs):
    given = {k: jnp.asarray(v, jnp.int32) for k, v in inputs.items()}
    return np.asarray(jax.jit(lambda p, x: model.apply(p, x).logits)(params, given))


def gap(a, b, inputs):
    """Largest difference, over real tokens where there are any to tell apart."""
    return apart(a, b, inputs["attention_mask"] if b.ndim == 3 else None)


CASES = [("MaskedLM", i) for i in range(3)] + [
    (h, 2 if h == "QuestionAnswering" else 1) for h in HEADS if h != "MaskedLM"
]


@pytest.mark.parametrize("head, case", [*CASES, ("SequenceClassification", 2)])
def test_logits_gradients_and_round_trip(tmp_path, head, case, record_property):
    theirs = torch_model(tmp_path / "a", head, **ODD[case])
    model, params = hf.load(str(tmp_path / "a"))
    vocab = theirs.config.vocab_size
    for left in (False, True):
        inputs = batch(vocab, left=left)
        ours, want = our_logits(model, params, inputs), torch_logits(theirs, inputs)
        record_property(f"logits, left={left}", gap(ours, want, inputs))
        assert gap(ours, want, inputs) < 1e-4

    # the gradient of every parameter under a fixed direction of the logits
    inputs = batch(vocab)
    direction = np.random.default_rng(0).normal(size=want.shape).astype(np.float32)
    if want.ndim == 3:
        direction *= inputs["attention_mask"][..., None]
    theirs.zero_grad()
    (logits_of(theirs(**{k: torch.tensor(v) for k, v in inputs.items()})) * torch.tensor(direction)).sum().backward()
    given = {k: jnp.asarray(v, jnp.int32) for k, v in inputs.items()}
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, given).logits * direction).sum()))(params)
    assert not grads["layers[0:4]/ln1/w"][0].any()
    named = dict(theirs.named_parameters())
    # a key's bias shifts all scores of a query alike, so that its gradient is rounding only: measured by the others' size
    noise = 1e-6 * max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    worst, seen = 0.0, set()
    for name, g in to_file_tensors(model.table, grads):
        want_g = named[name].grad.numpy()
        seen.add(name)
        assert np.abs(g - want_g).max() <= 1e-3 * np.abs(want_g).max() + noise, name
        worst = max(worst, np.abs(g - want_g).max() / (np.abs(want_g).max() + noise))
    record_property("gradients", float(worst))
    assert seen == set(named)

    hf.save(model, params, tmp_path / "b")
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_array_equal(torch_logits(back.eval(), inputs), torch_logits(theirs, inputs))
    assert back.config.to_dict()["rope_parameters"] == theirs.config.to_dict()["rope_parameters"]
    again, kept = hf.load(str(tmp_path / "b"))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_a_window_counts_to_either_side(tmp_path):
    """Two tokens further than half of `local_attention` do not see each other; at that distance they do."""
    for width, reach in ((7, 3), (2, 1)):
        theirs = torch_model(tmp_path, num_hidden_layers=1, layer_types=[LOCAL], local_attention=width)
        model, params = hf.load(str(tmp_path))
        one = {"input_ids": np.arange(3, 15)[None], "attention_mask": np.ones((1, 12), np.int64)}
        other = {**one, "input_ids": np.where(np.arange(12) == 5, 50, one["input_ids"])}
        for logits in (
            [our_logits(model, params, x) for x in (one, other)],
            [torch_logits(theirs, x) for x in (one, other)],
        ):
            changed = np.abs(logits[0] - logits[1]).max(-1)[0] > 1e-6
            assert changed.nonzero()[0].tolist() == list(range(5 - reach, 6 + reach))


def test_old_and_new_forms_of_the_file(tmp_path):
    """As the hub has it since 2024, and as transformers 5 writes it: the same model, and neither with other numbers."""
    theirs = torch_model(tmp_path, rope_parameters={FULL: {**ROPES[LOCAL], "rope_theta": 700.0}, LOCAL: ROPES[LOCAL]})
    new, params = hf.load(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["layer_types"]
    with pytest.raises(DataError, match="rope_theta"):
        hf.model_of(config, Numerics())
    config |= {
        "global_rope_theta": 700.0, "local_rope_theta": 50.0, "global_attn_every_n_layers": 3, "layer_norm_eps": 1e-5,
        "position_embedding_type": "absolute", "reference_compile": None, "repad_logits_with_grad": False,
        "gradient_checkpointing": False, "sparse_prediction": False, "sparse_pred_ignore_index": -100,
    }  # fmt: skip
    old = hf.model_of(config, Numerics())
    assert old == new
    path.write_text(json.dumps(config))
    inputs = batch(97)
    back = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert gap(our_logits(old, params, inputs), torch_logits(back, inputs), inputs) < 1e-4
    assert {k: v for k, v in old.config.to_hf().items() if k in config and "rope" in k + str(v) or "every" in k} == {
        "global_rope_theta": 700.0, "local_rope_theta": 50.0, "global_attn_every_n_layers": 3,
    }  # fmt: skip
    every_second = hf.model_of(config | {"global_attn_every_n_layers": 2}, Numerics())
    assert every_second.config.layer_types == (FULL, LOCAL, FULL, LOCAL)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_activation": "mish"}, "hidden_activation='mish'"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"local_attention": None}, "'local_attention' is missing"),
        ({"some_new_setting": 3}, "some_new_setting"),
        ({"rope_parameters": {FULL: {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}}, "partial_rotary_factor=0.5"),
    ],
)
def test_a_setting_that_is_not_implemented(tmp_path, change, message):
    torch_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(DataError, match=message):
        hf.model_of(config, Numerics())


def test_untied(tmp_path):
    theirs = torch_model(tmp_path, tied=False)
    model, params = hf.load(str(tmp_path))
    assert "head/w" in params
    inputs = batch(97)
    assert gap(our_logits(model, params, inputs), torch_logits(theirs, inputs), inputs) < 1e-4


def test_a_new_head_over_a_language_model(tmp_path):
    """The dense layer and the norm below the projection are those of the language model, as in transformers."""
    theirs = torch_model(tmp_path)
    spec = HeadSpec("sequence_classification", ("a", "b", "c"))
    with pytest.warns(UserWarning) as seen:
        model, params = hf.load(str(tmp_path), head=spec, seed=3)
    text = " ".join(str(w.message) for w in seen)
    assert "no weights for head/b, head/w: drawn from seed 3" in text or "head/w, head/b: drawn from seed 3" in text
    assert "left out, of another head: decoder.bias" in text
    with pytest.warns(UserWarning):
        again = hf.load(str(tmp_path), head=spec, seed=3)[1]
    np.testing.assert_array_equal(params["head/w"], again["head/w"])
    np.testing.assert_array_equal(params["head/dense/w"], theirs.head.dense.weight.detach().numpy().T)
    np.testing.assert_array_equal(params["head/norm/w"], theirs.head.norm.weight.detach().numpy())
    name = transformers.ModernBertForSequenceClassification
    opened, info = name.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert {str(k) for k in info["missing_keys"]} == {"classifier.weight", "classifier.bias"}
    np.testing.assert_array_equal(params["head/dense/w"], opened.head.dense.weight.detach().numpy().T)
    assert model.apply(params, {"input_ids": jnp.ones((2, 4), jnp.int32)}).logits.shape == (2, 3)


def test_a_base_without_a_head(tmp_path):
    """Saved without its prefix, as `ModernBertModel` is."""
    theirs = torch_model(tmp_path / "x")
    theirs.base_model.save_pretrained(tmp_path / "base")
    spec = HeadSpec("token_classification", ("a", "b"))
    with pytest.warns(UserWarning, match="drawn from seed"):
        model, params = hf.load(str(tmp_path / "base"), head=spec)
    whole = hf.load(str(tmp_path / "x"))[1]
    for key in ("layers[0:4]/qkv/w", "layers[0:4]/ln1/w", "embed/w", "norm/w"):
        np.testing.assert_array_equal(params[key], whole[key])
    assert model.head == spec


def test_packed_equals_unpacked_and_scan_equals_unrolled(tmp_path):
    torch_model(tmp_path, **ODD[1])
    model, params = hf.load(str(tmp_path))
    rng = np.random.default_rng(0)
    one, two = rng.integers(5, 97, (1, 7)), rng.integers(5, 97, (1, 5))
    packed = {
        "input_ids": jnp.asarray(np.concatenate([one, two, [[0] * 2]], 1), jnp.int32),
        "positions": jnp.asarray([[*range(7), *range(5), 0, 0]], jnp.int32),
        "segments": jnp.asarray([[0] * 7 + [1] * 5 + [-2] * 2], jnp.int32),
    }
    together = model.apply(params, packed).logits
    for ids, at in ((one, slice(0, 7)), (two, slice(7, 12))):
        alone = model.apply(params, {"input_ids": jnp.asarray(ids, jnp.int32)}).logits
        np.testing.assert_allclose(together[:, at], alone, atol=2e-5)
    unrolled = type(model)(model.config, Numerics(layers="unroll"), model.head)
    np.testing.assert_allclose(unrolled.apply(params, packed).logits, together, atol=2e-5)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_bfloat16(tmp_path, head):
    """No further from torch's float32 than twice torch's own bfloat16."""
    theirs = torch_model(tmp_path, head, classifier_pooling="mean")
    inputs = batch(97)
    model, params = api.load_pretrained(tmp_path, dtype="bfloat16")
    want = torch_logits(theirs, inputs)
    half = torch_logits(theirs.to(torch.bfloat16), inputs)
    assert gap(our_logits(model, params, inputs), want, inputs) <= 2 * gap(half, want, inputs)


def test_the_first_norm_is_nothing(tmp_path):
    """New weights hold ones where the file has no norm, as a folder that is loaded does, and no file gets it."""
    torch_model(tmp_path, norm_bias=True)
    model, params = hf.load(str(tmp_path))
    for store in (params, init_params(model.table, jax.random.key(0), dtype=jnp.float32)):
        assert (store["layers[0:4]/ln1/w"][0] == 1).all() and (store["layers[0:4]/ln1/b"][0] == 0).all()
        names = {name for name, _ in to_file_tensors(model.table, store)}
        assert "model.layers.1.attn_norm.weight" in names and "model.layers.0.attn_norm.weight" not in names


PEFT_WARNINGS = pytest.mark.filterwarnings(
    "default", "error:Found missing adapter keys", "error:Unexpected keyword arguments"
)


def drawn(method, model, params):
    """An overlay with nothing zero."""
    overlay = method.init(jax.random.key(0), model.table, params)
    keys = {k: jax.random.key(i) for i, k in enumerate(overlay)}
    return {k: d.replace(b=0.3 * jax.random.normal(keys[k], d.b.shape)) for k, d in overlay.items()}


def opened_with(folder, head, adapter):
    peft = pytest.importorskip("peft")
    name = getattr(transformers, f"ModernBertFor{head}")
    theirs = name.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(theirs, adapter).eval()


@pytest.mark.parametrize(
    "targets", [("all-linear",), ("Wqkv", "mlp.Wo"), ("layers[0:4]/gate_up/w",), ("head.dense", "o")]
)
@PEFT_WARNINGS
def test_lora_opens_in_peft(tmp_path, targets, record_property):
    torch_model(tmp_path / "base", **ODD[1])
    model, params = hf.load(str(tmp_path / "base"))
    method = LoRA(rank=4, alpha=8.0, targets=targets)
    overlay = drawn(method, model, params)
    save_adapter(tmp_path / "a", overlay, model.table, method, base_path="base", task_type=None)
    inputs = batch(97)
    plain, ours = (our_logits(model, p, inputs) for p in (params, bind(params, overlay)))
    theirs = opened_with(tmp_path / "base", "MaskedLM", tmp_path / "a")
    want = torch_logits(theirs, inputs)
    record_property("logits", gap(ours, want, inputs))
    assert gap(ours, want, inputs) < 1e-5 * max(1, np.abs(want).max())
    assert gap(ours, plain, inputs) > 0.1, "the adapter does nothing"
    back = load_adapter(tmp_path / "a", model.table, params)
    jax.tree.map(np.testing.assert_array_equal, back.overlay, overlay)

    folded = hf.save(model, merge(bind(params, overlay), model.table), tmp_path / "merged")
    whole = transformers.ModernBertForMaskedLM.from_pretrained(folded, attn_implementation="eager").eval()
    assert gap(torch_logits(whole, inputs), ours, inputs) < 1e-5 * max(1, np.abs(ours).max())


@pytest.mark.filterwarnings("default")
def test_peft_opens_here(tmp_path, record_property):
    peft = pytest.importorskip("peft")
    torch_model(tmp_path / "base")
    model, params = hf.load(str(tmp_path / "base"))
    base = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear")).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_B" in key:
                p.copy_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(tmp_path / "a")
    file = load_adapter(tmp_path / "a", model.table, params)
    inputs = batch(97)
    ours, want = our_logits(model, bind(params, file.overlay), inputs), torch_logits(theirs, inputs)
    record_property("logits", gap(ours, want, inputs))
    assert gap(ours, want, inputs) < 1e-5 * max(1, np.abs(want).max())
    assert gap(ours, our_logits(model, params, inputs), inputs) > 0.1, "the adapter does nothing"


@PEFT_WARNINGS
def test_a_head_goes_with_its_adapter(tmp_path):
    """The dense layer, the norm and the projection of a classifier, as PEFT's modules to save."""
    torch_model(tmp_path / "base", "SequenceClassification")
    model, params = hf.load(str(tmp_path / "base"))
    trained = {k: v + 0.1 for k, v in params.items() if k.startswith("head/")}
    method = LoRA(rank=2, alpha=8.0)
    overlay = drawn(method, model, params)
    task = TASK_TYPES[model.head.kind]
    save_adapter(tmp_path / "a", overlay, model.table, method, base_path="base", task_type=task, saved=trained)
    inputs = batch(97)
    ours = our_logits(model, bind(params | trained, overlay), inputs)
    want = torch_logits(opened_with(tmp_path / "base", "SequenceClassification", tmp_path / "a"), inputs)
    assert gap(ours, want, inputs) < 1e-5 * max(1, np.abs(want).max())
    file = load_adapter(tmp_path / "a", model.table, params)
    jax.tree.map(np.testing.assert_array_equal, file.saved, trained)


@pytest.mark.filterwarnings("default", "error:Found missing adapter keys")
@pytest.mark.parametrize("norm_bias", [True, False])
def test_tuned_norms_go_both_ways(tmp_path, norm_bias):
    """The norm that the first layer lacks is in neither file."""
    peft = pytest.importorskip("peft")
    torch_model(tmp_path / "base", norm_bias=norm_bias)
    model, params = hf.load(str(tmp_path / "base"))
    moved = {k: np.asarray(params[k]) + 0.1 for k in norm_keys(model.table)}
    save_adapter(tmp_path / "a", {}, model.table, Norms(), base_path="base", task_type=None, saved=moved)
    inputs = batch(97)
    ours = our_logits(model, params | moved, inputs)
    theirs = opened_with(tmp_path / "base", "MaskedLM", tmp_path / "a")
    assert gap(ours, torch_logits(theirs, inputs), inputs) < 1e-5 * max(1, np.abs(ours).max())
    assert gap(ours, our_logits(model, params, inputs), inputs) > 1e-3

    raw = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    names = [n for n, m in raw.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    theirs = peft.get_peft_model(raw, peft.LNTuningConfig(target_modules=names)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_adapter(tmp_path / "theirs", model.table, params).saved
    want = torch_logits(theirs, inputs)
    assert gap(our_logits(model, params | saved, inputs), want, inputs) < 1e-5 * max(1, np.abs(want).max())
