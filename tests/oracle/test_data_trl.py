"""Tokens, loss masks, prompts of preferences and packing against TRL's own preparation for SFT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.encode import encode
from ftjax.data.formats import type_rows
from ftjax.data.packing import plan_rows
from ftjax.data.rows import Row
from ftjax.data.templates import BUILTIN
from tests.test_data_helpers import tiny_tokenizer

pytestmark = pytest.mark.oracle

TEXTS = ["hello world", "the quick brown fox jumps", "ends already</s>", "x", "é 😀 mixed"]
PAIRS = [("what is two plus two? ", "four"), ("hel", "lo world"), ("q", "the lazy dog"), ("the quick", " brown fox")]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = [[turn("system", "Be kind."), turn("user", "hi"), turn("assistant", "hello")],
         [turn("user", "one"), turn("assistant", "two"), turn("user", "three"), turn("assistant", "four")]]  # fmt: skip
CASES: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any]]] = {
    "text": ([{"text": t} for t in TEXTS], "auto", {}),
    "prompt_completion": ([{"prompt": p, "completion": c} for p, c in PAIRS], "auto", {}),
    "pairs_all": ([{"prompt": p, "completion": c} for p, c in PAIRS], "all", {"completion_only_loss": False}),
    "messages_assistant": ([{"messages": c} for c in CHATS], "assistant", {"assistant_only_loss": True}),
    "messages_all": ([{"messages": c} for c in CHATS], "all", {}),
    "chat_completion": ([{"prompt": c[:-1], "completion": c[-1:]} for c in CHATS], "completion", {}),
    "chat_assistant": ([{"prompt": c[:-1], "completion": c[-1:]} for c in CHATS], "assistant",
                       {"assistant_only_loss": True, "completion_only_loss": False}),
}  # fmt: skip


def trl_columns(
    rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int, tmp_path: Any, **options: Any
) -> list[dict]:
    """What SFTTrainer would train on: `input_ids` and `labels` of each row."""
    pytest.importorskip("trl")
    torch = pytest.importorskip("torch")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    args = SFTConfig(output_dir=str(tmp_path), max_length=max_length, report_to=[], use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return list(trainer.train_dataset)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_labels_agree_with_sft(case: str, bos: bool, short: bool, tmp_path: Any) -> None:
    rows, loss_on, options = CASES[case]
    chats = "messages" in rows[0] or isinstance(rows[0].get("prompt"), list)
    max_length = (48 if chats else 12) if short else 200  # short: some examples are cut, some lose all their targets
    template = BUILTIN["alpaca"]
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    want = trl_columns(rows, tokenizer, max_length=max_length, tmp_path=tmp_path, **options)
    typed = type_rows([Row(r) for r in rows])
    got = encode(typed, tokenizer, Loader(max_length=max_length, loss_on=loss_on), template=template)  # type: ignore[arg-type]
    # TRL keeps a row whose only label is its first token, which is never predicted; we leave it out and count it
    want = [w for w in want if any(label != -100 for label in w["labels"][1:])]
    assert len(want) == len(got.examples)
    for ours, theirs in zip(got.examples, want, strict=True):
        np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
        np.testing.assert_array_equal(ours.weights[1:] > 0, np.array(theirs["labels"][1:]) != -100)


def test_preference_prompts_agree_with_trl() -> None:
    trl = pytest.importorskip("trl")
    rows = [
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        {"chosen": "abc", "rejected": "abd"},
        {"chosen": CHATS[0], "rejected": [*CHATS[0][:2], turn("assistant", "no")]},
    ]
    for row in rows:
        assert type_rows([Row(row)]).rows[0] == trl.extract_prompt(row)


def test_as_many_rows_as_trl_packs() -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import pack_dataset

    rng = np.random.default_rng(0)
    for capacity in (16, 64, 100):
        lengths = rng.integers(1, capacity + 1, 300)
        data = Dataset.from_dict({"input_ids": [[1] * int(n) for n in lengths]})
        packed = pack_dataset(data, seq_length=capacity, strategy="bfd")
        assert plan_rows(lengths, capacity).rows == len(packed)


def test_sharegpt_agrees_with_trl() -> None:
    trl_utils = pytest.importorskip("trl.data_utils")
    row = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    ours = type_rows([Row(row)]).rows[0]
    assert ours == trl_utils.maybe_convert_to_chatml({"conversations": [dict(t) for t in row["conversations"]]})
