"""Answers in judged steps: where the labels stand, what is refused, metrics by hand, a Llama through the command line."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from ftjax.config import Loader
from ftjax.data.formats import type_rows
from ftjax.data.rows import BadRows, Row
from ftjax.data.steps import encode_steps
from ftjax.data.tags import IGNORED
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import DataError
from ftjax.models.sources import embedded_folder
from ftjax.objectives.process_reward import ProcessReward
from ftjax.verbs import main

ROWS = [
    Row({"prompt": "def add(a, b):", "completions": ["take a", "add b to it"], "labels": [True, False]}, "x:1"),
    Row({"prompt": "import", "completions": ["os"], "labels": [True]}, "x:2"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_folder())


def encoded(tokenizer, rows, objective=None, like=None, bad=None, **loader):
    options = (objective or ProcessReward()).data_options()
    return encode_steps(type_rows(rows, bad=bad), tokenizer, Loader(**loader), **options, like=like, bad=bad)


def shown(tokenizer, examples, i):
    """Each labelled beginning of a text with its label."""
    part = slice(examples.offsets[i], examples.offsets[i + 1])
    ids, tags = examples.input_ids[part], examples.tags[part]
    return [(tokenizer.decode(ids[: t + 1].tolist()), int(tags[t])) for t in np.flatnonzero(tags != IGNORED)]


def test_a_label_stands_at_the_end_of_each_step(tokenizer):
    made = encoded(tokenizer, ROWS)
    first = "<s>def add(a, b):take a\n"
    assert shown(tokenizer, made.examples, 0) == [(first, 1), (first + "add b to it\n", 0)]
    assert shown(tokenizer, made.examples, 1) == [("<s>importos\n", 1)]
    assert made.report.trained_tokens == 3 and made.examples.names == ("wrong", "right")
    other = encoded(tokenizer, ROWS, ProcessReward(step_separator=" ;")).examples
    assert shown(tokenizer, other, 1) == [("<s>importos ;", 1)]


def test_the_last_step_only_while_training(tokenizer):
    objective = ProcessReward(last_step_only=True)
    train = encoded(tokenizer, ROWS, objective).examples
    assert [len(shown(tokenizer, train, i)) for i in range(2)] == [1, 1] and shown(tokenizer, train, 0)[0][1] == 0
    held_out = encoded(tokenizer, ROWS, objective, like=train).examples
    assert len(shown(tokenizer, held_out, 0)) == 2


def test_too_long(tokenizer):
    n = len(tokenizer("def add(a, b):")["input_ids"])
    cut = encoded(tokenizer, ROWS, max_length=n + 4, truncation="right")
    assert shown(tokenizer, cut.examples, 0) == [("<s>def add(a, b):take a\n", 1)] and cut.report.truncated == 1
    none = encoded(tokenizer, ROWS, max_length=n, truncation="right").report  # the prompt alone: no label is left
    assert (none.examples, none.zero_trained) == (1, 1)
    assert encoded(tokenizer, ROWS, max_length=n, truncation="drop").report.dropped == 1
    with pytest.raises(DataError, match=f"1 of 2 texts are longer than loader.max_length={n}: x:1"):
        encoded(tokenizer, ROWS, max_length=n, truncation="error")


@pytest.mark.parametrize(
    "row, text",
    [
        ({"completions": ["b"], "labels": [True, False]}, "x:3: 1 completions, but 2 labels"),
        ({"completions": ["b"], "labels": [2]}, r"x:3: field 'labels' expected a list of true and false, got \[2\]"),
        ({"completions": ["b", ""], "labels": [True, False]}, "x:3: step 1 of 'completions' is empty"),
        ({"completions": [], "labels": []}, "x:3: field 'completions' is empty"),
    ],
)
def test_bad_rows(tokenizer, row, text):
    rows = [*ROWS, Row({"prompt": "a", **row}, "x:3")]
    with pytest.raises(DataError, match=text):
        encoded(tokenizer, rows)
    made = encoded(tokenizer, rows, bad=BadRows(1))
    assert len(made.examples) == 2 and made.report.skipped_bad == 1


def test_other_rows(tokenizer):
    with pytest.raises(DataError, match="columns prompt, completions, labels"):
        encoded(tokenizer, [Row({"text": "a"}, "x:1")])


def test_metrics_by_hand():
    found = {
        "labels": np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]]), "predicted": np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]]),
        "weights": np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], np.float32),
    }  # fmt: skip
    want = (2 * 1 / 3 + 2 * 2 / 5) / 2  # wrong: 1 hit, 1 extra, 0 missed; right: 2 hits, 0 extra, 1 missed
    assert ProcessReward().summary(found) == {"macro_f1": pytest.approx(want), "answer_accuracy": 0.5}


CONFIG = """
from ftjax.config import *
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.objectives.process_reward import ProcessReward
from ftjax.peft.lora import LoRA

def get_config():
    return Run(
        name="x", model=Pretrained(path=EMBEDDED), data=Local(path="train.jsonl", eval_share=0.2),
        objective=ProcessReward(), peft=LoRA(rank=4), loader=Loader(max_length=48), optim=Optim(lr=3e-3, warmup=5),
        train=Train(steps=40, batch=16, log_every=20), compute=Compute(cache=""),
    )
"""


def test_through_the_command_line(tmp_path, monkeypatch):
    """The small Llama in the package learns which steps are right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    draw = random.Random(0)
    lines = []
    for _ in range(120):
        labels = [draw.random() < 0.5 for _ in range(draw.randrange(1, 4))]
        steps = [f"return {'self' if label else 'None'}.{draw.choice('abcdef')}" for label in labels]
        lines.append({"prompt": f"class {draw.choice('ABCDEF')}:", "completions": steps, "labels": labels})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "x.py").write_text(CONFIG.replace("EMBEDDED", repr(str(embedded_folder()))))
    assert main(["--config", "x.py"]) == 0
    found = [json.loads(x) for x in (tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()]
    last = [x for x in found if x["event"] == "eval"][-1]
    assert last["accuracy"] > 0.95 and last["answer_accuracy"] > 0.9
