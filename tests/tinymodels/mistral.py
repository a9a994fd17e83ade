"""A tiny Mistral."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.mistral import Mistral, MistralConfig
from ftjax.models.rope import Rope
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads over 2 key heads."""
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope=Rope(1e4, "default", 1.0, 0.0, 0.0, 0), tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        initializer_range=0.1, sliding_window=6
    )  # fmt: skip
    return Mistral(config, numerics or Numerics(), head or HeadSpec())
