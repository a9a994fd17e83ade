"""A tiny ModernBERT."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.modernbert import ModernBert, ModernBertConfig
from ftjax.models.rope import Rope
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 4 heads; the second and the third layer see 3 tokens to either side."""
    config = ModernBertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        hidden_activation="gelu", max_position_embeddings=64, norm_eps=1e-5, norm_bias=False, attention_bias=False,
        mlp_bias=False, decoder_bias=True, classifier_bias=False, classifier_activation="gelu",
        classifier_pooling="mean",
        layer_types=("full_attention", "sliding_attention", "sliding_attention", "full_attention"), local_attention=6,
        rope=Rope(1e4, "default", 1.0, 0.0, 0.0, 0), local_rope=Rope(1e3, "default", 1.0, 0.0, 0.0, 0),
        initializer_range=0.1, tie_word_embeddings=True, rates=(), pad_token_id=0, bos_token_id=None, eos_token_id=(),
        cls_token_id=None, sep_token_id=None,
    )  # fmt: skip
    return ModernBert(config, numerics or Numerics(), head or HeadSpec())
