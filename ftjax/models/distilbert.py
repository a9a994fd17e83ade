"""DistilBERT: half the layers of BERT, no segment types, other names (Sanh et al. 2019, arXiv:1910.01108).

The dropout of the base model is not applied while fine-tuning; its rates are kept for the file.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Self

from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.bert import Bert, Names
from ftjax.models.heads import EncoderHead
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS
from ftjax.registry import register


@dc.dataclass(frozen=True)
class DistilBertConfig(FamilyConfig):
    """The numbers of a DistilBERT, under the names that the rest of the encoders use."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    tie_word_embeddings: bool
    sinusoidal_pos_embds: bool
    pad_token_id: int | None
    rates: tuple[tuple[str, float], ...]

    type_vocab_size: ClassVar[int] = 0
    layer_norm_eps: ClassVar[float] = 1e-12
    """Fixed in the architecture: no file names it."""
    eos_token_id: ClassVar[tuple[int, ...]] = ()

    _NAMES: ClassVar = {
        "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads", "hidden_act": "activation",
    }  # fmt: skip
    _RATES: ClassVar = {"dropout": 0.1, "attention_dropout": 0.1, "qa_dropout": 0.1, "seq_classif_dropout": 0.2}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        read = cls(
            vocab_size=c.int("vocab_size"),
            hidden_size=c.int("dim"),
            intermediate_size=c.int("hidden_dim"),
            num_hidden_layers=c.int("n_layers"),
            num_attention_heads=c.int("n_heads"),
            hidden_act=c.choice("activation", ACTIVATIONS),
            max_position_embeddings=c.int("max_position_embeddings"),
            initializer_range=c.float("initializer_range", implied=0.02),
            tie_word_embeddings=c.bool("tie_word_embeddings", implied=c.bool("tie_weights_", implied=True)),
            sinusoidal_pos_embds=c.bool("sinusoidal_pos_embds", implied=False),
            pad_token_id=c.token("pad_token_id"),
            rates=tuple((name, c.float(name, implied=usual)) for name, usual in cls._RATES.items()),
        )
        for name in ("bos_token_id", "eos_token_id"):
            c.token(name)
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        fields = {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "rates"}
        return {"model_type": "distilbert", **{self._NAMES.get(k, k): v for k, v in fields.items()}, **dict(self.rates)}


@register("family", "distilbert")
@dc.dataclass(frozen=True)
class DistilBert(Bert):
    """DistilBERT with one of its heads."""

    family: ClassVar[str] = "distilbert"
    Config: ClassVar[type[FamilyConfig]] = DistilBertConfig
    prefix: ClassVar[str] = "distilbert."
    names: ClassVar[Names] = Names(
        layer="distilbert.transformer.layer.{}.", q="attention.q_lin", k="attention.k_lin", v="attention.v_lin",
        o="attention.out_lin", ln1="sa_layer_norm", up="ffn.lin1", down="ffn.lin2", ln2="output_layer_norm",
        embeddings="distilbert.embeddings.",
    )  # fmt: skip
    embed_hf: ClassVar[str] = "distilbert.embeddings.word_embeddings.weight"
    head_hf: ClassVar[str] = "vocab_projector.weight"
    heads: ClassVar[dict[str, str]] = {
        "masked_lm": "DistilBertForMaskedLM",
        "sequence_classification": "DistilBertForSequenceClassification",
        "token_classification": "DistilBertForTokenClassification",
        "question_answering": "DistilBertForQuestionAnswering",
    }
    buffers: ClassVar[tuple[str, ...]] = ("*.position_ids",)

    @property
    def head_module(self) -> nn.Module:
        """Hidden tokens; or labels of the first token, or of each."""
        c, kind, n = self.config, self.head.kind, len(self.head.labels)
        std = c.initializer_range
        if kind == "masked_lm":
            return EncoderHead(
                c.vocab_size, "vocab_projector", std, "vocab_projector.bias", dense_hf="vocab_transform",
                activation=c.hidden_act, norm_hf="vocab_layer_norm", eps=c.layer_norm_eps,
                tied=c.tie_word_embeddings, axis="vocab",
            )  # fmt: skip
        if kind == "sequence_classification":
            return EncoderHead(
                n, "classifier", std, "classifier.bias", first=True, dense_hf="pre_classifier", activation="relu"
            )
        hf = "qa_outputs" if kind == "question_answering" else "classifier"
        return EncoderHead(n, hf, std, hf + ".bias")

    def unused(self, name: str) -> bool:
        """Every tensor counts."""
        return False
