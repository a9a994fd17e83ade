"""`distilled`: a teacher answers a data set's prompts once; answers, cache, what is dropped, and a run that learns them."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.config import Loader, Train
from ftjax.configfile import advice
from ftjax.data.prepare import prepare as prepare_data
from ftjax.data.rows import Row
from ftjax.data.tasks import distilled
from ftjax.data.tasks.distilled import Distilled
from ftjax.data.tasks.local import Local
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError, DataError
from ftjax.generate.api import generate, generate_ids
from ftjax.generate.bulk import Answer, answer_all
from ftjax.generate.sampling import Sampling
from ftjax.models import hf
from ftjax.models.sources import Pretrained, Scratch
from ftjax.objectives.causal_lm import CausalLM
from ftjax.params import init_params
from ftjax.peft.lora import LoRA
from tests import tinymodels
from tests.preferences import project, run_of

ASKED = [{"prompt": f"{word} {i}", "completion": f" blue {i}"} for i, word in enumerate(("red", "cat", "dog runs") * 4)]
TALKS = [
    {"messages": [{"role": "user", "content": f"red {i}"}, {"role": "assistant", "content": f"cat {i}"}]}
    for i in range(8)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("distilled"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    distilled._answers_of.cache_clear()
    return tmp_path / "cache"


def write(path: Path, rows: list[dict[str, Any]]) -> Local:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Local(path=str(path), eval_share=0.3)


def asked(root: Path, source: Any, **settings: Any) -> Distilled:
    given: dict[str, Any] = {"max_new_tokens": 5, "unfinished": "keep", "batch": 4} | settings
    return Distilled(source=source, teacher=Pretrained(path=str(root / "base")), **given)


def loaded(path: str) -> tuple[Any, Any]:
    return hf.load(path)


def status(task: Distilled) -> str:
    """What the console says of the cache, as a new process would."""
    distilled._answers_of.cache_clear()
    return next(line for line in task.describe() if "cache: " in line).rpartition("cache: ")[2]


def fixed(monkeypatch: pytest.MonkeyPatch, answers: dict[int, Answer]) -> None:
    """A teacher that says these to the prompts of these numbers, and one word to the others."""
    usual = Answer(" fine", 1, True)
    monkeypatch.setattr(distilled, "_ask", lambda task, tok, ids: [[answers.get(i, usual)] for i in range(len(ids))])


def test_the_answers_are_those_of_generate(root: Path, tmp_path: Path):
    task = asked(root, write(tmp_path / "asked.jsonl", ASKED))
    model, params = loaded(str(root / "base"))
    rows = task.examples("train")
    assert 6 <= len(rows) < 12
    said = generate(model, params, load_tokenizer(root / "base"), [r["prompt"] for r in rows], max_new_tokens=5)
    assert [r["completion"] for r in rows] == said
    assert all(r.origin.startswith(str(tmp_path / "asked.jsonl:")) and set(r) == {"prompt", "completion"} for r in rows)
    held_out = {r["prompt"]: r["completion"] for r in task.examples("eval")}
    assert held_out and all(row["completion"] == held_out[row["prompt"]] for row in ASKED if row["prompt"] in held_out)


def test_an_answer_that_ended_is_told_from_one_that_was_cut(root: Path):
    model, params = loaded(str(root / "base"))
    tokenizer = load_tokenizer(root / "base")
    prompts = [np.asarray([i, i + 1, 2 * i], np.int32) for i in range(5, 85)]
    said = generate_ids(model, params, tokenizer, prompts, Sampling(5))
    new = ((p, x, i) for p, x in zip(prompts, said, strict=True) for i in range(1, len(x)) if x[i] not in x[:i])
    prompt, tokens, last = next(new)
    ending = dc.replace(model, config=dc.replace(model.config, eos_token_id=(tokens[last],)))
    for most, want in ((5, True), (last + 1, True), (last, False)):
        (answer,) = answer_all(ending, params, tokenizer, [prompt], Sampling(most), samples=1, batch=4)[0]
        assert (answer.tokens, answer.ended) == (last, want)


def test_a_teacher_that_reads_apart(root: Path, tmp_path: Path):
    task, small = asked(root, write(tmp_path / "asked.jsonl", ASKED)), tinymodels.known()["t5"]()
    tokenizer: Any = load_tokenizer(root / "base")
    config = dc.replace(small.config, vocab_size=len(tokenizer), eos_token_id=(2,))
    model: Any = dc.replace(small, config=config)
    params = init_params(model.table, jax.random.key(1), dtype=jnp.float32)
    hf.save(model, params, tmp_path / "t5", tokenizer_from=root / "base")
    rows = task.model_copy(update={"teacher": Pretrained(path=str(tmp_path / "t5"))}).examples("train")
    said = generate(model, params, tokenizer, [r["prompt"] for r in rows], max_new_tokens=5)
    assert {*said} - {""} and [r["completion"] for r in rows] == [x for x in said if x.strip()]


def test_draws_are_those_of_generate(root: Path, tmp_path: Path):
    task = asked(root, write(tmp_path / "asked.jsonl", ASKED), samples=2, temperature=1.0, top_p=0.9, seed=3)
    rows = task.examples("train")
    model, params = loaded(str(root / "base"))
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    prompts = [r["prompt"] for r in rows]
    assert prompts[0] == prompts[1] and rows[1].origin.endswith(" answer 2")
    assert [r["completion"] for r in rows] == generate(model, params, load_tokenizer(root / "base"), prompts, **options)
    assert len({(r["prompt"], r["completion"]) for r in rows}) > len(rows) // 2


def test_the_cache_is_hit_and_missed(root: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    source = write(tmp_path / "asked.jsonl", ASKED)
    task = asked(root, source)
    assert status(task) == "miss (nothing stored yet)"
    first = task.fingerprint()
    with monkeypatch.context() as m:
        m.setattr(distilled, "_ask", None)  # a hit asks nobody
        assert status(task) == "hit" and task.fingerprint() == first
        assert status(asked(root, source, batch=8)) == "hit"  # answers do not depend on what is decoded together
    assert status(asked(root, source, max_new_tokens=4)).startswith("miss (changed: settings.max_new_tokens")
    write(tmp_path / "asked.jsonl", [*ASKED, *({"prompt": f"new {i}", "completion": "x"} for i in range(5))])
    assert status(task).startswith("miss (changed: prompts") and task.fingerprint() != first
    other = tmp_path / "teacher"
    other.mkdir()
    model, _ = hf.load(str(root / "base"))
    hf.save(model, init_params(model.table, jax.random.key(7), dtype=jnp.float32), other, tokenizer_from=root / "base")
    moved = task.model_copy(update={"teacher": Pretrained(path=str(other))})
    assert "teacher.model.safetensors" in status(moved)


def test_the_answers_are_there_to_read(root: Path, tmp_path: Path, cache: Path):
    source = write(tmp_path / "asked.jsonl", ASKED)
    task = asked(root, source, file=str(tmp_path / "said" / "answers.jsonl"))
    told = list(task.describe())
    lines = [json.loads(line) for line in (tmp_path / "said/answers.jsonl").read_text().splitlines()]
    assert told[2] == f"to read: {tmp_path / 'said/answers.jsonl'}"
    assert [(r["prompt"], r["completion"]) for r in task.examples("train")] == [
        (x["prompt"], x["completion"]) for x in lines
    ]
    assert {*lines[0]} == {"prompt", "completion", "tokens", "ended", "origin"}
    said = list(asked(root, source).describe())
    assert f"data.source=local are answered by {root / 'base'}" in said[0]
    assert f"{len(lines)} answers to {len(lines)} prompts: " in said[1] and " new tokens on average, " in said[1]
    assert Path(said[2].removeprefix("to read: ")).parent == cache


def test_what_is_empty_or_unfinished_is_dropped_and_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fixed(monkeypatch, {0: Answer(" ", 1, True), 1: Answer(" and so", 5, False), 2: Answer(" on", 5, False)})
    source = write(tmp_path / "asked.jsonl", ASKED)
    kept, dropped = asked(root, source), asked(root, source, unfinished="drop", max_new_tokens=6)
    n = len(kept.examples("train")) + 1
    assert len(dropped.examples("train")) == n - 3
    line = list(dropped.describe())[1]
    assert (
        f"{n} answers" in line
        and f"{1 - 2 / n:.1%} ended with EOS, 1 empty and dropped, 2 unfinished and dropped" in line
    )
    assert ", 2 unfinished and kept" in list(kept.describe())[1]
    fixed(monkeypatch, {i: Answer(" on", 5, False) for i in range(n)})
    with pytest.raises(
        DataError, match="no answer of the teacher is left: .* dropped; .*Set a larger data.max_new_tokens"
    ):
        asked(root, source, unfinished="drop", max_new_tokens=7).examples("train")


def test_prompts_without_room_are_counted(root: Path, tmp_path: Path):
    rows = [{"prompt": "red " * 200, "completion": "x"}, *ASKED]
    source = write(tmp_path / "asked.jsonl", rows).model_copy(update={"eval_share": 0.0})
    task = asked(root, source)
    assert len(task.examples("train")) == len(ASKED)
    assert ", 1 prompts refused by the teacher's template or too long for its context" in list(task.describe())[1]


def test_conversations_go_through_the_teachers_template(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write(tmp_path / "talks.jsonl", TALKS).model_copy(update={"chat_template": "chatml"})
    with pytest.raises(
        DataError, match=r"tokenizer has no chat template, .*talks.jsonl:\d+. Set data.teacher_template to"
    ):
        asked(root, source).examples("train")
    seen: list[np.ndarray] = []
    monkeypatch.setattr(distilled, "_ask", lambda t, k, ids: seen.extend(ids) or [[Answer("ok", 1, True)] for _ in ids])
    task = asked(root, source, teacher_template="chatml")
    row = task.examples("train")[0]
    assert row["completion"] == [{"role": "assistant", "content": "ok"}] and [m["role"] for m in row["prompt"]] == [
        "user"
    ]
    text = str(load_tokenizer(root / "base").decode(seen[0]))
    assert text.startswith("<s><|im_start|>user\nred 0") and text.endswith("<|im_start|>assistant\n")
    held_out = task.examples("eval")
    assert held_out and all(r["completion"][0]["content"].startswith("cat ") for r in held_out)
    made = prepare_data(task, Loader(max_length=256), load_tokenizer(root / "base"), use_cache=False)
    assert str(made.type) == "prompt_completion (conversational)" and len(made.eval) == len(held_out)


@pytest.mark.parametrize(
    "row, true",
    [
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, " b"),
        ({"prompt": "a", "completion": " b", "label": True}, " b"),
        ({"prompt": "a", "completion": " b", "label": False}, None),
        ({"prompt": "a"}, None),
    ],
)
def test_any_rows_with_prompts_will_do(row: dict[str, Any], true: str | None):
    found = distilled._prompt_of(Row(row, "x:1"))
    assert found == {"prompt": "a"} | ({"completion": true} if true else {}) and found.origin == "x:1"


def test_rows_without_prompts_are_refused(root: Path, tmp_path: Path):
    source = write(tmp_path / "texts.jsonl", [{"text": "red cat"}, {"text": "blue dog"}])
    with pytest.raises(
        DataError, match="data.source=local has no prompts .*: its rows are language_modeling; .*columns text"
    ):
        asked(root, source).examples("train")


def test_settings_that_cannot_be_meant(root: Path, tmp_path: Path):
    source = write(tmp_path / "asked.jsonl", ASKED)
    run = run_of(root, objective=CausalLM(), data=asked(root, source, samples=2))
    assert "the answers would all be the same; set a temperature" in [*run.data.check(run)][0]
    run = run_of(root, objective=CausalLM(), data=asked(root, source).model_copy(update={"teacher": Scratch()}))
    assert "a teacher is a model that was trained" in [*run.data.check(run)][0]
    run = run_of(root, objective=CausalLM(), data=asked(root, source))
    assert any("it learns from its own answers" in text for text in advice(run))


def test_a_teacher_without_a_vocabulary_is_refused(root: Path, tmp_path: Path):
    config = {
        **json.loads((root / "base/config.json").read_text()),
        "architectures": ["LlamaForSequenceClassification"],
    }
    folder = tmp_path / "judge"
    folder.mkdir()
    for file in (root / "base").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    task = asked(root, write(tmp_path / "asked.jsonl", ASKED)).model_copy(
        update={"teacher": Pretrained(path=str(folder))}
    )
    with pytest.raises(ConfigError, match="has a head 'sequence_classification'; answers need a language model"):
        task.examples("train")


def test_a_run_learns_the_answers(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = asked(root, write(tmp_path / "asked.jsonl", ASKED))
    run = run_of(
        root, out=str(tmp_path / "run"), objective=CausalLM(), data=task, peft=LoRA(rank=2, targets=("q_proj",)),
        train=Train(steps=2, batch=8), model=Pretrained(path=str(root / "base")),
    )  # fmt: skip
    assert run.regime.train(run, allow=()) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert "new tokens on average" in capsys.readouterr().out
    tokenizer = load_tokenizer(root / "base")
    made = prepare_data(task, run.loader, tokenizer)
    texts = [tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in made.train]
    assert texts == [r["prompt"] + r["completion"] for r in task.examples("train")]
    assert made.report.cache == "hit"
