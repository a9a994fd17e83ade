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
from ftjax.evals.choices import NORMS, prompt_scores
from ftjax.evals.text import scores
from ftjax.generate.api import completion, continued, generate_ids
from ftjax.generate.sampling import Sampling
from ftjax.models import hf
from ftjax.models.several import views
from ftjax.peft.base import bind, merge
from ftjax.peft.interop import TASK_TYPES, save_adapter
from ftjax.quant.base import unpack_store
from ftjax.train.setup import Setup, View, compile_eval
from ftjax.train.state import State


@dc.dataclass(frozen=True)
class Answer:
    """A fixed prompt with what the model said and what was expected."""

    prompt: str
    completion: str
    reference: str


def held_out_examples(setup: Setup, view: View | None = None) -> Any:
    """The held-out examples that are used (of a task): all, or the same `evaluate.examples` every time."""
    examples, limit = (view or setup.views[0]).prepared.eval, setup.run.evaluate.examples
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
    _steps: dict[str, Any] = dc.field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows per evaluation batch: as many as a micro-batch."""
        return self.setup.run.train.batch // self.setup.run.train.accumulate

    def compile(self, view: View) -> Any:
        """Compiles the evaluation step of a task, once."""
        with self.compiling(" ".join(filter(None, ("evaluation", view.name)))):
            self._steps[view.name] = compile_eval(self.setup, self.rows, view)
        return self._steps[view.name]

    def held_out(self, state: State) -> dict[str, float]:
        """Loss, perplexity and metrics over the held-out examples; empty when there are none.

        Of several tasks each has its own under its name; "loss" is that of the trained ones that have any, by weight and share.
        """
        found: dict[str, float] = {}
        whole: list[float] = []
        factors = {t.name: t.factor for t in getattr(self.setup.run.objective, "trained", ())}
        for view in self.setup.views:
            numbers = self._measure(state, view)
            found |= {f"{view.prefix}{k}": v for k, v in numbers.items()}
            if view.name in factors and numbers:
                whole.append(factors[view.name] * numbers["loss"])
        return found | ({"loss": sum(whole)} if whole else {})

    def compared(self, seen: State, state: State) -> dict[str, float]:
        """`held_out` of `seen`; where an average of the weights is kept, also that of the raw `state`, under "raw/"."""
        numbers = self.held_out(seen)
        raw = {} if not state.average else numbers if seen is state else self.held_out(state)
        return numbers | {f"raw/{k}": v for k, v in raw.items()}

    def _measure(self, state: State, view: View) -> dict[str, float]:
        """Loss and metrics of one task's held-out examples."""
        examples, objective = held_out_examples(self.setup, view), view.objective
        if not len(examples):
            return {}
        total, together = self._run(state, view, examples)
        host = {k: _plain(v, view.prefix) for k, v in jax.device_get(total).items()}
        coef = {k: float(v) for k, v in objective.coefficients().items()}
        numbers = _summary(host, coef, tokens="nll" in coef)
        # some metrics need what a batch has no room for: names of classes, texts
        examine = getattr(objective, "examine", None)
        numbers |= examine(together, examples) if examine else objective.summary(together)
        scored = getattr(view.task, "scored", None)  # metrics that belong to the data set
        return numbers | (scored(together) if scored else {})

    def rows_of(self, state: State, view: View) -> dict[str, np.ndarray]:
        """What the objective says of every held-out row of a task, rows that only fill a batch included."""
        return self._run(state, view, held_out_examples(self.setup, view))[1]

    def _run(self, state: State, view: View, examples: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """(sums on the device, rows) over examples."""
        step = self._steps.get(view.name) or self.compile(view)
        s, total = self.setup, None
        packing = s.run.loader.packing if layout_of(view.objective).packs else "none"
        rows: list[dict[str, np.ndarray]] = []
        for batch in eval_batches(examples, self.rows, view.length, packing=packing):
            placed = jax.device_put(view.batch(batch), s.placement.batch(0))
            out = step(state, s.frozen, placed)
            rows.append(_plain(jax.device_get(out.pop("rows")), view.prefix))
            total = out if total is None else jax.tree.map(jnp.add, total, out)
        return total, {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}

    def answers(self, state: State) -> tuple[list[Answer], dict[str, float]]:
        """Answers to the fixed held-out prompts of every task that speaks, and the tasks' metrics over them."""
        each = {v.prefix: self._answers(state, v) for v in self.setup.views}
        metrics = {f"{p}{k}": x for p, (_, found) in each.items() for k, x in found.items()}
        return [a for said, _ in each.values() for a in said], metrics

    def _answers(self, state: State, view: View) -> tuple[list[Answer], dict[str, float]]:
        s, e = self.setup, self.setup.run.evaluate
        wanted = max(e.generate, e.metric_examples if view.task.metrics else 0)
        model: Any
        model, params = s.model.view(view.name, self.policy(state))
        speaks = model.head.kind in ("causal_lm", "seq2seq_lm")
        prompts: list[Prompt] = view.task.prompts(wanted) if wanted and speaks else []
        if not prompts:
            return [], {}
        by_text = [m for m in view.task.metrics if m not in NORMS]
        by_choice = [m for m in view.task.metrics if m in NORMS]
        values = prompt_scores(by_choice, model, params, s.tokenizer, prompts[: e.metric_examples], batch=self.rows)
        prompts = prompts if by_text else prompts[: e.generate]
        ids = [encode_prompt(p.prompt, s.tokenizer, view.prepared.template, end=model.reads_apart) for p in prompts]
        size = model.context
        kept = [(p, i) for p, i in zip(prompts, ids, strict=True) if size is None or len(i) <= size - e.max_new_tokens]
        sampling = Sampling(max_new_tokens=e.max_new_tokens)
        tokens = generate_ids(model, params, s.tokenizer, [i for _, i in kept], sampling)
        texts = [completion(s.tokenizer, continued(model, i), t) for (_, i), t in zip(kept, tokens, strict=True)]
        found = [Answer(shown(p.prompt), t, p.reference) for (p, _), t in zip(kept, texts, strict=True)]
        measured = found[: e.metric_examples]
        values |= scores(by_text, [a.completion for a in measured], [a.reference for a in measured])
        return found[: e.generate], values

    def policy(self, state: State) -> params.Store:
        """The present model's parameters, adapters in place."""
        store = self.setup.store(state)
        return bind(store["base"], store["overlay"])


def shown(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text, conversations turn by turn."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _plain(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Metrics by the names that the task's own objective has for them."""
    return {k.removeprefix(prefix): v for k, v in found.items()}


def _summary(host: Any, coef: dict[str, float], *, tokens: bool) -> dict[str, float]:
    means = {k: float(v) / float(w) if float(w) else math.nan for k, (v, w) in host["terms"].items()}
    loss = sum(coef[k] * v for k, v in means.items())
    extra = {
        k: float(v) / float(w) if float(w) else math.nan for k, (v, w) in host["metrics"].items() if k != "num_tokens"
    }
    perplexity = {"perplexity": math.exp(min(means["nll"], 700.0))} if tokens else {}
    counted = {k: float(host["metrics"][k][0]) for k in ("num_tokens",) if k in host["metrics"]}
    return {"loss": loss, **perplexity, **extra, **counted}


def export(setup: Setup, state: State, folder: Path, *, card: str, task: str = "") -> Path:
    """Writes what was trained: the adapter as a PEFT folder, or the whole model when the base itself was trained.

    Of several tasks each has a folder of its own, with its head, that opens by itself as that of a run with one task.

    Args:
      setup: the run.
      state: what to export.
      folder: the run folder; "adapter" or "model" is written in it.
      card: text of its README.md.
      task: of several only this one, without a folder of its own; empty: all.
    """
    store = jax.device_get(setup.store(state))
    run = setup.run
    if setup.adapted:
        target = folder / "adapter"
        trained = {k: store["base"][k] for k, v in setup.state.trainable["base"].items() if jax.tree.leaves(v)}
        for name, (model, saved) in _chosen(views(setup.model, trained), task).items():
            save_adapter(
                target / name, params.join(store["overlay"]), model.table, run.peft, base_path=run.model.label,
                card=card, task_type=TASK_TYPES.get(model.head.kind), saved=params.join(saved),
            )  # fmt: skip
        return target
    return write_model(setup, params.join(unpack_store(store["base"])), folder / "model", card=card, task=task)


def _chosen(found: dict[str, Any], task: str) -> dict[str, Any]:
    """All of them under their names, or one without."""
    return {"": found[task]} if task else found


def write_model(setup: Setup, store: params.Store, folder: Path, *, card: str, task: str = "") -> Path:
    """Writes a plain model folder with tokenizer and card; of several tasks one for each, or `task` alone."""
    dtype = jnp.dtype(setup.run.model.dtype)
    beside = getattr(setup.run.model, "folder", None) if setup.tokenizer is None else None  # how images are normalised
    for name, (model, seen) in _chosen(views(setup.model, store), task).items():
        to = folder / name
        hf.save(model, {k: np.asarray(v).astype(dtype) for k, v in seen.items()}, to, tokenizer_from=beside)
        if setup.tokenizer is not None:
            setup.tokenizer.save_pretrained(str(to))
        (to / "README.md").write_text(card, encoding="utf-8")
    return folder


def merged(setup: Setup, state: State) -> params.Store:
    """The run's weights with its adapter folded in."""
    store = setup.store(state)
    return merge(bind(store["base"], store["overlay"]), setup.model.table)
