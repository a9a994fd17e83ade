"""A tiny ViT for the images of `tests.tiny`."""

from __future__ import annotations

from ftjax.headspec import HeadSpec, label_names
from ftjax.models.base import Model, Numerics
from ftjax.models.vit import ViT, ViTConfig
from tests.tiny import IMAGE


def model(numerics: Numerics | None = None, head: HeadSpec | None = None) -> Model:
    """4 layers, 32 wide, 16 patches.

    Without biases on queries and keys: a key's bias shifts all scores of a query alike, so that its gradient is rounding
    error, which Adam blows up.
    """
    numbers = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, hidden_act="gelu",
        layer_norm_eps=1e-6, image_size=IMAGE, patch_size=IMAGE // 4, num_channels=3, qkv_bias=False,
        initializer_range=0.1,
    )  # fmt: skip
    return ViT(numbers, numerics or Numerics(), head or HeadSpec("image_classification", label_names(3)))
