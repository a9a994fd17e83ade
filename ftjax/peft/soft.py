"""Virtual tokens in front of the input: what prompt tuning and P-tuning share, and how PEFT keeps them.

The tap at the site ``input/tap`` puts n columns before the tokens, visible from every example of a packed row, and moves the
tokens' positions on by n. The model cuts them off again before its head, so that labels need no change.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ftjax.errors import ConfigError, DataError
from ftjax.ops import GLOBAL_SEGMENT
from ftjax.params import ParamSpec, Store, Table, ranged
from ftjax.peft.base import Overlay
from ftjax.peft.interop import CONFIG_FILE, Codec, Tensors, check_settings

SITE = "input/tap"
TENSOR = "prompt_embeddings"


def in_front(seq: Any, virtual: jax.Array) -> Any:
    """A sequence whose positions are moved on already, with virtual tokens [n, D] before it; later tokens pass by."""
    if not seq.first:
        return seq
    B, n = seq.h.shape[0], virtual.shape[0]
    whole = jnp.broadcast_to(virtual.astype(seq.h.dtype), (B, *virtual.shape))
    places = jnp.broadcast_to(jnp.arange(n, dtype=seq.positions.dtype), (B, n))

    def before(value: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(jnp.asarray(value, x.dtype), (B, n)), x], axis=1)

    return dc.replace(
        seq, h=jnp.concatenate([whole, seq.h], axis=1), positions=jnp.concatenate([places, seq.positions], axis=1),
        segments=before(GLOBAL_SEGMENT, seq.segments), prompt_len=before(0, seq.prompt_len),
    )  # fmt: skip


@struct.dataclass
class PromptTap:
    """Virtual tokens as they are: `embeddings` [n, D]."""

    embeddings: jax.Array

    @property
    def shift(self) -> int:
        """By how much the tokens' positions are moved on."""
        return self.embeddings.shape[0]

    def tokens(self) -> jax.Array:
        """The virtual tokens [n, D]."""
        return self.embeddings

    def __call__(self, seq: Any, _: Any) -> Any:
        """The sequence with the virtual tokens in front."""
        return in_front(seq, self.embeddings)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Split as the hidden values."""
        return {"embeddings": (None, "embed")}


def width(table: Table, name: str) -> int:
    """D of a model that takes virtual tokens.

    Raises:
      ConfigError: it has no place for them.
    """
    if SITE not in table or "embed/w" not in table:
        raise ConfigError(f"peft={name}: the model has no input of tokens to put virtual ones before")
    return table[SITE].shape[0]


class SoftCodec(Codec):
    """Virtual tokens in PEFT's format: one tensor ``prompt_embeddings`` [n, D]."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    READ: ClassVar[tuple[str, ...]] = (
        "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    )  # fmt: skip

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        return check_settings(config, read=self.READ, neutral=self.NEUTRAL)

    def method_of(self, config: Mapping[str, Any]) -> Any:
        """The method with the file's settings."""
        raise NotImplementedError

    def settings_of(self, method: Any) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        raise NotImplementedError

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`."""
        made = np.asarray(jax.device_get(overlay[SITE].tokens()), np.float32)
        layers = max(r.stop for k in table if (r := ranged(k)))
        heads = next(s.shape[-2] for k, s in table.items() if k.endswith("attn_kv"))
        return {
            "num_virtual_tokens": made.shape[0], "token_dim": made.shape[1], "num_transformer_submodules": 1,
            "num_attention_heads": heads, "num_layers": layers, **self.settings_of(method),
        }, {TENSOR: made}  # fmt: skip

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`; what an encoder made is read as plain virtual tokens."""
        want = (config.get("num_virtual_tokens"), width(table, str(self.peft_type).lower()))
        return self.method_of(config), {SITE: PromptTap(jnp.asarray(only(tensors, want)))}


def only(tensors: Tensors, shape: tuple[Any, ...]) -> np.ndarray:
    """The one tensor of a prompt-like file.

    Raises:
      DataError: it is missing or misshapen, or there are others.
    """
    extra = sorted(set(tensors) - {TENSOR})
    if TENSOR not in tensors or extra:
        raise DataError(f"expected the one tensor {TENSOR}, found {', '.join(sorted(tensors)) or 'none'}")
    if tensors[TENSOR].shape != shape:
        raise DataError(f"{TENSOR} {list(tensors[TENSOR].shape)}: {CONFIG_FILE} and the model call for {list(shape)}")
    return tensors[TENSOR]
