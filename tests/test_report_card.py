"""The README.md of what a run exports: front matter that model hubs read, numbers, data, and how to open it."""

from __future__ import annotations

import ast
import json
import re

import yaml
from huggingface_hub import ModelCard

from ftjax.config import Run
from ftjax.peft.adapter import Pfeiffer
from ftjax.report.card import model_card

FINGERPRINT = {"data": {"sources": "ab" * 32}, "examples": {"count": 1234, "sha256": "cd" * 32, "tokens": 56789}}
BEFORE, AFTER = {"event": "eval", "step": 0, "loss": 3.0}, {"event": "eval", "step": 200, "loss": 2.25}


def card(**changes) -> str:
    usual = {
        "run": Run(name="mine", seed=3).model_dump(mode="json"), "before": BEFORE, "after": AFTER,
        "fingerprint": FINGERPRINT, "step": 200, "base": "some/llama", "adapter": True,
    }  # fmt: skip
    return model_card(**(usual | changes))


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.S | re.M)


def test_an_adapter_names_its_base_and_library():
    assert front(card()) == {"library_name": "peft", "base_model": "some/llama", "tags": ["ftjax", "lora"]}
    read = ModelCard(card()).data
    assert (read.library_name, read.base_model, read.tags) == ("peft", "some/llama", ["ftjax", "lora"])


def test_an_adapter_that_peft_does_not_know_is_not_offered_to_it():
    text = card(run=Run(name="mine", seed=3, peft=Pfeiffer()).model_dump(mode="json"))
    assert front(text)["library_name"] == "ftjax" and "peft import" not in text
    assert 'ftjax.load_pretrained("some/llama", adapter=' in text


def test_a_whole_model_is_no_adapter_and_still_names_what_it_started_from():
    text = card(adapter=False)
    assert front(text)["library_name"] == "transformers" and front(text)["base_model"] == "some/llama"
    assert "A model that started from `some/llama` and learnt by `lora`" in text and "peft import" not in text


def test_a_model_from_random_weights_has_no_base():
    text = card(adapter=False, base="")
    assert "base_model" not in front(text) and "A model that started from random weights" in text


def test_what_it_was_trained_on_and_for_how_long():
    text = " ".join(card(notes="Trained on *few* tokens.").split())
    assert (
        "# mine A `lora` adapter over `some/llama`, trained with the objective `causal_lm` on `stdlib_docs` "
        "(1,234 examples, 56,789 tokens; sha256 `cdcdcdcdcdcdcdcd`) for 200 steps of 8 rows, seed 3. "
        "Trained on *few* tokens. ## Held-out results"
    ) in text


def test_held_out_numbers_before_and_after():
    text = card()
    assert "| metric | step 0 | step 200 | change |" in text and "| held-out loss | 3 | 2.2500 | -0.7500 |" in text
    assert "Held-out results" not in card(before={}, after={})


def test_config_and_fingerprint_can_be_read_back():
    run = Run(name="mine", seed=3)
    config, fingerprint = map(json.loads, blocks(card(), "json"))
    assert Run.model_validate_json(json.dumps(config)) == run and fingerprint == FINGERPRINT


def test_the_ways_to_open_it_are_python_for_any_base():
    for base in ("some/llama", 'C:\\models\\"q"', "a: b # c\nd"):
        text = card(base=base)
        assert front(text)["base_model"] == base
        peft, here = blocks(text, "python")
        assert "PeftModel.from_pretrained(" in peft and "ftjax.load_pretrained(" in here
        for code in (peft, here):
            assert base in [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    plain, here = blocks(card(adapter=False), "python")
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in plain and "adapter=" not in here


def test_versions_are_those_installed():
    import jax

    assert f"jax {jax.__version__}" in card()
