"""A tiny DistilBERT."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.distilbert import DistilBert, DistilBertConfig
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads."""
    config = DistilBertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        hidden_act="gelu", max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=True,
        sinusoidal_pos_embds=False, pad_token_id=0, rates=(("dropout", 0.1),),
    )  # fmt: skip
    return DistilBert(config, numerics or Numerics(), head or HeadSpec())
