"""Llama 2 and 3: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv:2307.09288).

h = h + Wo attention(rope(Wq x), rope(Wk x), Wv x), x = norm(h);   h = h + Wd (silu(Wg x) * Wu x), x = norm(h)
"""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import Cache, Linear, RMSNorm, Seq, attend, extend, rotate
from ftjax.models.transformer import Decoder, decoder_heads
from ftjax.params import ParamSpec, site
from ftjax.registry import register


@dc.dataclass(frozen=True)
class Rope:
    """Rotary frequencies: base theta, and Llama 3's rescaling of the low ones or linear interpolation.

    Attributes:
      theta: base of the geometric series.
      kind: "default", "linear" or "llama3".
      factor: context extension.
      low_freq_factor, high_freq_factor, original_length: Llama 3's band limits (0 elsewhere).
    """

    theta: float
    kind: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Inverse frequencies [head_dim / 2], float32."""
        inv = 1.0 / (np.float32(self.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
        if self.kind == "linear":
            return (inv / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(inv)
        return inv.astype(np.float32)

    def _llama3(self, inv: np.ndarray) -> np.ndarray:
        """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1 report)."""
        wavelength = 2 * math.pi / inv
        smooth = (self.original_length / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * inv / self.factor + smooth * inv
        long = wavelength > self.original_length / self.low_freq_factor
        short = wavelength < self.original_length / self.high_freq_factor
        return np.where(long, inv / self.factor, np.where(short, inv, blended)).astype(np.float32)


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

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        c.require("hidden_act", "silu")
        c.require("pretraining_tp", 1, absent_ok=True)
        hidden, heads = c.int("hidden_size"), c.int("num_attention_heads")
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
            rope=read_rope(c),
            tie_word_embeddings=c.bool("tie_word_embeddings", implied=False),
            attention_bias=c.bool("attention_bias", implied=False),
            mlp_bias=c.bool("mlp_bias", implied=False),
            initializer_range=c.float("initializer_range", implied=0.02),
            bos_token_id=c.token("bos_token_id"),
            eos_token_id=c.tokens("eos_token_id"),
            pad_token_id=c.token("pad_token_id"),
        )
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        eos = list(self.eos_token_id)
        plain = {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name not in ("rope", "eos_token_id")}
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            **plain,
            **write_rope(self.rope),
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }


_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(c: HFConfig) -> Rope:
    """Rotary settings in either form: ``rope_theta`` + ``rope_scaling``, or transformers 5's ``rope_parameters``."""
    new, old = c.mapping("rope_parameters"), c.mapping("rope_scaling")
    scaling = {k: v for k, v in (new or old).items() if v is not None}
    theta = scaling.get("rope_theta", c.raw("rope_theta"))
    if theta is None:
        raise c.missing("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise c.wrong("rope_theta", theta, "a number")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_NUMBERS:
        raise c.wrong("rope_scaling.rope_type", kind, "default, linear or llama3")
    unknown = sorted(set(scaling) - {"rope_type", "type", "rope_theta", *_ROPE_NUMBERS[kind]})
    if unknown:
        raise c.wrong(f"rope_scaling.{unknown[0]}", scaling[unknown[0]], f"no such setting with rope_type={kind!r}")

    def number(name: str) -> float:
        if name not in scaling:
            raise c.missing(f"rope_scaling.{name}")
        if isinstance(scaling[name], bool) or not isinstance(scaling[name], int | float):
            raise c.wrong(f"rope_scaling.{name}", scaling[name], "a number")
        return float(scaling[name])

    given = {name: number(name) for name in _ROPE_NUMBERS[kind]}
    return Rope(
        float(theta),
        kind,
        given.get("factor", 1.0),
        given.get("low_freq_factor", 0.0),
        given.get("high_freq_factor", 0.0),
        int(given.get("original_max_position_embeddings", 0)),
    )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The rotary settings in both forms, so that old and new transformers read the same."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }


class LlamaBlock(nn.Module):
    """One layer. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, layer: Any, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        h, cache = self.attention(h, seq, layer, cache)
        h = self.mlp(h, seq)
        return site(self, "residual", h, seq, self.hidden_site), cache

    @property
    def hidden_site(self) -> ParamSpec:
        """What a tap on hidden values must fit."""
        return ParamSpec((self.config.hidden_size,), ("embed",), "site")

    def linear(self, out: int, axes: tuple[str, str], name: str, hf: str, *, bias: bool) -> Linear:
        """A projection of this block."""
        return Linear(out, axes, f"model.layers.{{}}.{hf}", bias, self.config.initializer_range, name=name)

    def attention(self, h: jax.Array, seq: Seq, layer: Any, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Adds grouped-query self-attention."""
        c = self.config
        N, K, H, bias = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.attention_bias
        x = RMSNorm(c.rms_norm_eps, "model.layers.{}.input_layernorm.weight", name="ln1")(h)
        q = self.linear(N * H, ("embed", "heads"), "q", "self_attn.q_proj", bias=bias)(x).reshape(*x.shape[:2], N, H)
        k = self.linear(K * H, ("embed", "kv"), "k", "self_attn.k_proj", bias=bias)(x).reshape(*x.shape[:2], K, H)
        v = self.linear(K * H, ("embed", "kv"), "v", "self_attn.v_proj", bias=bias)(x).reshape(*x.shape[:2], K, H)
        inv_freq = jnp.asarray(c.rope.inv_freq(H))
        q = rotate(q, seq.positions, inv_freq, scale=1.0)
        k = rotate(k, seq.positions, inv_freq, scale=1.0)
        kv, cache = extend(cache, layer, k, v, seq)
        kv = site(self, "attn_kv", kv, seq, ParamSpec((K, H), ("kv", "head"), "site"))
        a = attend(q, kv, seq, scale=H**-0.5)
        a = self.linear(c.hidden_size, ("heads", "embed"), "o", "self_attn.o_proj", bias=bias)(a)
        return h + site(self, "attn_out", a, seq, self.hidden_site), cache

    def mlp(self, h: jax.Array, seq: Seq) -> jax.Array:
        """Adds the gated feed-forward part."""
        c = self.config
        x = RMSNorm(c.rms_norm_eps, "model.layers.{}.post_attention_layernorm.weight", name="ln2")(h)
        gate = self.linear(c.intermediate_size, ("embed", "mlp"), "gate", "mlp.gate_proj", bias=c.mlp_bias)(x)
        up = self.linear(c.intermediate_size, ("embed", "mlp"), "up", "mlp.up_proj", bias=c.mlp_bias)(x)
        y = self.linear(c.hidden_size, ("mlp", "embed"), "down", "mlp.down_proj", bias=c.mlp_bias)(nn.silu(gate) * up)
        return h + site(self, "mlp_out", y, seq, self.hidden_site)


@register("family", "llama")
@dc.dataclass(frozen=True)
class Llama(Decoder):
    """Llama for causal language modelling."""

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
        return RMSNorm(self.config.rms_norm_eps, "model.norm.weight")
