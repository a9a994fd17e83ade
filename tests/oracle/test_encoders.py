"""BERT, RoBERTa and DistilBERT with every head against transformers: logits, losses, every gradient, both ways of the file."""

from __future__ import annotations

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
from tests.oracle import apart, rows  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=40, attn_implementation="eager",
)  # fmt: skip
ODD = {
    "bert": [
        {}, {"hidden_act": "relu", "type_vocab_size": 3},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "vocab_size": 101},
    ],
    "roberta": [{}, {"pad_token_id": 0, "type_vocab_size": 1}, {"hidden_act": "gelu_new", "vocab_size": 101}],
    "distilbert": [{}, {"activation": "relu"}, {"vocab_size": 101, "sinusoidal_pos_embds": True}],
}  # fmt: skip
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
HEADS = {
    "MaskedLM": {}, "SequenceClassification": {"num_labels": 3}, "TokenClassification": {"num_labels": 4},
    "QuestionAnswering": {},
}  # fmt: skip
CASES = [
    (f, h, i)
    for f in ODD
    for h in HEADS
    for i in range(3)
    if h == "MaskedLM" or i == (1 if h != "QuestionAnswering" else 2)
]


def torch_model(folder, family, head, *, tied=True, dtype=None, **changes):
    """A tiny random model with every parameter drawn, saved to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    name = CLASSES[family]
    sizes = dict(SIZES)
    if family == "distilbert":
        old = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
        }
        sizes = {old.get(k, k): v for k, v in sizes.items()}
    config = getattr(transformers, f"{name}Config")(**(sizes | HEADS[head] | changes | {"tie_word_embeddings": tied}))
    model = getattr(transformers, f"{name}For{head}")(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if n.endswith("orm.weight") else 0.0))
    model.save_pretrained(folder)
    return model


def batch(family, vocab, *, left=False, pad=0):
    ids, mask = rows(vocab, left=left)
    ids = np.where(mask > 0, np.maximum(ids, 5), pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        inputs["token_type_ids"] = (np.arange(ids.shape[1])[None] > 5).astype(np.int64) * (mask > 0)
    return inputs


def logits_of(out):
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits


def both(theirs, model, params, inputs):
    with torch.no_grad():
        want = logits_of(theirs(**{k: torch.tensor(v) for k, v in inputs.items()})).float().numpy()
    ours = jax.jit(lambda p, x: model.apply(p, x).logits)(
        params, {k: jnp.asarray(v, jnp.int32) for k, v in inputs.items()}
    )
    return np.asarray(ours), want


@pytest.mark.parametrize("family, head, case", CASES)
def test_logits_gradients_and_round_trip(tmp_path, family, head, case):
    changes = ODD[family][case]
    theirs = torch_model(tmp_path / "a", family, head, **changes)
    model, params = hf.load(str(tmp_path / "a"))
    pad = theirs.config.pad_token_id
    for left in (False, True):
        inputs = batch(family, theirs.config.vocab_size, left=left, pad=pad)
        ours, want = both(theirs, model, params, inputs)
        assert apart(ours, want, inputs["attention_mask"] if want.ndim == 3 else None) < 1e-4

    # the gradient of every parameter under a fixed direction of the logits
    inputs = batch(family, theirs.config.vocab_size, pad=pad)
    direction = np.random.default_rng(0).normal(size=want.shape).astype(np.float32)
    if want.ndim == 3:
        direction *= inputs["attention_mask"][..., None]
    theirs.zero_grad()
    (logits_of(theirs(**{k: torch.tensor(v) for k, v in inputs.items()})) * torch.tensor(direction)).sum().backward()
    given = {k: jnp.asarray(v, jnp.int32) for k, v in inputs.items()}
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, given).logits * direction).sum()))(params)
    named = dict(theirs.named_parameters())
    # a key's bias shifts all scores of a query alike, so that its gradient is rounding only: measured by the others' size
    noise = 1e-6 * max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    for name, g in to_file_tensors(model.table, grads):
        want_g = named[name].grad.numpy()
        assert np.abs(g - want_g).max() <= 1e-3 * np.abs(want_g).max() + noise, name

    hf.save(model, params, tmp_path / "b")
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    again, want = both(back.eval(), model, params, inputs)
    assert apart(again, want, inputs["attention_mask"] if want.ndim == 3 else None) < 1e-4
    assert hf.load(str(tmp_path / "b"))[0] == model


@pytest.mark.parametrize("family", ODD)
def test_untied(tmp_path, family):
    theirs = torch_model(tmp_path, family, "MaskedLM", tied=False)
    model, params = hf.load(str(tmp_path))
    assert "head/w" in params
    inputs = batch(family, 97, pad=theirs.config.pad_token_id)
    assert apart(*both(theirs, model, params, inputs), inputs["attention_mask"]) < 1e-4


@pytest.mark.parametrize("family", ODD)
def test_a_new_head_over_a_language_model(tmp_path, family):
    torch_model(tmp_path, family, "MaskedLM")
    spec = HeadSpec("sequence_classification", ("a", "b", "c"))
    with pytest.warns(UserWarning) as seen:
        model, params = hf.load(str(tmp_path), head=spec, seed=3)
    text = " ".join(str(w.message) for w in seen)
    assert "head/w" in text and "drawn from seed 3" in text and "left out, of another head" in text
    with pytest.warns(UserWarning):
        again = hf.load(str(tmp_path), head=spec, seed=3)[1]
    np.testing.assert_array_equal(params["head/w"], again["head/w"])
    assert model.apply(params, {"input_ids": jnp.ones((2, 4), jnp.int32)}).logits.shape == (2, 3)


@pytest.mark.parametrize("family", ODD)
def test_a_base_without_a_head(tmp_path, family):
    """Saved without its prefix, as `BertModel` is."""
    theirs = torch_model(tmp_path / "x", family, "MaskedLM")
    theirs.base_model.save_pretrained(tmp_path / "base")
    spec = HeadSpec("token_classification", ("a", "b"))
    with pytest.warns(UserWarning, match="drawn from seed"):
        model, params = hf.load(str(tmp_path / "base"), head=spec)
    whole = hf.load(str(tmp_path / "x"))[1]
    np.testing.assert_array_equal(params["layers[0:3]/q/w"], whole["layers[0:3]/q/w"])
    np.testing.assert_array_equal(params["embed/w"], whole["embed/w"])
    assert model.head == spec


def test_old_names_of_norms(tmp_path):
    from safetensors.numpy import load_file, save_file

    torch_model(tmp_path, "bert", "MaskedLM")
    path = tmp_path / "model.safetensors"
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in load_file(path).items()
    }
    want = hf.load(str(tmp_path))[1]
    old["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    save_file(old, path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(str(tmp_path))[1], want)


def test_a_setting_that_is_not_implemented(tmp_path):
    torch_model(tmp_path, "bert", "MaskedLM", hidden_act="mish")
    with pytest.raises(DataError, match="hidden_act='mish'"):
        hf.load(str(tmp_path))


@pytest.mark.parametrize("family", ODD)
def test_packed_equals_unpacked_and_scan_equals_unrolled(tmp_path, family):
    theirs = torch_model(tmp_path, family, "MaskedLM")
    model, params = hf.load(str(tmp_path))
    rng = np.random.default_rng(0)
    one, two = rng.integers(5, 97, (1, 7)), rng.integers(5, 97, (1, 5))
    pad = theirs.config.pad_token_id
    packed = {
        "input_ids": jnp.asarray(np.concatenate([one, two, [[pad] * 2]], 1), jnp.int32),
        "positions": jnp.asarray([[*range(7), *range(5), 0, 0]], jnp.int32),
        "segments": jnp.asarray([[0] * 7 + [1] * 5 + [-2] * 2], jnp.int32),
    }
    together = model.apply(params, packed).logits
    for ids, at in ((one, slice(0, 7)), (two, slice(7, 12))):
        alone = model.apply(params, {"input_ids": jnp.asarray(ids, jnp.int32)}).logits
        np.testing.assert_allclose(together[:, at], alone, atol=2e-5)
    unrolled = type(model)(model.config, Numerics(layers="unroll"), model.head)
    np.testing.assert_allclose(unrolled.apply(params, packed).logits, together, atol=2e-5)


@pytest.mark.parametrize("family", ODD)
def test_bfloat16(tmp_path, family):
    """No further from torch's float32 than twice torch's own bfloat16."""
    theirs = torch_model(tmp_path, family, "MaskedLM")
    inputs = batch(family, 97, pad=theirs.config.pad_token_id)
    model, params = api.load_pretrained(tmp_path, dtype="bfloat16")
    ours, want = both(theirs, model, params, inputs)
    half, _ = both(theirs.to(torch.bfloat16), model, params, inputs)[::-1]
    mask = inputs["attention_mask"]
    assert apart(ours, want, mask) <= 2 * apart(half, want, mask)
