"""GPT-2: learned positions, LayerNorm before each part, one matrix for queries, keys and values (Radford et al. 2019).

h = h + Wo attention(Wqkv x), x = norm(h);   h = h + W2 act(W1 x), x = norm(h)

Its matrices stand as [in, out] in the file, as they do here. The dropout of the base model is not applied while
fine-tuning; its rates are kept for the file.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS, Cache, LayerNorm, Linear, Seq, attend, extend
from ftjax.models.transformer import Decoder, Embedding, decoder_heads
from ftjax.params import ParamSpec, site
from ftjax.registry import register


@dc.dataclass(frozen=True)
class GPT2Config(FamilyConfig):
    """The numbers of a GPT-2, under the names that the other decoders use."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    activation: str
    initializer_range: float
    tie_word_embeddings: bool
    scale_by_head: bool
    scale_by_layer: bool
    rates: tuple[tuple[str, float], ...]
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None

    _RATES: ClassVar = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    # How the double-heads model summarises a text, which no head here does.
    _UNUSED: ClassVar = (
        "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout", "reorder_and_upcast_attn", "attn_pdrop",
    )  # fmt: skip

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
        c.require("add_cross_attention", False, absent_ok=True)
        width = c.int("n_embd")
        read = cls(
            vocab_size=c.int("vocab_size"),
            hidden_size=width,
            intermediate_size=c.int("n_inner", implied=4 * width),
            num_hidden_layers=c.int("n_layer"),
            num_attention_heads=c.int("n_head"),
            max_position_embeddings=c.int("n_positions"),
            layer_norm_eps=c.float("layer_norm_epsilon"),
            activation=c.choice("activation_function", ACTIVATIONS),
            initializer_range=c.float("initializer_range", implied=0.02),
            tie_word_embeddings=c.bool("tie_word_embeddings", implied=True),
            scale_by_head=c.bool("scale_attn_weights", implied=True),
            scale_by_layer=c.bool("scale_attn_by_inverse_layer_idx", implied=False),
            rates=tuple((name, c.float(name, implied=0.1)) for name in cls._RATES),
            bos_token_id=c.token("bos_token_id"),
            eos_token_id=c.tokens("eos_token_id"),
            pad_token_id=c.token("pad_token_id"),
        )
        for name in cls._UNUSED:
            c.raw(name)
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        eos = list(self.eos_token_id)
        return {
            "model_type": "gpt2", "vocab_size": self.vocab_size, "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size, "n_layer": self.num_hidden_layers, "n_head": self.num_attention_heads,
            "n_positions": self.max_position_embeddings, "layer_norm_epsilon": self.layer_norm_eps,
            "activation_function": self.activation, "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_word_embeddings, "scale_attn_weights": self.scale_by_head,
            "scale_attn_by_inverse_layer_idx": self.scale_by_layer, **dict(self.rates),
            "bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }  # fmt: skip


class GPT2Entrance(nn.Module):
    """Tokens and positions, added; NaN where no position was learned, which makes the whole row so."""

    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], seq: Seq) -> jax.Array:
        c, D, std = self.config, self.config.hidden_size, self.config.initializer_range
        tokens = Embedding(c.vocab_size, D, "transformer.wte.weight", std, self.dtype, name="embed")
        places = Embedding(
            c.max_position_embeddings, D, "transformer.wpe.weight", std, self.dtype, (None, "embed"), bounded=True,
            name="positions",
        )  # fmt: skip
        return tokens(inputs["input_ids"]) + places(seq.positions)


class GPT2Block(nn.Module):
    """One layer. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: GPT2Config

    def linear(self, out: int, axes: tuple[str | None, str | None], name: str, hf: str) -> Linear:
        """A projection of this block, [in, out] in the file."""
        std = self.config.initializer_range
        return Linear(out, axes, f"transformer.h.{{}}.{hf}", True, std, transposed=False, name=name)

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, layer: Any, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        D, N, H = c.hidden_size, c.num_attention_heads, c.head_dim
        hidden = ParamSpec((D,), ("embed",), "site")
        x = LayerNorm(c.layer_norm_eps, "transformer.h.{}.ln_1", name="ln1")(h)
        both = self.linear(3 * D, ("embed", None), "qkv", "attn.c_attn")(x)
        q, k, v = (y.reshape(*x.shape[:2], N, H) for y in jnp.split(both, 3, axis=-1))
        kv, cache = extend(cache, layer, k, v, seq)
        kv = site(self, "attn_kv", kv, seq, ParamSpec((N, H), ("kv", "head"), "site"), hidden=x)
        scale = H**-0.5 if c.scale_by_head else 1.0
        a = attend(q, kv, seq, scale=scale / (jnp.asarray(layer, jnp.float32) + 1) if c.scale_by_layer else scale)
        a = self.linear(D, ("heads", "embed"), "o", "attn.c_proj")(a)
        h = h + site(self, "attn_out", a, seq, hidden, residual=h)
        x = LayerNorm(c.layer_norm_eps, "transformer.h.{}.ln_2", name="ln2")(h)
        y = ACTIVATIONS[c.activation](self.linear(c.intermediate_size, ("embed", "mlp"), "up", "mlp.c_fc")(x))
        y = self.linear(D, ("mlp", "embed"), "down", "mlp.c_proj")(y)
        h = h + site(self, "mlp_out", y, seq, hidden, residual=h)
        return site(self, "residual", h, seq, hidden), cache


@register("family", "gpt2")
@dc.dataclass(frozen=True)
class GPT2(Decoder):
    """GPT-2 with one of its heads."""

    family: ClassVar[str] = "gpt2"
    Config: ClassVar[type[FamilyConfig]] = GPT2Config
    prefix: ClassVar[str] = "transformer."
    embed_hf: ClassVar[str] = "transformer.wte.weight"
    token_hf: ClassVar[str] = "classifier"
    heads: ClassVar[dict[str, str]] = (
        {"causal_lm": "GPT2LMHeadModel"}
        | {k: v for k, v in decoder_heads("GPT2").items() if k != "causal_lm"}
        | {"question_answering": "GPT2ForQuestionAnswering"}
    )
    buffers: ClassVar[tuple[str, ...]] = ("*.attn.bias", "*.attn.masked_bias")

    @property
    def entrance(self) -> nn.Module:
        """Tokens and positions."""
        return GPT2Entrance(self.config, self.dtype)

    @property
    def block(self) -> nn.Module:
        """One layer."""
        return GPT2Block(self.config)

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return LayerNorm(self.config.layer_norm_eps, "transformer.ln_f")
