"""The base as plain arrays.

model=Pretrained(path="my/llama", quantize=Plain())
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ftjax.quant.base import Storage
from ftjax.registry import register


@register("quant")
class Plain(Storage):
    """Nothing is quantized."""

    packs: ClassVar[bool] = False

    name: Literal["none"] = "none"
