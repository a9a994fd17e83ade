"""The library's front door: load, save, merge and generate, re-exported as ``ftjax.<name>``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ftjax.generate.api import generate as _generate
from ftjax.headspec import HeadSpec
from ftjax.models import hf
from ftjax.models.base import Model
from ftjax.models.transformer import Decoder
from ftjax.params import Store, bounds, cut
from ftjax.peft import base as peft
from ftjax.peft.adapters import load_adapters
from ftjax.peft.convert import to_lora
from ftjax.peft.interop import head_of, load_adapter
from ftjax.peft.merges import merge_adapters
from ftjax.quant.base import Storage

__all__ = ["generate", "load_adapters", "load_pretrained", "merge", "merge_adapters", "save_pretrained", "to_lora"]


def load_pretrained(
    path_or_id: str | Path,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    *,
    head: HeadSpec | None = None,
    seed: int = 0,
    quantize: Storage | None = None,
) -> tuple[Model, Store]:
    """Loads a model folder or hub id, optionally with an adapter laid over it.

    Args:
      path_or_id: local folder in Hugging Face layout (config.json, safetensors), or a hub id.
      dtype: of parameters and computation, "float32" or "bfloat16".
      adapter: folder in Hugging Face PEFT format; a head that it brings along is put in place.
      head: what stands on top, e.g. ``HeadSpec("sequence_classification", ("no", "yes"))``; by default what the folder's
        config names.
      seed: of a head that the files do not have; a warning says so.
      quantize: how the blocks' kernels are held, e.g. ``NF4()``; None: as plain arrays.

    Returns:
      (model, params): ``model.apply(params, {"input_ids": [B, T], "attention_mask": [B, T]}).logits``.

    Raises:
      DataError: files are missing, damaged or do not fit; nothing is loaded in part.
      ConfigError: the family has no such head.
    """
    if adapter is None:
        return hf.load(str(path_or_id), dtype=dtype, head=head, seed=seed, storage=quantize)
    brought = head or head_of(adapter)
    # A head that the adapter brings replaces the one drawn here, so there is nothing to tell of it.
    say = (lambda _: None) if brought else warnings.warn
    model, params = hf.load(str(path_or_id), dtype=dtype, head=brought, seed=seed, say=say, storage=quantize)
    file = load_adapter(adapter, model.table, params, base_path=str(path_or_id))
    params |= {k: jnp.asarray(v, params[k].dtype) for k, v in file.saved.items()}
    return model, peft.bind(cut(params, bounds(file.overlay)), file.overlay)


def save_pretrained(
    model: Model, params: Store, folder: str | Path, *, tokenizer_from: str | Path | None = None
) -> Path:
    """Writes a model folder that transformers opens.

    Args:
      model: as loaded.
      params: plain weights; merge adapters first.
      folder: created if absent.
      tokenizer_from: folder whose tokenizer files are copied along.

    Raises:
      ConfigError: `params` holds adapters.
    """
    return hf.save(model, params, folder, tokenizer_from=tokenizer_from)


def merge(model: Model, params: Store) -> Store:
    """Folds the adapters in `params` into the weights, in float32; the result is plain weights in the base's dtype.

    Quantized weights are dequantized first.

    Raises:
      ConfigError: the adapter cannot be merged (a prefix or an intervention).
    """
    return peft.merge(params, model.table)


def generate(
    model: Decoder,
    params: Store,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    **sampling: Any,
) -> list[str]:
    """Continues each prompt; see `ftjax.generate.api.generate` for the sampling options (top_k, top_p, stop, seed)."""
    return _generate(
        model, params, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, **sampling
    )
