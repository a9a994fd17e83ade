"""lm-evaluation-harness: the same numbers through our bridge and through its own Hugging Face backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import ftjax  # noqa: E402
from ftjax import registry  # noqa: E402
from ftjax.config import Run  # noqa: E402
from ftjax.configfile import dump  # noqa: E402
from ftjax.data.tokenizer import load_tokenizer  # noqa: E402
from ftjax.errors import ConfigError  # noqa: E402
from ftjax.evals.harness.model import HarnessModel  # noqa: E402
from ftjax.evals.request import requested  # noqa: E402
from ftjax.verbs import main  # noqa: E402
from tests.oracle import torch_llama  # noqa: E402
from tests.oracle.test_t5 import torch_t5  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

ROWS = [
    {"question": "The dog ran to the", "choices": ["park", "red ball and the green hat", "sea", "é"], "answer": 0},
    {"question": "Lily saw a big", "choices": ["ball", "cat that sat on the mat", "tree"], "answer": 1},
    {"question": "Once upon a time there was a girl who liked to play in the park with a dog", "choices": ["and", "so"],
     "answer": 1},
    {"question": "Tom", "choices": ["was sad", "ran", "is a boy", "sat down in the sun"], "answer": 2},
    {"question": "She said: a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g h i j k l m n", "choices":
     ["yes", "no no no"], "answer": 0},
    {"question": "He was very", "choices": ["happy", "sad and cold"], "answer": 0},
]  # fmt: skip
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{more}
"""
CHOICE = """doc_to_choice: choices
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
  - {metric: acc_bytes}"""
ROLLING = """metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}"""
GENERATE = """metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
generation_kwargs: {until: ["\\n", "b"], max_gen_toks: 12, do_sample: false}"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def tasks(folder: Path) -> Path:
    """Three tasks on one file of rows."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    for name, kind, text, target, more in (
        ("tiny_choice", "multiple_choice", '"{{question}}"', "answer", CHOICE),
        ("tiny_rolling", "loglikelihood_rolling", '""', '"{{question}} {{choices[answer]}} {{question}}"', ROLLING),
        ("tiny_generate", "generate_until", '"{{question}}"', '"{{choices[answer]}}"', GENERATE),
    ):
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, text=text, target=target, more=more)
        )
    return folder


def letters(folder: Path, template: str, **special: str) -> int:
    """Saves a tokenizer whose tokens are characters; gives their number."""
    text = "".join(row["question"] + "".join(row["choices"]) for row in ROWS)
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "\n", *sorted(set(text))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens = [(t, vocab[t]) for t in template.split() if t in vocab]
    tokenizer.post_processor = processors.TemplateProcessing(template, template + " $B", tokens)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<unk>", **special
    )
    fast.save_pretrained(folder)
    return len(vocab)


def tiny(folder: Path) -> Path:
    """A random Llama, BOS first."""
    torch_llama(folder, vocab_size=letters(folder, "<s> $A", bos_token="<s>"))
    return folder


def backend(folder: Path, **options: Any) -> Any:
    """The harness' own backend."""
    make: Any = HFLM
    return make(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, **options)


def results(lm: Any, include: Path) -> dict[str, Any]:
    """Numbers and answers of the three tasks."""
    evaluate: Any = lm_eval.simple_evaluate
    return evaluate(
        model=lm, tasks=["tiny_choice", "tiny_rolling", "tiny_generate"], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
    )  # fmt: skip


def replies(found: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to each request of a task, in order."""
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    return [r[0] for s in samples for r in s["resps"]]


def same(ours: dict[str, Any], theirs: dict[str, Any], longest: int | None = None) -> None:
    """Equal log-likelihoods, equal text (up to `longest` characters), equal scores."""
    for task in ("tiny_choice", "tiny_rolling"):
        a, b = (np.array(replies(x, task), np.float64) for x in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-6)
        assert np.ptp(b) > 1
    assert replies(ours, "tiny_generate") == [text[:longest] for text in replies(theirs, "tiny_generate")]
    for task, numbers in theirs["results"].items():
        for key, value in numbers.items():
            if isinstance(value, float):
                assert ours["results"][task][key] == pytest.approx(value, rel=1e-5), (task, key)


def test_a_tiny_model(tmp_path):
    folder, include = tiny(tmp_path / "model"), tasks(tmp_path / "tasks")
    model, params = ftjax.load_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    lm = HarnessModel(model, params, tokenizer, batch=4)
    assert max(len(tokenizer.encode(r["question"])) for r in ROWS) > lm.max_length, "nothing is cut"
    ours = results(lm, include)
    same(ours, results(backend(folder), include))
    assert len(set(replies(ours, "tiny_generate"))) > 3
    assert any(len(text) < 12 for text in replies(ours, "tiny_generate")), "no stop text was met"


def test_an_encoder_with_a_decoder(tmp_path):
    folder, include = tmp_path / "model", tasks(tmp_path / "tasks")
    torch_t5(folder, {"vocab_size": letters(folder, "$A </s>"), "eos_token_id": 2})
    ours = results(HarnessModel(*ftjax.load_pretrained(folder), load_tokenizer(folder), batch=4), include)
    # Of such a model the backend takes max_gen_toks and the prompt's length together for the longest answer.
    same(ours, results(backend(folder), include), longest=12)


def test_our_own_multiple_choice_has_the_same_numbers(tmp_path, shared):
    include = tasks(tmp_path / "tasks")
    for folder in (tiny(tmp_path / "model"), shared / "stories260k"):
        theirs = results(backend(folder), include)
        request = requested(["evals=choices", f"path={include / 'rows.jsonl'}", "batch=4"])
        measured = request.measure(*ftjax.load_pretrained(folder), load_tokenizer(folder), template="")
        ours = [x for row in measured.record["rows"] for x in row["logprobs"]]
        np.testing.assert_allclose(ours, [x for x, _ in replies(theirs, "tiny_choice")], atol=1e-4, rtol=1e-6)
        for name, value in measured.record["results"].items():
            assert value == theirs["results"]["tiny_choice"][f"{name},none"], name
        assert len(measured.record["results"]) == 3


def test_stories260k(tmp_path, shared):
    folder, include = shared / "stories260k", tasks(tmp_path / "tasks")
    lm = HarnessModel(*ftjax.load_pretrained(folder), load_tokenizer(folder))
    ours = results(lm, include)
    same(ours, results(backend(folder), include))
    assert any(greedy for _, greedy in replies(ours, "tiny_choice")) or ours["results"]["tiny_choice"]["acc,none"] > 0


def adapted(folder: Path, target: Path) -> Path:
    """A LoRA by PEFT, drawn at random."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(0.3 * torch.randn_like(p))
    model.save_pretrained(str(target))
    return target


def test_an_adapter_is_evaluated_without_merging(tmp_path, capsys):
    folder, include = tiny(tmp_path / "model"), tasks(tmp_path / "tasks")
    adapter = adapted(folder, tmp_path / "run/adapter")
    model, params = ftjax.load_pretrained(folder, adapter=adapter)
    ours = results(HarnessModel(model, params, load_tokenizer(folder), batch=4), include)
    theirs = results(backend(folder, peft=str(adapter)), include)
    same(ours, theirs)
    plain = results(HarnessModel(*ftjax.load_pretrained(folder), load_tokenizer(folder), batch=4), include)
    assert np.abs(np.subtract(replies(ours, "tiny_choice"), replies(plain, "tiny_choice"))).max() > 0.1

    run = Run(model=registry.get("model", "pretrained")(path=str(folder)))
    (tmp_path / "run/config.json").write_text(dump(run))
    words = ["evals=lm_eval", "tasks=tiny_choice,tiny_rolling", f"include_path={include}", "bootstrap=0"]
    assert main(["eval", "--config", str(tmp_path / "run/config.json"), *words]) == 0
    assert "|tiny_choice" in capsys.readouterr().out
    written = json.loads((tmp_path / "run/evals/lm_eval-tiny_choice+tiny_rolling.json").read_text())
    for task, key in (("tiny_choice", "acc,none"), ("tiny_rolling", "bits_per_byte,none")):
        assert written["results"][task][key] == pytest.approx(theirs["results"][task][key], rel=1e-5)
    assert main(["eval", "--model", str(folder), "--out", str(tmp_path / "base.json"), *words]) == 0
    base = json.loads((tmp_path / "base.json").read_text())["results"]["tiny_rolling"]["bits_per_byte,none"]
    assert base == pytest.approx(plain["results"]["tiny_rolling"]["bits_per_byte,none"], rel=1e-6)
    assert main(["eval", "--run", str(tmp_path / "run"), "evals=lm_eval", "tasks=tiny_choise"]) == 2
    assert "unknown task" in capsys.readouterr().err


def test_what_is_not_available_is_refused(tmp_path):
    folder = tiny(tmp_path / "model")
    lm = HarnessModel(*ftjax.load_pretrained(folder), load_tokenizer(folder))
    with pytest.raises(ConfigError, match="num_beams=4  is not available"):
        lm._sampling({"until": ["b"], "num_beams": 4})
    with pytest.raises(ConfigError, match="no room for a prompt"):
        lm._prompt("Tom", 64)
    sampling, stops = lm._sampling({"until": "b", "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5})
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 0.9, 5)
    assert stops == ["b", "</s>"] and lm._sampling({"do_sample": False, "temperature": 0.7})[0].temperature == 0
