"""Trained shares that papers state, recomputed from the shapes of the models they used; nothing is allocated.

    python -m experiments.e004_methods.shares          # writes shares.md

"agrees" means: rounds to the published figure at the digits that it is given with, or lies within its stated bound.
"""

from __future__ import annotations

import dataclasses as dc
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers

from ftjax import tree
from ftjax.models.base import Numerics
from ftjax.models.hf import model_of
from ftjax.peft.adapter import Houlsby
from ftjax.peft.base import cut_for
from ftjax.peft.combined import Combine
from ftjax.peft.compacter import Compacter
from ftjax.peft.dora import DoRA
from ftjax.peft.ia3 import IA3
from ftjax.peft.lora import LoRA
from ftjax.peft.norms import Norms
from ftjax.peft.prefix import Prefix
from ftjax.peft.prompt import Prompt
from ftjax.peft.reft import LoReFT
from ftjax.peft.selective import BitFit
from ftjax.peft.vera import VeRA
from ftjax.train.state import partition

HERE = Path(__file__).resolve().parent
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
T5 = {"vocab_size": 32128, "d_kv": 64}
SHAPES: dict[str, Any] = {
    "BERT-base": lambda: transformers.BertConfig(**BASE),
    "BERT-large": lambda: transformers.BertConfig(**LARGE),
    "RoBERTa-base": lambda: transformers.RobertaConfig(**BASE, **ROBERTA),
    "RoBERTa-large": lambda: transformers.RobertaConfig(**LARGE, **ROBERTA),
    "GPT-2 medium": lambda: transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 large": lambda: transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "LLaMA-7B": lambda: transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008),
    "T5-base": lambda: transformers.T5Config(**T5, d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "T5 v1.1 XXL": lambda: transformers.T5Config(
        **T5,
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
}


@dc.dataclass(frozen=True)
class Claim:
    """A published figure.

    Attributes:
      paper: where it stands.
      model: one of `SHAPES`.
      method: of that paper.
      figure: as printed: a count with "M", a share with "%", a bound that begins with "<"; empty: none.
      encoder: whether the share is of the blocks alone, without embeddings.
    """

    paper: str
    model: str
    method: Any
    figure: str
    encoder: bool = False


LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
CLAIMS = (
    Claim("Houlsby 2019 (1902.00751), table 1, size 64, with norms", "BERT-large",
          Combine(methods=(Houlsby(reduction=16), Norms())), "2.1%", encoder=True),
    Claim("Houlsby 2019, size 8 (the smallest tried)", "BERT-large",
          Combine(methods=(Houlsby(reduction=128), Norms())), "", encoder=True),
    Claim("Houlsby 2019, size 256 (the largest tried)", "BERT-large",
          Combine(methods=(Houlsby(reduction=4), Norms())), "", encoder=True),
    Claim("BitFit (2106.10199), table 1", "BERT-large", BitFit(), "0.08%"),
    Claim("BitFit (2106.10199), table 2", "BERT-base", BitFit(), "0.09%"),
    Claim("LoRA (2106.09685), table 2, r 8 on q, v", "RoBERTa-base", LoRA(rank=8, targets=("query", "value")), "0.3M"),
    Claim("LoRA (2106.09685), table 2, r 8 on q, v", "RoBERTa-large", LoRA(rank=8, targets=("query", "value")), "0.8M"),
    Claim("LoRA (2106.09685), table 3, r 4, fused q, k, v", "GPT-2 medium", LoRA(rank=4, targets=("qkv",)), "0.35M"),
    Claim("LoRA (2106.09685), table 3, r 4, fused q, k, v", "GPT-2 large", LoRA(rank=4, targets=("qkv",)), "0.77M"),
    Claim("DoRA (2402.09353), table 1, LoRA r 32", "LLaMA-7B", LoRA(rank=32, targets=LLAMA_TARGETS), "0.83%"),
    Claim("DoRA (2402.09353), table 1, DoRA r 32", "LLaMA-7B", DoRA(rank=32, targets=LLAMA_TARGETS), "0.84%"),
    Claim("VeRA (2310.11454), table 2, r 1024", "RoBERTa-base", VeRA(rank=1024, targets=("query", "value")), "0.043M"),
    Claim("VeRA (2310.11454), table 2, r 256", "RoBERTa-large", VeRA(rank=256, targets=("query", "value")), "0.061M"),
    Claim("Prefix tuning (2101.00190), 10 positions", "GPT-2 medium", Prefix(tokens=10), "0.1%"),
    Claim("Prompt tuning (2104.08691), 100 tokens", "T5 v1.1 XXL", Prompt(tokens=100, start="random"), "<0.01%"),
    Claim("(IA)3 (2205.05638), on T0-11B", "T5 v1.1 XXL", IA3(targets=("k", "v"), inputs=("wo",)), "0.01%"),
    Claim("Compacter (2106.04647), table 1, with norms", "T5-base",
          Combine(methods=(Compacter(reduction=32), Norms())), "0.073%"),
    Claim("Compacter++ (2106.04647), table 1, with norms", "T5-base",
          Combine(methods=(Compacter(reduction=32, plus=True), Norms())), "0.047%"),
    Claim("ReFT (2404.03592), table 1, LoReFT r 8, f7+l7, tied", "LLaMA-7B",
          LoReFT(rank=8, positions="f7+l7", tied=True), "0.031%"),
)  # fmt: skip


def trained(claim: Claim) -> tuple[int, int]:
    """(trained numbers, numbers of the whole, what is added included) of a claim's model. An encoder stands without head."""
    model = model_of(SHAPES[claim.model]().to_dict(), Numerics())
    table = {k: s for k, s in model.table.items() if model.head.kind != "masked_lm" or not k.startswith("head/")}

    def split() -> Any:
        base = {k: jax.numpy.zeros(s.shape) for k, s in table.items() if s.kind != "site"}
        overlay = claim.method.init(jax.random.key(0), table, base)
        labels = claim.method.labels(table)
        return partition(cut_for(base, overlay, claim.method, table), overlay, table, labels).trainable

    made = jax.eval_shape(split)
    whole = [s for k, s in table.items() if s.kind != "site" and not (claim.encoder and "[" not in k)]
    return tree.count(made), sum(int(np.prod(s.shape)) for s in whole) + tree.count(made["overlay"])


def agrees(figure: str, own: int, whole: int) -> bool:
    """Whether a count or share is the published figure, at its digits."""
    bound = figure.startswith("<")
    published = Decimal(figure.strip("<%M"))
    value = Decimal(own) / 10**6 if figure.endswith("M") else 100 * Decimal(own) / whole
    return value < published if bound else value.quantize(published) == published


def main() -> None:
    lines = ["| paper | model | published | trained here | share % | agrees |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        own, whole = trained(claim)
        verdict = ("yes" if agrees(claim.figure, own, whole) else "no") if claim.figure else ""
        lines.append(
            f"| {claim.paper} | {claim.model} | {claim.figure} | {own:,} | {100 * own / whole:.4f} | {verdict} |"
        )
        print(lines[-1], flush=True)
    (HERE / "shares.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
