"""A tiny T5."""

from __future__ import annotations

from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics
from ftjax.models.t5 import T5, T5Config
from tests.tiny import VOCAB


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers a side, 32 wide, 4 heads, gated."""
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=4, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu", initializer_factor=0.5, tie_word_embeddings=True, scale_decoder_outputs=True,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=(1,), rates=(("dropout_rate", 0.1),),
    )  # fmt: skip
    return T5(config, numerics or Numerics(), head or HeadSpec())
