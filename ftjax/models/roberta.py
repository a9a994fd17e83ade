"""RoBERTa: BERT's network, positions that count from the padding id, heads of its own (Liu et al. 2019, arXiv:1907.11692).

The dropout of the base model is not applied while fine-tuning; its rates are kept for the file.
"""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.models.base import FamilyConfig
from ftjax.models.bert import Bert, BertConfig, BertEntrance, Names
from ftjax.models.heads import EncoderHead
from ftjax.registry import register


@dc.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The numbers of a RoBERTa; the padding id decides its positions."""

    model_type: ClassVar[str] = "roberta"


@register("family", "roberta")
@dc.dataclass(frozen=True)
class Roberta(Bert):
    """RoBERTa with one of its heads."""

    family: ClassVar[str] = "roberta"
    Config: ClassVar[type[FamilyConfig]] = RobertaConfig
    prefix: ClassVar[str] = "roberta."
    names: ClassVar[Names] = Names(layer="roberta.encoder.layer.{}.", embeddings="roberta.embeddings.")
    embed_hf: ClassVar[str] = "roberta.embeddings.word_embeddings.weight"
    head_hf: ClassVar[str] = "lm_head.decoder.weight"
    heads: ClassVar[dict[str, str]] = {
        "masked_lm": "RobertaForMaskedLM",
        "sequence_classification": "RobertaForSequenceClassification",
        "token_classification": "RobertaForTokenClassification",
        "question_answering": "RobertaForQuestionAnswering",
    }
    buffers: ClassVar[tuple[str, ...]] = ("*.position_ids", "*.token_type_ids")

    @property
    def padding(self) -> int:
        """Row of the position table that padding gets; the first token's is the next."""
        return 1 if self.config.pad_token_id is None else self.config.pad_token_id

    @property
    def places(self) -> int:
        """The rows behind the padding's."""
        return self.config.max_position_embeddings - self.padding - 1

    @property
    def entrance(self) -> nn.Module:
        """Words, positions from padding + 1 on, types."""
        return BertEntrance(self.config, self.names, self.dtype, self.padding + 1)

    def positions(self, inputs: dict[str, jax.Array]) -> jax.Array:
        """Tokens other than the padding token, counted from 0; padding gets -1, which is its own row of the table."""
        real = (inputs["input_ids"] != self.padding).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real - 1

    @property
    def head_module(self) -> nn.Module:
        """Hidden tokens; or labels of the first token, or of each."""
        c, kind, n = self.config, self.head.kind, len(self.head.labels)
        std = c.initializer_range
        if kind == "masked_lm":
            bias = "lm_head.bias" if c.tie_word_embeddings else "lm_head.decoder.bias"
            return EncoderHead(
                c.vocab_size, "lm_head.decoder", std, bias, dense_hf="lm_head.dense", activation="gelu",
                norm_hf="lm_head.layer_norm", eps=c.layer_norm_eps, tied=c.tie_word_embeddings, axis="vocab",
            )  # fmt: skip
        if kind == "sequence_classification":
            hf = "classifier.out_proj"
            return EncoderHead(n, hf, std, hf + ".bias", first=True, dense_hf="classifier.dense")
        hf = "qa_outputs" if kind == "question_answering" else "classifier"
        return EncoderHead(n, hf, std, hf + ".bias")

    def unused(self, name: str) -> bool:
        """The second copy of the MLM bias, of which only one is used."""
        return name == ("lm_head.decoder.bias" if self.config.tie_word_embeddings else "lm_head.bias")
