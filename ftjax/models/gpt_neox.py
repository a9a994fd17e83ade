"""GPT-NeoX and Pythia: attention and feed-forward part side by side, a part of each head rotated (arXiv:2204.06745).

h = h + Wo attention(Wqkv norm1(h)) + W2 act(W1 norm2(h))          (one after the other without `use_parallel_residual`)

Queries, keys and values stand head by head in one matrix, which stays whole. The dropout of the base model is not applied
while fine-tuning.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS, Cache, LayerNorm, Linear, Seq, attend, extend, rotate
from ftjax.models.rope import Rope, rope_of, rope_settings
from ftjax.models.transformer import Decoder, decoder_heads
from ftjax.params import ParamSpec, site
from ftjax.registry import register


@dc.dataclass(frozen=True)
class GPTNeoXConfig(FamilyConfig):
    """The numbers of a GPT-NeoX; names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str
    rope: Rope
    use_parallel_residual: bool
    attention_bias: bool
    initializer_range: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None

    # Rates of dropout, under their present and their first names.
    _UNUSED: ClassVar = ("hidden_dropout", "classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")

    @property
    def num_key_value_heads(self) -> int:
        """As many as heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        rope = rope_of(
            c, c.mapping("rope_parameters") or c.mapping("rope_scaling"), theta=c.raw("rotary_emb_base"),
            partial=c.raw("rotary_pct"),
        )  # fmt: skip
        if "rotary_pct" not in config and "partial_rotary_factor" not in c.mapping("rope_parameters"):
            raise c.missing("rotary_pct")
        for unused in cls._UNUSED:
            c.raw(unused)
        read = cls(
            vocab_size=c.int("vocab_size"),
            hidden_size=c.int("hidden_size"),
            intermediate_size=c.int("intermediate_size"),
            num_hidden_layers=c.int("num_hidden_layers"),
            num_attention_heads=c.int("num_attention_heads"),
            max_position_embeddings=c.int("max_position_embeddings"),
            layer_norm_eps=c.float("layer_norm_eps"),
            hidden_act=c.choice("hidden_act", ACTIVATIONS),
            rope=rope,
            use_parallel_residual=c.bool("use_parallel_residual", implied=True),
            attention_bias=c.bool("attention_bias", implied=True),
            initializer_range=c.float("initializer_range", implied=0.02),
            tie_word_embeddings=c.bool("tie_word_embeddings", implied=False),
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
        rope = {"partial_rotary_factor": 1.0, **rope_settings(self.rope)}
        return {
            "model_type": "gpt_neox", **plain, "rope_parameters": rope, "rotary_pct": self.rope.partial,
            "rotary_emb_base": self.rope.theta, "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }  # fmt: skip


class GPTNeoXBlock(nn.Module):
    """One layer. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: GPTNeoXConfig

    def linear(self, out: int, axes: tuple[str | None, str | None], name: str, hf: str, bias: bool = True) -> Linear:
        """A projection of this block."""
        return Linear(out, axes, f"gpt_neox.layers.{{}}.{hf}", bias, self.config.initializer_range, name=name)

    def norm(self, name: str, hf: str) -> LayerNorm:
        """A norm of this block."""
        return LayerNorm(self.config.layer_norm_eps, f"gpt_neox.layers.{{}}.{hf}", name=name)

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, layer: Any, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        D, N, H = c.hidden_size, c.num_attention_heads, c.head_dim
        hidden = ParamSpec((D,), ("embed",), "site")
        x = self.norm("ln1", "input_layernorm")(h)
        both = self.linear(3 * D, ("embed", None), "qkv", "attention.query_key_value", c.attention_bias)(x)
        q, k, v = jnp.split(both.reshape(*x.shape[:2], N, 3 * H), 3, axis=-1)
        inv_freq = jnp.asarray(c.rope.inv_freq(H))
        q, k = (rotate(y, seq.positions, inv_freq, scale=1.0) for y in (q, k))
        kv, cache = extend(cache, layer, k, v, seq)
        kv = site(self, "attn_kv", kv, seq, ParamSpec((N, H), ("kv", "head"), "site"), hidden=x)
        a = attend(q, kv, seq, scale=H**-0.5)
        a = self.linear(D, ("heads", "embed"), "o", "attention.dense", c.attention_bias)(a)
        a = site(self, "attn_out", a, seq, hidden, residual=h)
        middle = h + a
        x = self.norm("ln2", "post_attention_layernorm")(h if c.use_parallel_residual else middle)
        up = self.linear(c.intermediate_size, ("embed", "mlp"), "up", "mlp.dense_h_to_4h")(x)
        y = self.linear(D, ("mlp", "embed"), "down", "mlp.dense_4h_to_h")(ACTIVATIONS[c.hidden_act](up))
        h = middle + site(self, "mlp_out", y, seq, hidden, residual=h if c.use_parallel_residual else middle)
        return site(self, "residual", h, seq, hidden), cache


@register("family", "gpt_neox")
@dc.dataclass(frozen=True)
class GPTNeoX(Decoder):
    """GPT-NeoX and Pythia with one of their heads."""

    family: ClassVar[str] = "gpt_neox"
    Config: ClassVar[type[FamilyConfig]] = GPTNeoXConfig
    prefix: ClassVar[str] = "gpt_neox."
    embed_hf: ClassVar[str] = "gpt_neox.embed_in.weight"
    head_hf: ClassVar[str] = "embed_out.weight"
    token_hf: ClassVar[str] = "classifier"
    heads: ClassVar[dict[str, str]] = decoder_heads("GPTNeoX") | {"question_answering": "GPTNeoXForQuestionAnswering"}
    buffers: ClassVar[tuple[str, ...]] = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")

    @property
    def block(self) -> nn.Module:
        """One layer."""
        return GPTNeoXBlock(self.config)

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return LayerNorm(self.config.layer_norm_eps, "gpt_neox.final_layer_norm")
