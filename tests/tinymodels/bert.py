"""A tiny BERT."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.bert import Bert, BertConfig
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        hidden_act="gelu", max_position_embeddings=64, type_vocab_size=2, layer_norm_eps=1e-12, initializer_range=0.1,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=(), hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1, classifier_dropout=None,
    )  # fmt: skip
    return Bert(config, numerics or Numerics(), head or HeadSpec())
