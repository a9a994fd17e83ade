"""A tiny GPT-NeoX."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from ftjax.models.rope import Rope
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads, half of each rotated."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, layer_norm_eps=1e-5, hidden_act="gelu",
        rope=Rope(1e4, "default", 1.0, 0.0, 0.0, 0, 0.5), use_parallel_residual=True, attention_bias=True,
        initializer_range=0.1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=(), pad_token_id=None,
    )  # fmt: skip
    return GPTNeoX(config, numerics or Numerics(), head or HeadSpec())
