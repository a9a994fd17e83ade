"""The layers of T5: biases by relative position, blocks of either side, and what the decoder reads from the source.

bias = RelativeBias(config, "encoder").apply({"params": p}, positions, positions)          # [B, N, T, T]
h, cache = T5Block(config, "encoder").apply({"params": layer}, h, seq, 0, None, bias, None)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax.models.layers import ACTIVATIONS, KV, Linear, RMSNorm, Seq, attend, extend
from ftjax.models.transformer import Embedding
from ftjax.params import ParamSpec, site

Side = Literal["encoder", "decoder"]
# "gated-gelu" means the tanh form, plain "gelu" the exact one, as in the published checkpoints.
FORMS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gelu": ("gelu", False)} | {
    f"gated-{name}": (name, True) for name in ("silu", "relu")
}


def buckets(config: Any, side: Side) -> np.ndarray:
    """Bucket of each distance 0 ... max_distance within one direction, int32 [max_distance + 1]; farther is as the last.

    Half of the buckets are for single distances, the others grow with the logarithm (section 2.1 of the paper).
    """
    count = config.relative_attention_num_buckets // (2 if side == "encoder" else 1)
    exact, farthest = count // 2, config.relative_attention_max_distance
    distance = np.arange(farthest + 1, dtype=np.float32)
    log = np.log(np.maximum(distance, 1) / np.float32(exact), dtype=np.float32)
    grown = exact + (log / np.float32(math.log(farthest / exact)) * np.float32(count - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(grown, count - 1)).astype(np.int32)


class RelativeBias(nn.Module):
    """Biases of the scores [B, N, T, S] by relative position, float32."""

    config: Any
    side: Side

    @nn.compact
    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        c = self.config
        ahead = k_positions[:, None, :] - q_positions[:, :, None]
        distance = jnp.abs(ahead) if self.side == "encoder" else jnp.maximum(-ahead, 0)
        place = jnp.asarray(buckets(c, self.side))[jnp.minimum(distance, c.relative_attention_max_distance)]
        if self.side == "encoder":
            place = place + jnp.where(ahead > 0, c.relative_attention_num_buckets // 2, 0)
        rows, hf = (
            c.relative_attention_num_buckets,
            f"{self.side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        )
        std = c.initializer_factor * c.d_model**-0.5
        table = Embedding(
            rows, c.num_heads, hf + ".weight", std, jnp.float32, (None, "heads"), name=f"{self.side}_bias"
        )
        return table(place).transpose(0, 3, 1, 2)


def _linear(c: Any, out: int, axes: tuple[str, str], hf: str, name: str, fan: float) -> Linear:
    return Linear(out, axes, hf, False, c.initializer_factor * fan**-0.5, name=name)


def prefix_places(segments: tuple[dict[str, Any], ...], like: jax.Array) -> jax.Array:
    """Positions [B, n] of what taps put before the keys of a stack: -n ... -1, whatever the tokens' own."""
    n = max(getattr(s.get("attn_kv"), "columns", 0) for s in segments)
    return jnp.broadcast_to(jnp.arange(-n, 0, dtype=like.dtype), (like.shape[0], n))


class SourceKV(nn.Module):
    """Keys and values of one decoder layer over the encoder's values: (k, v) [B, S, N, H]."""

    config: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        out, hf = c.num_heads * c.d_kv, "decoder.block.{}.layer.1.EncDecAttention."
        k = _linear(c, out, ("embed", "kv"), hf + "k", "xk", c.d_model)(h)
        v = _linear(c, out, ("embed", "kv"), hf + "v", "xv", c.d_model)(h)
        split = (*h.shape[:2], c.num_heads, c.d_kv)
        return k.reshape(split), v.reshape(split)


class T5Block(nn.Module):
    """One layer of a side. Sites: attn_kv and cross_out (decoder), attn_out, mlp_out, residual."""

    config: Any
    side: Side

    def norm(self, part: int, name: str) -> RMSNorm:
        """The norm before a part."""
        return RMSNorm(self.config.layer_norm_epsilon, f"{self._at(part)}layer_norm.weight", name=name)

    def linear(self, part: int, hf: str, name: str, out: int, axes: tuple[str, str], fan: float) -> Linear:
        """A projection of this block; `fan` decides its initial size."""
        return _linear(self.config, out, axes, self._at(part) + hf, name, fan)

    def _at(self, part: int) -> str:
        return f"{self.side}.block.{{}}.layer.{part}."

    @nn.compact
    def __call__(
        self, h: jax.Array, seq: Seq, layer: Any, cache: Any, bias: jax.Array, source: KV | None
    ) -> tuple[jax.Array, Any]:
        c = self.config
        D, N, H = c.d_model, c.num_heads, c.d_kv
        hidden = ParamSpec((D,), ("embed",), "site")

        def heads(x: jax.Array, part: int, hf: str, name: str, axis: str, fan: float) -> jax.Array:
            return self.linear(part, hf, name, N * H, ("embed", axis), fan)(x).reshape(*x.shape[:2], N, H)

        x = self.norm(0, "ln1")(h)
        q = heads(x, 0, "SelfAttention.q", "q", "heads", D * H)
        k, v = (heads(x, 0, f"SelfAttention.{n}", n, "kv", D) for n in "kv")
        kv, cache = extend(cache, layer, k, v, seq)
        if self.side == "decoder":
            kv = site(self, "attn_kv", kv, seq, ParamSpec((N, H), ("kv", "head"), "site"), hidden=x)
        own = bias[..., bias.shape[-1] - kv.k.shape[1] :]  # without the columns of a prefix that other layers have
        a = attend(q, kv, seq, scale=1.0, causal=self.side == "decoder", bias=own)
        a = self.linear(0, "SelfAttention.o", "o", D, ("heads", "embed"), N * H)(a)
        h = h + site(self, "attn_out", a, seq, hidden, residual=h)
        part = 1
        if source is not None:
            q = heads(self.norm(1, "ln_cross")(h), 1, "EncDecAttention.q", "xq", "heads", D * H)
            a = attend(q, source, seq, scale=1.0, causal=False)
            a = self.linear(1, "EncDecAttention.o", "xo", D, ("heads", "embed"), N * H)(a)
            h, part = h + site(self, "cross_out", a, seq, hidden), 2
        y = self.feed_forward(self.norm(part, "ln2")(h), part)
        h = h + site(self, "mlp_out", y, seq, hidden, residual=h)
        return site(self, "residual", h, seq, hidden), cache

    def feed_forward(self, x: jax.Array, part: int) -> jax.Array:
        """W2 act(W1 x), or W2 (act(Wg x) * W1 x)."""
        c = self.config
        name, gated = FORMS[c.feed_forward_proj]
        inner, at = ("embed", "mlp"), "DenseReluDense."
        if gated:
            gate = self.linear(part, at + "wi_0", "gate", c.d_ff, inner, c.d_model)(x)
            up = ACTIVATIONS[name](gate) * self.linear(part, at + "wi_1", "up", c.d_ff, inner, c.d_model)(x)
        else:
            up = ACTIVATIONS[name](self.linear(part, at + "wi", "up", c.d_ff, inner, c.d_model)(x))
        return self.linear(part, at + "wo", "down", c.d_model, ("mlp", "embed"), c.d_ff)(up)
