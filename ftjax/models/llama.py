"""Llama 2 and 3, and what its descendants change: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

h = h + Wo attention(rope(Wq x), rope(Wk x), Wv x), x = norm(h);   h = h + Wd (act(Wg x) * Wu x), x = norm(h)
(Touvron et al. 2023, arXiv:2307.09288). A descendant is a config that reads its file and says in an `Arch` what differs.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS, KV, Cache, Linear, RMSNorm, Seq, attend, extend, rotate
from ftjax.models.rope import Rope, read_rope, write_rope
from ftjax.models.transformer import Decoder, decoder_heads
from ftjax.params import ParamSpec, site
from ftjax.registry import register

__all__ = ["Arch", "Llama", "LlamaBlock", "LlamaConfig", "Rope"]

_EVERYWHERE = np.iinfo(np.int32).max // 2  # a window that nobody sees the end of


@dc.dataclass(frozen=True)
class Arch:
    """What distinguishes a descendant from Llama.

    Attributes:
      activation: of the gate.
      norms: before each part; after it, within the residual; or both.
      norm_offset: see `RMSNorm`.
      qk_norm: norm of queries and keys: none, over each head, or over all heads together.
      qkv_bias: bias on queries, keys and values even where the output has none.
      fused: one matrix for queries, keys and values, one for gate and up.
      windows: how far back each layer sees, 0 for everything; empty: everything everywhere.
      local_rope: rotary settings of the layers with a window; None: the same.
      scale: of the scores; None: 1 / sqrt(head dimension).
      attention_cap, logit_cap: soft limits of scores and logits.
      embed_scale: factor on embedded tokens.
    """

    activation: str = "silu"
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: float | None = None
    qk_norm: Literal["", "head", "all"] = ""
    qkv_bias: bool = False
    fused: bool = False
    windows: tuple[int, ...] = ()
    local_rope: Rope | None = None
    scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0


@dc.dataclass(frozen=True)
class LlamaConfig(FamilyConfig):
    """The numbers of a Llama; names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    model_type: ClassVar[str] = "llama"
    activation_key: ClassVar[str] = "hidden_act"
    tied_unless_said: ClassVar[bool] = False
    """What a file without ``tie_word_embeddings`` means."""
    says: ClassVar[tuple[str, ...]] = ()
    """What this family's file must say, be it null: absent, transformers would put a number of its own there."""
    rotates_in_part: ClassVar[bool] = False
    unwritten: ClassVar[tuple[str, ...]] = ()
    """Fields that this family's file does not have."""

    @property
    def arch(self) -> Arch:
        """What differs from Llama: nothing."""
        return Arch()

    @classmethod
    def extra(cls, c: HFConfig) -> dict[str, Any]:
        """Reads what this family has beyond Llama's numbers."""
        c.require("pretraining_tp", 1, absent_ok=True)
        c.require(cls.activation_key, "silu")
        return {}

    @classmethod
    def read_rope(cls, c: HFConfig) -> Rope:
        """Reads the rotary settings."""
        rope = read_rope(c)
        if rope.partial != 1.0 and not cls.rotates_in_part:
            raise c.wrong("rope_scaling.partial_rotary_factor", rope.partial, "no such setting in this family")
        return rope

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        hidden, heads = c.int("hidden_size"), c.int("num_attention_heads")
        for name in cls.says:
            c.said(name)
        read = cls(
            vocab_size=c.int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=c.int("intermediate_size"),
            num_hidden_layers=c.int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=c.int("num_key_value_heads", implied=heads),
            head_dim=c.int("head_dim", implied=hidden // heads),
            max_position_embeddings=c.int("max_position_embeddings"),
            rms_norm_eps=c.float("rms_norm_eps"),
            rope=cls.read_rope(c),
            tie_word_embeddings=c.bool("tie_word_embeddings", implied=cls.tied_unless_said),
            attention_bias=c.bool("attention_bias", implied=False),
            mlp_bias=c.bool("mlp_bias", implied=False),
            initializer_range=c.float("initializer_range", implied=0.02),
            bos_token_id=c.token("bos_token_id"),
            eos_token_id=c.tokens("eos_token_id"),
            pad_token_id=c.token("pad_token_id"),
            **cls.extra(c),
        )
        c.finish()
        return read

    def write_rope(self) -> dict[str, Any]:
        """The rotary settings."""
        return write_rope(self.rope)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        eos = list(self.eos_token_id)
        left_out = ("rope", "eos_token_id", *self.unwritten)
        plain = {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name not in left_out}
        return {
            "model_type": self.model_type,
            self.activation_key: self.arch.activation,
            "attention_dropout": 0.0,
            **plain,
            **self.write_rope(),
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }


class LlamaBlock(nn.Module):
    """One layer. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, layer: Any, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        norms = self.config.arch.norms
        names = {
            "before": ("input_layernorm", "", "post_attention_layernorm", ""),
            "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
            "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                     "post_feedforward_layernorm"),
        }[norms]  # fmt: skip
        a, cache = self.attention(self.norm("ln1", names[0])(h), seq, layer, cache)
        h = h + self.norm("post1", names[1])(site(self, "attn_out", a, seq, self.hidden_site, residual=h))
        y = self.mlp(self.norm("ln2", names[2])(h))
        h = h + self.norm("post2", names[3])(site(self, "mlp_out", y, seq, self.hidden_site, residual=h))
        return site(self, "residual", h, seq, self.hidden_site), cache

    @property
    def hidden_site(self) -> ParamSpec:
        """What a tap on hidden values must fit."""
        return ParamSpec((self.config.hidden_size,), ("embed",), "site")

    def norm(self, name: str, hf: str, axis: str | None = "embed") -> Any:
        """A norm of this block; without a name in the file, nothing."""
        if not hf:
            return lambda x: x
        c = self.config
        return RMSNorm(c.rms_norm_eps, f"model.layers.{{}}.{hf}.weight", c.arch.norm_offset, axis, name=name)

    def linear(self, out: int, axes: tuple[str | None, str | None], name: str, hf: str, *, bias: bool) -> Linear:
        """A projection of this block."""
        return Linear(out, axes, f"model.layers.{{}}.{hf}", bias, self.config.initializer_range, name=name)

    def qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H]."""
        c, arch = self.config, self.config.arch
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        bias = c.attention_bias or arch.qkv_bias
        if arch.fused:
            both = self.linear((N + 2 * K) * H, ("embed", None), "qkv", "self_attn.qkv_proj", bias=bias)(x)
            q, k, v = jnp.split(both, [N * H, (N + K) * H], axis=-1)
        else:
            q = self.linear(N * H, ("embed", "heads"), "q", "self_attn.q_proj", bias=bias)(x)
            k = self.linear(K * H, ("embed", "kv"), "k", "self_attn.k_proj", bias=bias)(x)
            v = self.linear(K * H, ("embed", "kv"), "v", "self_attn.v_proj", bias=bias)(x)
        if arch.qk_norm == "all":
            q = self.norm("q_norm", "self_attn.q_norm", "heads")(q)
            k = self.norm("k_norm", "self_attn.k_norm", "kv")(k)
        q, k, v = (y.reshape(*x.shape[:2], n, H) for y, n in ((q, N), (k, K), (v, K)))
        if arch.qk_norm == "head":
            q = self.norm("q_norm", "self_attn.q_norm", None)(q)
            k = self.norm("k_norm", "self_attn.k_norm", None)(k)
        return q, k, v

    def reach(self, layer: Any) -> tuple[Any, jax.Array]:
        """(window of this layer or None, its inverse rotary frequencies); `layer` may be traced."""
        c, arch = self.config, self.config.arch
        inv_freq = jnp.asarray(c.rope.inv_freq(c.head_dim))
        if not any(arch.windows):
            return None, inv_freq
        window = jnp.asarray([w or _EVERYWHERE for w in arch.windows], jnp.int32)[layer]
        if arch.local_rope is not None:
            inv_freq = jnp.where(window < _EVERYWHERE, jnp.asarray(arch.local_rope.inv_freq(c.head_dim)), inv_freq)
        return window, inv_freq

    def attention(self, x: jax.Array, seq: Seq, layer: Any, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Grouped-query self-attention."""
        c, arch = self.config, self.config.arch
        q, k, v = self.qkv(x)
        window, inv_freq = self.reach(layer)
        q = rotate(q, seq.positions, inv_freq, scale=1.0)
        k = rotate(k, seq.positions, inv_freq, scale=1.0)
        kv, cache = extend(cache, layer, k, v, seq)
        pairs = ParamSpec((c.num_key_value_heads, c.head_dim), ("kv", "head"), "site")
        kv: KV = site(self, "attn_kv", kv, seq, pairs, hidden=x)
        scale = c.head_dim**-0.5 if arch.scale is None else arch.scale
        a = attend(q, kv, seq, scale=scale, window=window, cap=arch.attention_cap)
        return self.linear(c.hidden_size, ("heads", "embed"), "o", "self_attn.o_proj", bias=c.attention_bias)(a), cache

    def mlp(self, x: jax.Array) -> jax.Array:
        """The gated feed-forward part."""
        c, F = self.config, self.config.intermediate_size
        if c.arch.fused:
            both = self.linear(2 * F, ("embed", None), "gate_up", "mlp.gate_up_proj", bias=c.mlp_bias)(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = self.linear(F, ("embed", "mlp"), "gate", "mlp.gate_proj", bias=c.mlp_bias)(x)
            up = self.linear(F, ("embed", "mlp"), "up", "mlp.up_proj", bias=c.mlp_bias)(x)
        y = ACTIVATIONS[c.arch.activation](gate) * up
        return self.linear(c.hidden_size, ("mlp", "embed"), "down", "mlp.down_proj", bias=c.mlp_bias)(y)


@register("family", "llama")
@dc.dataclass(frozen=True)
class Llama(Decoder):
    """Llama with one of its heads; SmolLM is one."""

    family: ClassVar[str] = "llama"
    Config: ClassVar[type[FamilyConfig]] = LlamaConfig
    heads: ClassVar[dict[str, str]] = decoder_heads("Llama")

    @property
    def block(self) -> nn.Module:
        """One layer."""
        return LlamaBlock(self.config)

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return RMSNorm(self.config.rms_norm_eps, "model.norm.weight", self.config.arch.norm_offset)

    @property
    def embed_scale(self) -> float:
        """Factor on the embedded tokens."""
        return self.config.arch.embed_scale

    @property
    def logit_cap(self) -> float | None:
        """Soft limit of the logits, or None."""
        return self.config.arch.logit_cap
