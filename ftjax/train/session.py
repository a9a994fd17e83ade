"""What a run does besides stepping: held-out loss, samples, export. Shared by training, `eval` and `merge`."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import params
from ftjax.data.encode import encode_prompt
from ftjax.data.layouts import layout_of
from ftjax.data.pipeline import eval_batches, permutation
from ftjax.data.task import Prompt
from ftjax.evals.text import scores
from ftjax.generate.api import completion, continued, generate_ids
from ftjax.generate.sampling import Sampling
from ftjax.models import hf
from ftjax.peft.base import bind, merge
from ftjax.peft.interop import TASK_TYPES, save_adapter
from ftjax.quant.base import unpack_store
from ftjax.train.setup import Setup, compile_eval
from ftjax.train.state import State


@dc.dataclass(frozen=True)
class Answer:
    """A fixed prompt with what the model said and what was expected."""

    prompt: str
    completion: str
    reference: str


def held_out_examples(setup: Setup) -> Any:
    """The held-out examples that are used: all, or the same `evaluate.examples` every time."""
    examples, limit = setup.data.eval, setup.run.evaluate.examples
    if limit and limit < len(examples):
        return examples.take(np.sort(permutation(len(examples), 0)[:limit]))
    return examples


@dc.dataclass
class Evaluator:
    """Held-out loss and generation-based metrics of a run.

    Attributes:
      setup: the run.
      compiling: context manager around compilation, given what is compiled.
    """

    setup: Setup
    compiling: Callable[[str], Any]
    _step: Any = None

    @property
    def rows(self) -> int:
        """Rows per evaluation batch: as many as a micro-batch."""
        return self.setup.run.train.batch // self.setup.run.train.accumulate

    def compile(self) -> Any:
        """Compiles the evaluation step, once."""
        with self.compiling("evaluation"):
            self._step = compile_eval(self.setup, self.rows)
        return self._step

    def held_out(self, state: State) -> dict[str, float]:
        """Loss, perplexity and metrics over the held-out examples; empty when there are none."""
        examples = held_out_examples(self.setup)
        if not len(examples):
            return {}
        step = self._step or self.compile()
        s, total = self.setup, None
        packing = s.run.loader.packing if layout_of(s.run.objective).packs else "none"
        rows: list[dict[str, np.ndarray]] = []
        for batch in eval_batches(examples, self.rows, s.batches.length, packing=packing):
            placed = jax.device_put(batch, s.placement.batch(0))
            out = step(state, s.frozen, placed)
            rows.append(jax.device_get(out.pop("rows")))
            total = out if total is None else jax.tree.map(jnp.add, total, out)
        numbers = _summary(
            jax.device_get(total), {k: float(v) for k, v in s.run.objective.coefficients().items()}, tokens=s.has_tokens
        )
        together = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
        # some metrics need what a batch has no room for: names of classes, texts
        examine = getattr(s.run.objective, "examine", None)
        return numbers | (examine(together, examples) if examine else s.run.objective.summary(together))

    def answers(self, state: State) -> tuple[list[Answer], dict[str, float]]:
        """Answers to the fixed held-out prompts, and the task's metrics over them."""
        s, e = self.setup, self.setup.run.evaluate
        wanted = max(e.generate, e.metric_examples if s.run.data.metrics else 0)
        speaks = s.model.head.kind in ("causal_lm", "seq2seq_lm")
        prompts: list[Prompt] = s.run.data.prompts(wanted) if wanted and speaks else []
        if not prompts:
            return [], {}
        ids = [encode_prompt(p.prompt, s.tokenizer, s.data.template, end=s.model.reads_apart) for p in prompts]
        size = s.model.context
        kept = [(p, i) for p, i in zip(prompts, ids, strict=True) if size is None or len(i) <= size - e.max_new_tokens]
        sampling = Sampling(max_new_tokens=e.max_new_tokens)
        tokens = generate_ids(s.model, self.policy(state), s.tokenizer, [i for _, i in kept], sampling)
        texts = [completion(s.tokenizer, continued(s.model, i), t) for (_, i), t in zip(kept, tokens, strict=True)]
        found = [Answer(shown(p.prompt), t, p.reference) for (p, _), t in zip(kept, texts, strict=True)]
        measured = found[: e.metric_examples]
        values = scores(s.run.data.metrics, [a.completion for a in measured], [a.reference for a in measured])
        return found[: e.generate], values

    def policy(self, state: State) -> params.Store:
        """The present model's parameters, adapters in place."""
        store = self.setup.store(state)
        return bind(store["base"], store["overlay"])


def shown(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text, conversations turn by turn."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _summary(host: Any, coef: dict[str, float], *, tokens: bool) -> dict[str, float]:
    means = {k: float(v) / float(w) if float(w) else math.nan for k, (v, w) in host["terms"].items()}
    loss = sum(coef[k] * v for k, v in means.items())
    extra = {
        k: float(v) / float(w) if float(w) else math.nan for k, (v, w) in host["metrics"].items() if k != "num_tokens"
    }
    perplexity = {"perplexity": math.exp(min(means["nll"], 700.0))} if tokens else {}
    counted = {k: float(host["metrics"][k][0]) for k in ("num_tokens",) if k in host["metrics"]}
    return {"loss": loss, **perplexity, **extra, **counted}


def export(setup: Setup, state: State, folder: Path, *, card: str) -> Path:
    """Writes what was trained: the adapter as a PEFT folder, or the whole model when the base itself was trained.

    Args:
      setup: the run.
      state: what to export.
      folder: the run folder; "adapter" or "model" is written in it.
      card: text of its README.md.
    """
    store = jax.device_get(setup.store(state))
    run = setup.run
    if setup.adapted:
        target = folder / "adapter"
        trained = {k: store["base"][k] for k, v in setup.state.trainable["base"].items() if jax.tree.leaves(v)}
        save_adapter(
            target, params.join(store["overlay"]), setup.model.table, run.peft, base_path=run.model.label, card=card,
            task_type=TASK_TYPES.get(setup.model.head.kind), saved=params.join(trained),
        )  # fmt: skip
        return target
    return write_model(setup, params.join(unpack_store(store["base"])), folder / "model", card=card)


def write_model(setup: Setup, store: params.Store, folder: Path, *, card: str) -> Path:
    """Writes a plain model folder with tokenizer and card."""
    dtype = jnp.dtype(setup.run.model.dtype)
    beside = getattr(setup.run.model, "folder", None) if setup.tokenizer is None else None  # how images are normalised
    hf.save(setup.model, {k: np.asarray(v).astype(dtype) for k, v in store.items()}, folder, tokenizer_from=beside)
    if setup.tokenizer is not None:
        setup.tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def merged(setup: Setup, state: State) -> params.Store:
    """The run's weights with its adapter folded in."""
    store = setup.store(state)
    return merge(bind(store["base"], store["overlay"]), setup.model.table)
