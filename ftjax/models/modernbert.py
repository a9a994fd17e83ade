"""ModernBERT: an encoder with norms before each part, rotary positions, gated parts and windows (arXiv:2412.13663).

h = h + Wo attention(rope(q), rope(k), v), q k v = Wqkv norm(h);   h = h + Wo (act(a) * b), a b = Wi norm(h)

Most layers see `local_attention` / 2 tokens to either side and have a rotary base of their own; the first layer lacks the
norm before its attention. The dropout of the base model is not applied while fine-tuning; its rates are kept for the file.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.heads import EncoderHead
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS, KV, LayerNorm, Linear, Seq, attend, rotate
from ftjax.models.rope import Rope, rope_of, rope_settings
from ftjax.models.transformer import Embedding, Encoder
from ftjax.models.windows import FULL, SLIDING, layer_types
from ftjax.params import ParamSpec, site
from ftjax.registry import register

_EVERYWHERE = np.iinfo(np.int32).max // 2  # a window that nobody sees the end of
_RATES = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")


def _types(layers: int, period: int) -> tuple[str, ...]:
    """A layer that sees everything, then `period` - 1 with a window, and so on."""
    return tuple(SLIDING if i % period else FULL for i in range(layers))


@dc.dataclass(frozen=True)
class ModernBertConfig(FamilyConfig):
    """The numbers of a ModernBERT; names as in `config.json`. `rope` is that of the layers that see everything."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_activation: str
    max_position_embeddings: int
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    decoder_bias: bool
    classifier_bias: bool
    classifier_activation: str
    classifier_pooling: str
    layer_types: tuple[str, ...]
    local_attention: int
    rope: Rope
    local_rope: Rope
    initializer_range: float
    tie_word_embeddings: bool
    rates: tuple[tuple[str, float], ...]
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    cls_token_id: int | None
    sep_token_id: int | None

    model_type: ClassVar[str] = "modernbert"
    _INTEGERS: ClassVar[tuple[str, ...]] = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "local_attention",
    )  # fmt: skip
    _BOOLEANS: ClassVar[dict[str, bool]] = {
        "norm_bias": False, "attention_bias": False, "mlp_bias": False, "classifier_bias": False, "decoder_bias": True,
        "tie_word_embeddings": True,
    }  # fmt: skip
    _UNUSED: ClassVar[tuple[str, ...]] = (
        "layer_norm_eps", "position_embedding_type", "initializer_cutoff_factor", "deterministic_flash_attn",
        "reference_compile", "repad_logits_with_grad", "sparse_prediction", "sparse_pred_ignore_index",
    )  # fmt: skip
    """Numbers that files have and the architecture does not use."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`, old (``global_rope_theta``) or new; what decides the function must be there."""
        c = HFConfig(config)
        for name in cls._UNUSED:
            c.raw(name)
        plain: dict[str, Any] = {name: c.int(name) for name in cls._INTEGERS}
        plain |= {name: c.bool(name, implied=usual) for name, usual in cls._BOOLEANS.items()}
        plain |= {name: c.choice(name, ACTIVATIONS) for name in ("hidden_activation", "classifier_activation")}
        plain |= {name: c.token(name) for name in ("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id")}
        usual = _types(plain["num_hidden_layers"], c.int("global_attn_every_n_layers", implied=3))
        read = cls(
            **plain,
            eos_token_id=c.tokens("eos_token_id"),
            norm_eps=c.float("norm_eps"),
            classifier_pooling=c.choice("classifier_pooling", ("cls", "mean")),
            layer_types=layer_types(c, usual),
            rope=cls._rope(c, FULL, "global_rope_theta"),
            local_rope=cls._rope(c, SLIDING, "local_rope_theta"),
            initializer_range=c.float("initializer_range", implied=0.02),
            rates=tuple((name, c.float(name, implied=0.0)) for name in _RATES),
        )
        c.finish()
        return read

    @staticmethod
    def _rope(c: HFConfig, kind: str, old: str) -> Rope:
        """The rotary settings of one kind of layer; `old` names its base where the file has no `rope_parameters`."""
        given = {**(c.mapping("rope_parameters").get(kind) or {}), **c.mapping("rope_scaling")}
        rope = rope_of(c, given, theta=c.raw(old))
        if rope.partial != 1.0:
            raise c.wrong("rope_parameters.partial_rotary_factor", rope.partial, "no such setting in this family")
        return rope

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens, with the names of older versions where these can say it."""
        plain = {f.name: getattr(self, f.name) for f in dc.fields(self)}
        rope, local, rates = plain.pop("rope"), plain.pop("local_rope"), plain.pop("rates")
        eos, n = list(self.eos_token_id), self.num_hidden_layers
        period = next((p for p in range(1, n + 1) if _types(n, p) == self.layer_types), None)
        return {
            "model_type": self.model_type,
            **plain,
            **dict(rates),
            "layer_types": list(self.layer_types),
            "rope_parameters": {FULL: rope_settings(rope), SLIDING: rope_settings(local)},
            "global_rope_theta": rope.theta,
            "local_rope_theta": local.theta,
            **({} if period is None else {"global_attn_every_n_layers": period}),
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        }


class ModernBertEntrance(nn.Module):
    """Tokens embedded and normed."""

    config: ModernBertConfig
    dtype: Any

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], seq: Seq) -> jax.Array:
        c, at = self.config, "model.embeddings."
        rows, hf = c.vocab_size, at + "tok_embeddings.weight"
        h = Embedding(rows, c.hidden_size, hf, c.initializer_range, self.dtype, name="embed")(inputs["input_ids"])
        return LayerNorm(c.norm_eps, at + "norm", c.norm_bias, name="embed_norm")(h)


class ModernBertBlock(nn.Module):
    """One layer. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: ModernBertConfig

    def linear(self, out: int, axes: tuple[str | None, str | None], name: str, hf: str, *, bias: bool) -> Linear:
        """A projection of this block."""
        return Linear(out, axes, f"model.layers.{{}}.{hf}", bias, self.config.initializer_range, name=name)

    def norm(self, name: str, hf: str, since: int = 0) -> LayerNorm:
        """A norm of this block."""
        c = self.config
        return LayerNorm(c.norm_eps, f"model.layers.{{}}.{hf}", c.norm_bias, since, name=name)

    def reach(self, layer: Any) -> tuple[Any, jax.Array]:
        """(window of this layer or None, its inverse rotary frequencies); `layer` may be traced."""
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        local = jnp.asarray([kind == SLIDING for kind in c.layer_types])[layer]
        inv_freq = jnp.where(
            local, jnp.asarray(c.local_rope.inv_freq(head_dim)), jnp.asarray(c.rope.inv_freq(head_dim))
        )
        # Half of `local_attention` to either side, the last of them included.
        window = jnp.where(local, jnp.int32(c.local_attention // 2 + 1), jnp.int32(_EVERYWHERE))
        return (window if SLIDING in c.layer_types else None), inv_freq

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, layer: Any, cache: None) -> tuple[jax.Array, None]:
        c = self.config
        D, N = c.hidden_size, c.num_attention_heads
        H = D // N
        hidden = ParamSpec((D,), ("embed",), "site")
        x = jnp.where(jnp.asarray(layer) == 0, h, self.norm("ln1", "attn_norm", since=1)(h))
        both = self.linear(3 * D, ("embed", None), "qkv", "attn.Wqkv", bias=c.attention_bias)(x)
        q, k, v = (y.reshape(*h.shape[:2], N, H) for y in jnp.split(both, 3, axis=-1))
        window, inv_freq = self.reach(layer)
        q, k = (rotate(y, seq.positions, inv_freq, scale=1.0) for y in (q, k))
        kv = KV(k, v, seq.positions, seq.segments)
        kv = site(self, "attn_kv", kv, seq, ParamSpec((N, H), ("kv", "head"), "site"), hidden=x)
        a = attend(q, kv, seq, scale=H**-0.5, causal=False, window=window)
        a = self.linear(D, ("heads", "embed"), "o", "attn.Wo", bias=c.attention_bias)(a)
        h = h + site(self, "attn_out", a, seq, hidden, residual=h)
        x = self.norm("ln2", "mlp_norm")(h)
        both = self.linear(2 * c.intermediate_size, ("embed", None), "gate_up", "mlp.Wi", bias=c.mlp_bias)(x)
        gate, up = jnp.split(both, 2, axis=-1)
        y = ACTIVATIONS[c.hidden_activation](gate) * up
        y = self.linear(D, ("mlp", "embed"), "down", "mlp.Wo", bias=c.mlp_bias)(y)
        h = h + site(self, "mlp_out", y, seq, hidden, residual=h)
        return site(self, "residual", h, seq, hidden), None


@register("family", "modernbert")
@dc.dataclass(frozen=True)
class ModernBert(Encoder):
    """ModernBERT with one of its heads."""

    family: ClassVar[str] = "modernbert"
    Config: ClassVar[type[FamilyConfig]] = ModernBertConfig
    prefix: ClassVar[str] = "model."
    embed_hf: ClassVar[str] = "model.embeddings.tok_embeddings.weight"
    head_hf: ClassVar[str] = "decoder.weight"
    shared_head: ClassVar[tuple[str, ...]] = ("head.*",)
    heads: ClassVar[dict[str, str]] = {
        "masked_lm": "ModernBertForMaskedLM",
        "sequence_classification": "ModernBertForSequenceClassification",
        "token_classification": "ModernBertForTokenClassification",
        "question_answering": "ModernBertForQuestionAnswering",
    }

    @property
    def entrance(self) -> nn.Module:
        """Tokens."""
        return ModernBertEntrance(self.config, self.dtype)

    @property
    def block(self) -> nn.Module:
        """One layer."""
        return ModernBertBlock(self.config)

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return LayerNorm(self.config.norm_eps, "model.final_norm", self.config.norm_bias)

    @property
    def head_module(self) -> nn.Module:
        """A dense layer and a norm under all; hidden tokens, or labels of the pooled text or of each token."""
        c, words = self.config, self.head.kind == "masked_lm"
        pooling = c.classifier_pooling if self.head.kind == "sequence_classification" else ""
        hf = "decoder" if words else "classifier"
        return EncoderHead(
            c.vocab_size if words else len(self.head.labels), hf, c.initializer_range if words else c.hidden_size**-0.5,
            hf + ".bias" if c.decoder_bias or not words else "", first=pooling == "cls", mean=pooling == "mean",
            dense_hf="head.dense", activation=c.classifier_activation, dense_bias=c.classifier_bias,
            norm_hf="head.norm", eps=c.norm_eps, norm_bias=c.norm_bias, tied=words and c.tie_word_embeddings,
            axis="vocab" if words else None,
        )  # fmt: skip
