"""The README.md of an exported adapter or model: what it was made from and how, its numbers, and how to open it.

    text = model_card(run=run.model_dump(mode="json"), before=before, after=after, fingerprint=data.fingerprint, step=200)

It is meant to be published: of local paths only the last part is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal

from ftjax import __version__, registry
from ftjax.models.sources import EMBEDDED
from ftjax.report.grid import Grid, markdown
from ftjax.report.samples import comparison
from ftjax.report.units import visible
from ftjax.train.environment import environment

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
LOCAL_ONLY = ("out", "compute.cache")  # settings that say nothing to a reader of the card


def model_card(
    *, run: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], fingerprint: Mapping[str, Any],
    step: int, kind: Literal["adapter", "model"] | None = None, license: str = "",
    versions: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The card as Markdown with Hugging Face's YAML head.

    Args:
      run: the resolved config.
      before: held-out numbers before training; may be empty.
      after: held-out numbers of what is exported; may be empty.
      fingerprint: identity of the data (see `ftjax.data.prepare.Prepared`).
      step: optimizer steps taken.
      kind: what is exported; by default an adapter where the method has a form in PEFT's format, else a model.
      license: identifier for the head; left out when empty, for only the user knows the data's terms.
      versions: of the packages; those of this process by default.
    """
    if kind is None:
        kind = "adapter" if registry.get("peft", run["peft"]["name"]).hf_type else "model"
    versions = environment()["packages"] if versions is None else versions
    path = str(run["model"].get("path", ""))
    results = markdown(comparison(before, after)) if before or after else ""
    sections = {
        "Results": results,
        "How to open it": _usage(kind, path),
        "Data": _data(run, fingerprint),
        "Configuration": _fenced("json", json.dumps(_published(run), indent=2, ensure_ascii=False)),
        "Versions": ", ".join(f"{k} {v}" for k, v in {"ftjax": __version__, **versions}.items()),
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items() if text)
    return f"{_head(run, kind, path, license)}\n# {run['name']}\n\n{_intro(run, kind, path, step)}\n\n{body}\n"


def _head(run: Mapping[str, Any], kind: str, path: str, license: str) -> str:
    """The YAML head; its values are JSON, which YAML contains, so that no text can break out of it."""
    adapter = kind == "adapter"
    head: dict[str, Any] = {"base_model": path, "base_model_relation": "adapter" if adapter else "finetune"}
    if not HUB_ID.match(path):  # the hub knows no other bases
        head = {}
    head |= {"license": license} if license else {}
    head |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ftjax", *dict.fromkeys(run[k]["name"] for k in ("peft", "objective"))],
    }
    return "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items()), "---"])


def _intro(run: Mapping[str, Any], kind: str, path: str, step: int) -> str:
    what = f"{'An adapter' if kind == 'adapter' else 'A model'} trained with ftjax"
    how = f"method `{run['peft']['name']}`, objective `{run['objective']['name']}`, {step:,} steps, seed {run['seed']}"
    base = f" from {_base(path)}" if path else ", from random weights"
    return f"{what}{base}: {how}."


def _base(path: str) -> str:
    if path == EMBEDDED:
        return "the small base model that comes with ftjax"
    return f"[{path}](https://huggingface.co/{path})" if HUB_ID.match(path) else f"`{_last(path)}`"


def _usage(kind: str, path: str) -> str:
    embedded = path == EMBEDDED
    base = "str(embedded_folder())" if embedded else repr(path if HUB_ID.match(path) else _last(path))
    load = ["from ftjax.models.sources import embedded_folder"] if embedded else []
    if kind == "model":
        theirs = [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")',
        ]
        ours = ["import ftjax", "", 'model, params = ftjax.load_pretrained(".")']
        return f"With transformers:\n\n{_code(theirs)}\n\nWith ftjax:\n\n{_code(ours)}"
    theirs = [
        *load, "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f"base = AutoModelForCausalLM.from_pretrained({base})", 'model = PeftModel.from_pretrained(base, ".")',
    ]  # fmt: skip
    ours = ["import ftjax", *load, "", f'model, params = ftjax.load_pretrained({base}, adapter=".")']
    return f"With PEFT, from this folder:\n\n{_code(theirs)}\n\nWith ftjax:\n\n{_code(ours)}"


def _code(lines: list[str]) -> str:
    return _fenced("python", "\n".join(lines))


def _data(run: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    """Identity of what it was trained on: hashes of files, tokenizer and template."""
    rows = [("data set", str(run["data"]["name"]))]
    rows += [(str(name), f"`{value}`") for name, value in _flat("", _published(fingerprint.get("data", {})))]
    rows += [(k, f"`{fingerprint[k]}`") for k in ("tokenizer", "template", "examples") if k in fingerprint]
    return markdown(Grid("", ("what", "identity"), tuple(rows), words=frozenset({0, 1})))


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(f"{prefix}.{k}" if prefix else str(k), v)]
    return [(prefix or "data", value)]


def _published(value: Any, path: str = "") -> Any:
    """The config without this machine: local paths cut to their last part."""
    if isinstance(value, Mapping):
        inside = {k: f"{path}.{k}" if path else str(k) for k in value}
        return {k: _published(v, inside[k]) for k, v in value.items() if inside[k] not in LOCAL_ONLY}
    if isinstance(value, list | tuple):
        return [_published(v) for v in value]
    return _last(value) if isinstance(value, str) and value.startswith(("/", "~")) else value


def _last(path: str) -> str:
    return PurePath(path).name or path


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"
