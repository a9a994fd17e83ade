"""The README.md of an exported adapter or model: what it is, what it was trained on, how to open it.

text = model_card(run=config, before={"loss": 3.9}, after={"loss": 2.1}, fingerprint=data.fingerprint, step=200)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ftjax.registry import known
from ftjax.report.grid import markdown
from ftjax.report.samples import comparison
from ftjax.report.units import visible

PACKAGES = ("ftjax", "jax", "flax", "optax", "transformers")

PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "path/to/this/folder")
```"""

OURS = """```python
import ftjax

model, params = ftjax.load_pretrained({base}, adapter="path/to/this/folder")
```"""

PLAIN = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

```python
import ftjax

model, params = ftjax.load_pretrained("path/to/this/folder")
```"""


def model_card(
    *,
    run: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    step: int,
    base: str = "",
    adapter: bool = False,
    notes: str = "",
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
      run: the config as JSON-like data.
      before, after: held-out numbers; may be empty.
      fingerprint: identity of the data; its ``examples`` say how many there are.
      step: optimizer steps behind these weights.
      base: model that training started from; empty when its weights were random.
      adapter: whether this is an adapter over `base` rather than a whole model.
      notes: Markdown for the reader, after the description.
    """
    foreign = getattr(known("peft").get(run["peft"]["name"]), "hf_type", None) is not None  # whether PEFT opens it
    front = [
        f"library_name: {'peft' if adapter and foreign else 'ftjax' if adapter else 'transformers'}",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "tags:",
        "- ftjax",
        f"- {run['peft']['name']}",
    ]
    examples = fingerprint.get("examples", {})
    counted = f"{examples.get('count', 0):,} examples, {examples.get('tokens', 0):,} tokens"
    method, start = run["peft"]["name"], f"`{visible(base)}`" if base else "random weights"
    what = (
        f"A `{method}` adapter over {start}"
        if adapter
        else f"A model that started from {start} and learnt by `{method}`"
    )
    described = (
        f"{what}, trained with the objective `{run['objective']['name']}` on "
        f"`{run['data']['name']}` ({counted}; sha256 `{str(examples.get('sha256', ''))[:16]}`) for {step:,} steps of "
        f"{run['train']['batch']} rows, seed {run['seed']}."
    )
    parts = ["---", *front, "---", "", f"# {run['name']}", "", described]
    if notes:
        parts += ["", notes]
    if before or after:
        parts += ["", "## Held-out results", "", markdown(comparison(before, after))]
    versions = ", ".join(f"{p} {_version(p)}" for p in PACKAGES)
    opening = "\n\n".join([PEFT, OURS] if foreign else [OURS]).format(base=json.dumps(base)) if adapter else PLAIN
    parts += ["", "## How to open it", "", opening, "", "## How it was made", "", versions]
    for name, value in (("Config", run), ("Fingerprint of the data", fingerprint)):
        parts += ["", f"{name}:", "", "```json", json.dumps(value, indent=2), "```"]
    return "\n".join([*parts, ""])


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "(source)"
