"""Oracles: tiny random torch models, saved as transformers saves them, and the same numbers asked of both sides.

torch is imported within the functions; test modules skip themselves where it is absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False, attn_implementation="eager",
)  # fmt: skip
LENGTHS = (19, 7, 13)


def torch_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    """A Llama with every parameter drawn at random (norms and biases too), saved to `folder`."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    return model


def rows(vocab: int, *, left: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, attention mask) [3, 19] with padding on one side, int64."""
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((len(LENGTHS), max(LENGTHS)), np.int64), np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
    for i, n in enumerate(LENGTHS):
        at = slice(max(LENGTHS) - n, None) if left else slice(n)
        ids[i, at], mask[i, at] = rng.integers(3, vocab, n), 1
    return ids, mask


def torch_logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """float32 logits of a torch model; positions count the real tokens, as `generate` passes them."""
    import torch

    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        )
    return out.logits.float().numpy()


def our_logits(model: Any, params: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """float32 logits of one of our models."""
    import jax

    inputs = {"input_ids": ids.astype(np.int32)} | ({} if mask is None else {"attention_mask": mask.astype(np.int32)})
    return np.asarray(jax.jit(lambda p, x: model.apply(p, x).logits)(params, inputs))


def apart(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Largest absolute difference, over real tokens only where a mask is given."""
    gap = np.abs(a - b)
    return float(gap.max() if mask is None else gap[mask > 0].max())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest entry of `b`."""
    return float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12))


def named(table: Any, store: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters, or their gradients, under the checkpoint's names."""
    from ftjax.models.tensors import to_file_tensors

    return to_file_tensors(table, store)
