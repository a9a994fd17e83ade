"""ftjax: fine-tune foundation models in JAX. Any objective, any PEFT method, any model, on CPU, GPU and TPU.

model, params = ftjax.load_pretrained("my/llama", adapter="runs/x/adapter")
logits = model.apply(params, {"input_ids": ids, "attention_mask": mask}).logits
texts = ftjax.generate(model, params, tokenizer, ["Once upon a time"], max_new_tokens=80)
ftjax.save_pretrained(model, ftjax.merge(model, params), "merged")
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("ftjax")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0+source"

if TYPE_CHECKING:
    from ftjax.api import generate, load_adapters, load_pretrained, merge, merge_adapters, save_pretrained, to_lora

__all__ = [
    "__version__", "generate", "load_adapters", "load_pretrained", "merge", "merge_adapters", "save_pretrained", "to_lora",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # JAX is imported at first use: `run.py --help` and config errors stay quick.
    if name in __all__:
        from ftjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'ftjax' has no attribute {name!r}")
