"""A tiny GPT-2."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.gpt2 import GPT2, GPT2Config
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads."""
    config = GPT2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, layer_norm_eps=1e-5, activation="gelu_new", initializer_range=0.1,
        tie_word_embeddings=True, scale_by_head=True, scale_by_layer=False, rates=(), bos_token_id=None,
        eos_token_id=(), pad_token_id=None,
    )  # fmt: skip
    return GPT2(config, numerics or Numerics(), head or HeadSpec())
