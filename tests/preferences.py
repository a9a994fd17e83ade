"""A folder with a tiny Llama, a tokenizer and preference data, and runs on it, for the tests of preference training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import Evaluate, Loader, Optim, Run, Train
from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import Row
from ftjax.data.tasks.local import Local
from ftjax.models import hf
from ftjax.models.sources import Pretrained
from ftjax.objectives.dpo import DPO
from ftjax.params import init_params
from ftjax.peft.base import Overlay
from ftjax.peft.interop import save_adapter
from ftjax.train.setup import Setup, prepare
from tests import tiny

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "runs", "sits"]


def project(root: Path, rows: int = 24) -> Path:
    """Writes base/, pairs.jsonl (prompt, chosen, rejected) and judged.jsonl (prompt, completion, label)."""
    rng = np.random.default_rng(0)
    text = lambda n: " " + " ".join(rng.choice(WORDS, n))  # noqa: E731
    pairs = [{"prompt": f"{WORDS[i % 10]} {i}", "chosen": text(3 + i % 3), "rejected": text(5)} for i in range(rows)]
    judged = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    for name, made in (("pairs", pairs), ("judged", judged)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    train_tokenizer("bpe", [Row({"text": r["prompt"] + r["chosen"]}, "") for r in pairs], 300, root / "base")
    vocab = json.loads((root / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    model = tiny.llama(vocab_size=len(vocab) + 3, eos_token_id=(2,), bos_token_id=1)
    hf.save(model, init_params(model.table, jax.random.key(0), dtype=jnp.float32), root / "base")
    return root


def drawn(overlay: Overlay, seed: int = 3, size: float = 0.3) -> Overlay:
    """An overlay with every array moved, as if trained; numbers per layer (scales) stay."""
    leaves, structure = jax.tree.flatten(overlay)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + size * jax.random.normal(k, x.shape) if x.ndim > 1 else x for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def earlier(root: Path, method: Any, name: str = "sft", **options: Any) -> Path:
    """An adapter folder of a method over the base of `project`, its arrays drawn at random."""
    model, params = hf.load(str(root / "base"))
    overlay = drawn(method.init(jax.random.key(1), model.table, params), **options)
    return save_adapter(root / name, overlay, model.table, method, base_path=str(root / "base"))


def run_of(root: Path, **parts: Any) -> Run:
    """A run of DPO over the pairs."""
    given: dict[str, Any] = dict(
        out=str(root / "run"), model=Pretrained(path=str(root / "base")), objective=DPO(),
        data=Local(path=str(root / "pairs.jsonl"), eval_share=0.2), loader=Loader(max_length=32, workers=0),
        optim=Optim(lr=1e-3), train=Train(steps=4, batch=8), evaluate=Evaluate(examples=8, generate=0),
    )  # fmt: skip
    return Run(**(given | parts))


def setup_of(root: Path, **parts: Any) -> Setup:
    """`run_of`, ready to compile."""
    return prepare(run_of(root, **parts), say=lambda text: None)
