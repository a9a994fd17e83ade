"""Resized vocabularies against transformers: the folder opens with the new size, the new rows are those of its own resizing."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ftjax.models import hf  # noqa: E402
from ftjax.models.vocab import resize_vocabulary  # noqa: E402
from tests.oracle import apart, our_logits, rows, torch_llama, torch_logits  # noqa: E402
from tests.oracle.test_decoders import torch_decoder  # noqa: E402
from tests.oracle.test_heads import torch_head  # noqa: E402

OLD, NEW = 97, 103
CASES = {
    "Llama": lambda folder: torch_llama(folder, tie_word_embeddings=False),
    "Llama tied": lambda folder: torch_llama(folder, tie_word_embeddings=True),
    "GPT2": lambda folder: torch_decoder(folder, "GPT2", {}),
    "GPT2 untied": lambda folder: torch_decoder(folder, "GPT2", {"tie_word_embeddings": False}),
    "GPTNeoX": lambda folder: torch_decoder(folder, "GPTNeoX", {}),
    "classifier": lambda folder: torch_head(folder, "GPT2", "SequenceClassification", 3),
    "Bert": lambda folder: torch_bert(folder),
}


def torch_bert(folder):
    """A tiny random BERT, whose vocabulary head has a bias."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=OLD, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "LayerNorm.weight" in name else 0.0))
    model.save_pretrained(folder)
    return model


def logits_of(model, ids, mask):
    """Each family at its own positions."""
    if type(model).__name__.startswith("Bert"):
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    return torch_logits(model, ids, mask)


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_resizes(tmp_path, case):
    theirs = CASES[case](tmp_path / "a")
    model, params = hf.load(str(tmp_path / "a"))
    larger, grown = resize_vocabulary(model, params, NEW)
    hf.save(larger, grown, tmp_path / "b")
    assert hf.load(str(tmp_path / "b"))[0] == larger
    back, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.config.vocab_size == NEW and back.get_input_embeddings().weight.shape[0] == NEW

    ids, mask = rows(OLD)
    ids = np.where(mask > 0, np.maximum(ids, 3), 0)
    pooled = case == "classifier"
    before, after = logits_of(theirs, ids, mask), logits_of(back.eval(), ids, mask)
    where = None if pooled else mask
    np.testing.assert_allclose(after[..., : before.shape[-1]], before, atol=1e-5)
    new_tokens = np.where(mask > 0, np.maximum(ids, OLD), 0)  # every token a new one
    for tokens in (ids, new_tokens):
        assert apart(our_logits(larger, grown, tokens, mask), logits_of(back, tokens, mask), where) < 1e-4

    # Its own resizing draws around the mean, with a spread of sqrt(1e-9) of the rows': the same but for that.
    torch.manual_seed(0)
    theirs.resize_token_embeddings(NEW)
    own = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    mine = {name: p.detach().numpy() for name, p in back.named_parameters()}
    assert set(own) == set(mine)
    for name, p in own.items():
        if name == "cls.predictions.bias":  # BERT's is a parameter of its own, which transformers fills with 0
            np.testing.assert_array_equal(p[OLD:], 0)
            np.testing.assert_allclose(mine[name][OLD:], p[:OLD].mean(), rtol=1e-5)
            np.testing.assert_array_equal(mine[name][:OLD], p[:OLD])
        else:
            np.testing.assert_allclose(mine[name], p, atol=1e-4, err_msg=name)
