"""Heads of decoders against transformers: labels of a text from its last token, labels of each token, whatever the padding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax import api  # noqa: E402
from ftjax.errors import ConfigError, DataError  # noqa: E402
from ftjax.headspec import HeadSpec  # noqa: E402
from ftjax.models import hf  # noqa: E402
from tests.oracle import LLAMA, apart, our_logits, rows, torch_llama  # noqa: E402

GPT2 = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
NEOX = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, eos_token_id=2,
)  # fmt: skip
KINDS = [
    (name, head, labels)
    for name in ("Llama", "GPT2", "GPTNeoX")
    for head, labels in (("SequenceClassification", 3), ("SequenceClassification", 1), ("TokenClassification", 4))
]


def torch_head(folder, name, head, labels):
    sizes = {"Llama": LLAMA, "GPT2": GPT2, "GPTNeoX": NEOX}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **(sizes | {"num_labels": labels, "pad_token_id": 0, "attn_implementation": "eager"})
    )
    model = getattr(transformers, f"{name}For{head}")(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            is_norm = "norm" in n or ".ln_" in n
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if is_norm and n.endswith("weight") else 0.0))
    model.save_pretrained(folder)
    return model


def torch_out(model, ids, mask):
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        )
    return out.logits.numpy()


def torch_spans(model, ids, mask):
    """Logits of the beginning and the end of an answer [B, T, 2]."""
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions)
    return torch.stack([out.start_logits, out.end_logits], -1).numpy()


@pytest.mark.parametrize("name, head, labels", KINDS)
def test_heads(tmp_path, name, head, labels):
    theirs = torch_head(tmp_path / "a", name, head, labels)
    model, params = hf.load(str(tmp_path / "a"))
    for left in (False, True):
        ids, mask = rows(97, left=left)
        ids = np.where(mask > 0, np.maximum(ids, 3), 0)
        want, ours = torch_out(theirs, ids, mask), our_logits(model, params, ids, mask)
        assert ours.shape == want.shape
        assert apart(ours, want, mask if want.ndim == 3 else None) < 1e-4
    hf.save(model, params, tmp_path / "b")
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert apart(torch_out(back.eval(), ids, mask), want, mask if want.ndim == 3 else None) < 1e-5


def test_a_score_does_not_depend_on_padding_or_company(tmp_path):
    torch_head(tmp_path, "Llama", "SequenceClassification", 1)
    model, params = hf.load(str(tmp_path))
    assert model.head.kind == "sequence_classification"
    right, left = rows(97), rows(97, left=True)
    together = our_logits(model, params, *right)
    np.testing.assert_allclose(our_logits(model, params, *left), together, atol=1e-5)
    for i, n in enumerate(right[1].sum(1)):
        alone = our_logits(model, params, right[0][i : i + 1, :n])
        np.testing.assert_allclose(alone, together[i : i + 1], atol=1e-5)


def test_a_classifier_from_a_language_model(tmp_path):
    torch_llama(tmp_path, tie_word_embeddings=True)
    spec = HeadSpec("sequence_classification", ("no", "yes"))
    with pytest.warns(UserWarning, match="head/w: drawn from seed 5"):
        model, params = api.load_pretrained(tmp_path, head=spec, seed=5)
    assert model.apply(params, {"input_ids": jnp.ones((2, 3), jnp.int32)}).logits.shape == (2, 2)
    api.save_pretrained(model, params, tmp_path / "b")
    assert transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "b").config.id2label == {
        0: "no",
        1: "yes",
    }


def test_a_new_head_is_the_seeds(tmp_path):
    """Of an untied model: the old head is left out and named; the new one depends on the seed and on nothing else."""
    torch_llama(tmp_path)
    spec = HeadSpec("token_classification", ("a", "b", "c"))
    heads = []
    for seed in (3, 3, 4):
        with pytest.warns(UserWarning) as told:
            _, params = api.load_pretrained(tmp_path, head=spec, seed=seed)
        lines = [str(w.message) for w in told]
        assert any("head/w" in line and "head/b" in line and f"drawn from seed {seed}" in line for line in lines), lines
        assert any("left out, of another head: lm_head.weight" in line for line in lines), lines
        heads.append(np.asarray(params["head/w"]))
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 1e-3


def test_a_language_model_from_a_classifier(tmp_path):
    """A vocabulary head is never made up: an untied one is missing, a tied one is the embedding."""
    torch_head(tmp_path / "untied", "Llama", "SequenceClassification", 3)
    with pytest.raises(DataError, match=r"missing +lm_head.weight"):
        api.load_pretrained(tmp_path / "untied", head=HeadSpec("causal_lm"))
    theirs = torch_head(tmp_path / "tied", "GPT2", "SequenceClassification", 3)
    with pytest.warns(UserWarning, match="left out, of another head: score.weight"):
        model, params = api.load_pretrained(tmp_path / "tied", head=HeadSpec("causal_lm"))
    ids, mask = rows(97)
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        hidden = theirs.transformer(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions)
        want = (hidden.last_hidden_state @ theirs.transformer.wte.weight.T).numpy()
    assert apart(our_logits(model, params, ids, mask), want, mask) < 1e-4


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX"])
def test_question_answering(tmp_path, name):
    theirs = torch_head(tmp_path / "a", name, "QuestionAnswering", 2)
    model, params = hf.load(str(tmp_path / "a"))
    assert model.head == HeadSpec("question_answering", ("start", "end"))
    ids, mask = rows(97, left=True)
    want = torch_spans(theirs, ids, mask)
    assert apart(our_logits(model, params, ids, mask), want, mask) < 1e-4
    hf.save(model, params, tmp_path / "b")
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert apart(torch_spans(back.eval(), ids, mask), want, mask) < 1e-5


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_values_are_the_scores_of_all_prefixes(tmp_path, name):
    """A value head is a reward model's, read at every token; its file is one of sequence classification."""
    theirs = torch_head(tmp_path / "a", name, "SequenceClassification", 1)
    model, params = hf.load(str(tmp_path / "a"), head=HeadSpec("value", ("LABEL_0",)))
    ids, _ = rows(97)
    ids = ids[:1]
    values = our_logits(model, params, ids)
    assert values.shape == (1, ids.shape[1], 1)
    for n in (1, 5, ids.shape[1]):
        want = torch_out(theirs, ids[:, :n], np.ones_like(ids[:, :n]))
        np.testing.assert_allclose(values[:, n - 1], want, atol=1e-4)
    hf.save(model, params, tmp_path / "b")
    assert hf.load(str(tmp_path / "b"))[0].head == HeadSpec("sequence_classification", ("LABEL_0",))
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(torch_out(back.eval(), ids, np.ones_like(ids)), values[:, -1], atol=1e-4)


def test_labels_and_kind_of_problem_are_kept(tmp_path):
    torch_llama(tmp_path)
    spec = HeadSpec("sequence_classification", ("score",), "regression")
    with pytest.warns(UserWarning):
        model, params = api.load_pretrained(tmp_path, head=spec)
    api.save_pretrained(model, params, tmp_path / "b")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.problem_type, config.num_labels, config.id2label) == ("regression", 1, {0: "score"})
    assert api.load_pretrained(tmp_path / "b")[0].head == spec


def test_a_head_that_the_family_lacks(tmp_path):
    torch_llama(tmp_path)
    with pytest.raises(ConfigError, match="llama has no head 'masked_lm'. .*Heads: causal_lm, sequence_classification"):
        api.load_pretrained(tmp_path, head=HeadSpec("masked_lm"))
