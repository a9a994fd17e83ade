"""BERT: a bidirectional encoder with a norm after each part (Devlin et al. 2018, arXiv:1810.04805).

h = norm(h + Wo attention(Wq h, Wk h, Wv h));   h = norm(h + W2 act(W1 h))

The dropout of the base model is not applied while fine-tuning; its rates are kept for the file.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.heads import EncoderHead
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS, KV, LayerNorm, Linear, Seq, attend
from ftjax.models.transformer import Embedding, Encoder
from ftjax.params import ParamSpec, site
from ftjax.registry import register


@dc.dataclass(frozen=True)
class BertConfig(FamilyConfig):
    """The numbers of a BERT; names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    classifier_dropout: float | None

    model_type: ClassVar[str] = "bert"

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        c.require("position_embedding_type", "absolute", absent_ok=True)
        c.require("is_decoder", False, absent_ok=True)
        c.require("add_cross_attention", False, absent_ok=True)
        read = cls(
            vocab_size=c.int("vocab_size"),
            hidden_size=c.int("hidden_size"),
            intermediate_size=c.int("intermediate_size"),
            num_hidden_layers=c.int("num_hidden_layers"),
            num_attention_heads=c.int("num_attention_heads"),
            hidden_act=c.choice("hidden_act", ACTIVATIONS),
            max_position_embeddings=c.int("max_position_embeddings"),
            type_vocab_size=c.int("type_vocab_size"),
            layer_norm_eps=c.float("layer_norm_eps"),
            initializer_range=c.float("initializer_range", implied=0.02),
            tie_word_embeddings=c.bool("tie_word_embeddings", implied=True),
            pad_token_id=c.token("pad_token_id"),
            bos_token_id=c.token("bos_token_id"),
            eos_token_id=c.tokens("eos_token_id"),
            hidden_dropout_prob=c.float("hidden_dropout_prob", implied=0.1),
            attention_probs_dropout_prob=c.float("attention_probs_dropout_prob", implied=0.1),
            classifier_dropout=c.raw("classifier_dropout"),
        )
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        plain = {f.name: getattr(self, f.name) for f in dc.fields(self)}
        eos = list(self.eos_token_id)
        return {"model_type": self.model_type, **plain, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}


@dc.dataclass(frozen=True)
class Names:
    """Names of a layer's modules in the file, below `layer`; those of the embeddings, below `embeddings`."""

    layer: str = "bert.encoder.layer.{}."
    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    o: str = "attention.output.dense"
    ln1: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    ln2: str = "output.LayerNorm"
    embeddings: str = "bert.embeddings."


class BertEntrance(nn.Module):
    """Words, positions and (where there are any) segment types, added and normed. `offset` is added to positions.

    Where no position was learned the text becomes NaN.
    """

    config: Any
    names: Names
    dtype: Any
    offset: int = 0

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], seq: Seq) -> jax.Array:
        c, at, std = self.config, self.names.embeddings, self.config.initializer_range
        D, dtype = c.hidden_size, self.dtype
        h = Embedding(c.vocab_size, D, at + "word_embeddings.weight", std, dtype, name="embed")(inputs["input_ids"])
        places = Embedding(
            c.max_position_embeddings,
            D,
            at + "position_embeddings.weight",
            std,
            dtype,
            (None, "embed"),
            bounded=True,
            name="positions",
        )
        h = h + places(seq.positions + self.offset)
        if c.type_vocab_size:
            types = inputs.get("token_type_ids")
            types = jnp.zeros_like(inputs["input_ids"]) if types is None else types
            rows, hf = c.type_vocab_size, at + "token_type_embeddings.weight"
            h = h + Embedding(rows, D, hf, std, dtype, (None, "embed"), name="types")(types)
        return LayerNorm(c.layer_norm_eps, at + "LayerNorm", name="embed_norm")(h)


class PostNormBlock(nn.Module):
    """One layer. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: Any
    names: Names

    def linear(self, out: int, axes: tuple[str, str], name: str) -> Linear:
        """A projection of this block."""
        hf = self.names.layer + getattr(self.names, name)
        return Linear(out, axes, hf, True, self.config.initializer_range, name=name)

    def norm(self, name: str) -> LayerNorm:
        """A norm of this block."""
        return LayerNorm(self.config.layer_norm_eps, self.names.layer + getattr(self.names, name), name=name)

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq, layer: Any, cache: None) -> tuple[jax.Array, None]:
        c = self.config
        D, N = c.hidden_size, c.num_attention_heads
        hidden = ParamSpec((D,), ("embed",), "site")
        q, k, v = (
            self.linear(D, ("embed", axis), name)(h).reshape(*h.shape[:2], N, D // N)
            for name, axis in (("q", "heads"), ("k", "kv"), ("v", "kv"))
        )
        kv = KV(k, v, seq.positions, seq.segments)
        kv = site(self, "attn_kv", kv, seq, ParamSpec((N, D // N), ("kv", "head"), "site"), hidden=h)
        a = attend(q, kv, seq, scale=(D // N) ** -0.5, causal=False)
        ln1, ln2 = self.norm("ln1"), self.norm("ln2")
        a = site(self, "attn_out", self.linear(D, ("heads", "embed"), "o")(a), seq, hidden, residual=h, norm=ln1)
        h = ln1(h + a)
        y = ACTIVATIONS[c.hidden_act](self.linear(c.intermediate_size, ("embed", "mlp"), "up")(h))
        y = site(self, "mlp_out", self.linear(D, ("mlp", "embed"), "down")(y), seq, hidden, residual=h, norm=ln2)
        return site(self, "residual", ln2(h + y), seq, hidden), None


@register("family", "bert")
@dc.dataclass(frozen=True)
class Bert(Encoder):
    """BERT with one of its heads."""

    family: ClassVar[str] = "bert"
    Config: ClassVar[type[FamilyConfig]] = BertConfig
    prefix: ClassVar[str] = "bert."
    names: ClassVar[Names] = Names()
    embed_hf: ClassVar[str] = "bert.embeddings.word_embeddings.weight"
    head_hf: ClassVar[str] = "cls.predictions.decoder.weight"
    heads: ClassVar[dict[str, str]] = {
        "masked_lm": "BertForMaskedLM",
        "sequence_classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
    }
    buffers: ClassVar[tuple[str, ...]] = ("*.position_ids", "*.token_type_ids", "cls.seq_relationship.*")

    @property
    def entrance(self) -> nn.Module:
        """Words, positions, types."""
        return BertEntrance(self.config, self.names, self.dtype)

    @property
    def block(self) -> nn.Module:
        """One layer."""
        return PostNormBlock(self.config, self.names)

    @property
    def head_module(self) -> nn.Module:
        """Hidden tokens; or labels of the pooled text, or of each token."""
        c, kind, n = self.config, self.head.kind, len(self.head.labels)
        if kind == "masked_lm":
            at = "cls.predictions."
            return EncoderHead(
                c.vocab_size, at + "decoder", c.initializer_range,
                at + ("bias" if c.tie_word_embeddings else "decoder.bias"), dense_hf=at + "transform.dense",
                activation=c.hidden_act, norm_hf=at + "transform.LayerNorm", eps=c.layer_norm_eps,
                tied=c.tie_word_embeddings, axis="vocab",
            )  # fmt: skip
        hf = "qa_outputs" if kind == "question_answering" else "classifier"
        pooled = kind == "sequence_classification"
        return EncoderHead(
            n, hf, c.initializer_range, hf + ".bias", first=pooled, pooler_hf="bert.pooler.dense" if pooled else ""
        )

    def unused(self, name: str) -> bool:
        """The second copy of the MLM bias, of which only one is used."""
        copy = "decoder.bias" if self.config.tie_word_embeddings else "bias"
        return name == f"cls.predictions.{copy}"

    def canonical(self, name: str) -> str:
        """Very old checkpoints call a norm's weight gamma and its bias beta."""
        if name.endswith("LayerNorm.gamma"):
            return name.removesuffix("gamma") + "weight"
        return name.removesuffix("beta") + "bias" if name.endswith("LayerNorm.beta") else name
