"""Several tasks in one run: each with its own data, objective, head and metrics, over one shared model.

loss = sum_k w_k p_k L_k,   L_k the task's own loss over its rows of the step, p_k its exact share of the mixture

    objective=MultiTask(tasks=(
        SubTask(name="intent", data=Local(path="intent.csv"), objective=Classification()),
        SubTask(name="tone", data=Local(path="tone.csv"), objective=Classification(), weight=0.5),
        SubTask(name="text", data=Local(path="notes.txt"), objective=CausalLM()),
    ), weighting=PCGrad())
    data=Tasks(mixing="temperature", temperature=2.0)

A batch holds a sub-batch of each task (`ftjax.data.together`). Metrics carry the task's name: ``intent/accuracy``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.together import TaskBatch
from ftjax.headspec import VOCABULARY, HeadSpec
from ftjax.objectives.base import LossOutput, Policy
from ftjax.registry import get, register
from ftjax.schema import Component, Default, Slot


class SubTask(Component):
    """One of the tasks."""

    name: str = Field(pattern=r"^\w[\w-]*$", description="Name of the task, in metrics and folders.")
    data: Annotated[Any, Slot("data"), Field(description="Its data set.")] = Default("data", "stdlib_docs")
    objective: Annotated[Any, Slot("objective"), Field(description="Its loss.")] = Default("objective", "causal_lm")
    weight: float = Field(default=1.0, gt=0, description="Factor of its loss, beside its share of the mixture.")
    share: float = Field(
        default=1.0, gt=0, description="data.mixing=fixed: its part of the mixture, over the sum of all."
    )
    train: bool = Field(default=True, description="False: only evaluated, to see what transfers.")
    head: str = Field(default="", description="Task whose head it uses (of the same labels); empty: its own.")

    @property
    def factor(self) -> float:
        """Of its loss in the step."""
        return self.weight * self.share


def _defaults() -> tuple[SubTask, ...]:
    return tuple(SubTask(name=name, data=get("data", f"stdlib_{name}")()) for name in ("docs", "text"))


@register("objective")
class MultiTask(Component):
    """Several objectives at once, each over data and a head of its own."""

    batch: ClassVar[type] = TaskBatch
    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)
    """Those of the default tasks; the tasks of a run say their own."""

    name: Literal["multi_task"] = "multi_task"
    tasks: tuple[SubTask, ...] = Field(default_factory=_defaults, min_length=1, description="The tasks.")
    weighting: Annotated[Any, Slot("weighting"), Field(description="How their gradients are combined.")] = Default(
        "weighting", "static"
    )

    @property
    def needs_reference(self) -> bool:
        """Whether one of the objectives does."""
        return any(t.objective.needs_reference for t in self.tasks)

    @property
    def trained(self) -> tuple[SubTask, ...]:
        """The tasks that are trained, in order."""
        return tuple(t for t in self.tasks if t.train)

    def named(self, name: str) -> SubTask:
        """A task by name."""
        return next(t for t in self.tasks if t.name == name)

    def head(self, labels: tuple[str, ...], problem: str = "") -> HeadSpec:
        """The first task's; a run builds one for each (`ftjax.models.several`)."""
        return self.tasks[0].objective.head(labels, problem)

    def inputs(self, batch: TaskBatch) -> dict[str, jax.Array]:
        """What the policy is called with for the first task of the batch."""
        name, part = next(iter(batch.parts.items()))
        return self.named(name).objective.inputs(part)

    def coefficients(self) -> dict[str, float]:
        """Every term of every trained task, by weight and share."""
        return {f"{t.name}/{k}": t.factor * v for t in self.trained for k, v in t.objective.coefficients().items()}

    def hyper(self) -> dict[str, float]:
        """The numbers of each objective, under the task's name."""
        return {f"{t.name}/{k}": v for t in self.tasks for k, v in t.objective.hyper().items()}

    def weights(self, batch: TaskBatch) -> dict[str, jax.Array]:
        """Denominators of every task in the batch."""
        found = {n: self.named(n).objective.weights(part) for n, part in batch.parts.items()}
        return {f"{n}/{k}": w for n, each in found.items() for k, w in each.items()}

    def __call__(self, policy: Policy, batch: TaskBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Each objective over its own part of the batch, through its own head."""
        sums, metrics, rows, tokens = {}, {}, {}, jnp.float32(0)
        for name, part in batch.parts.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in hyper.items() if k.startswith(f"{name}/")}
            out = self.named(name).objective(
                partial(policy, task=name), part, reference=reference and partial(reference, task=name),
                mutable=mutable, hyper={**hyper, **own},
            )  # fmt: skip
            mutable = out.mutable
            sums |= {f"{name}/{k}": v for k, v in out.sums.items()}
            rows |= {f"{name}/{k}": v for k, v in out.rows.items()}
            metrics |= {f"{name}/{k}": v for k, v in out.metrics.items()}
            tokens = tokens + out.metrics["num_tokens"][0] if "num_tokens" in out.metrics else tokens
        return LossOutput(sums, mutable, metrics | {"num_tokens": (tokens, jnp.float32(1))}, rows)

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Nothing over all tasks: each is evaluated by itself."""
        return {}

    # Combining the tasks' gradients --------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """State of the weighting before the first step."""
        return self.weighting.start(len(self.trained))

    def scaled(self, coef: dict[str, jax.Array], state: dict[str, Any]) -> dict[str, jax.Array]:
        """The coefficients of a step, scales of the weighting included."""
        scales = self.weighting.scales(state)
        if scales is None:
            return coef
        place = {t.name: i for i, t in enumerate(self.trained)}
        return {k: v * scales[place[k.split("/", 1)[0]]] for k, v in coef.items()}

    def losses(self, coef: dict[str, jax.Array], means: dict[str, jax.Array]) -> jax.Array:
        """L_k [K] of the trained tasks, without weights and shares, from the plain coefficients and each term's mean."""
        each = [
            jnp.stack([coef[k] * v for k, v in means.items() if k.startswith(f"{t.name}/")]).sum() / t.factor
            for t in self.trained
        ]
        return jnp.stack(each)

    def apart(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """A gradient function of a batch made one of [K, ...] gradients, one per task.

        Tasks have rows of their own, so K backward passes over one task each cost what one over all does.
        """

        def each(trainable: Any, mutable: Any, batch: TaskBatch, rng: jax.Array) -> Any:
            values, found, grads = [], [], []
            for t in self.trained:
                (value, out), g = gradient(trainable, mutable, TaskBatch({t.name: batch.parts[t.name]}), rng)
                mutable = out.mutable
                values, found, grads = [*values, value], [*found, out], [*grads, g]
            tokens = jnp.stack([o.metrics["num_tokens"][0] for o in found]).sum()
            sums = {k: v for o in found for k, v in o.sums.items()}
            metrics = {k: v for o in found for k, v in o.metrics.items()} | {"num_tokens": (tokens, jnp.float32(1))}
            out = LossOutput(sums, mutable, metrics)
            return (jnp.stack(values).sum(), out), jax.tree.map(lambda *x: jnp.stack(x), *grads)

        return each

    # Problems ------------------------------------------------------------------------------------------------------------

    def check(self, run: Any) -> Iterator[str]:
        """Tasks that cannot be trained together."""
        if run.objective is not self:
            yield "objective.tasks  a task cannot itself be multi_task"
            return
        if run.data.name != "tasks":
            yield f"objective=multi_task, data={run.data.name}  every task has data of its own: set data=tasks"
        if run.model.tokenizer is None:
            yield f"objective=multi_task, model={run.model.name}  needs a tokenizer: set model.tokenizer_path"
        counts = Counter(t.name for t in self.tasks)
        yield from (f"objective.tasks  {n} tasks are called {name!r}" for name, n in counts.items() if n > 1)
        if not self.trained:
            yield "objective.tasks  no task is trained: all have train=false"
        if len(self.trained) > run.train.batch:
            yield (
                f"train.batch={run.train.batch}, objective.tasks  {len(self.trained)} tasks are trained and each has "
                "at least one row in a step"
            )
        for i, task in enumerate(self.tasks):
            yield from (f"objective.tasks.{i}.{text}" for text in self._problems(task))
        kinds = {t.objective.heads[0] for t in self.tasks} & set(VOCABULARY)
        if len(kinds) > 1:
            yield f"objective.tasks  the model has one vocabulary head, not {' and '.join(sorted(kinds))}"

    def _problems(self, task: SubTask) -> Iterator[str]:
        if task.data.name == "tasks":
            yield "data=tasks  a task needs a data set of its own"
        if hasattr(task.objective, "teacher"):
            yield f"objective={task.objective.name}  a teacher is not supported beside other tasks"
        if task.objective.name == self.name:
            return
        own = not task.head or task.head == task.name
        if not task.train and own and not HeadSpec(task.objective.heads[0]).is_vocabulary:
            yield f"train=False  task {task.name!r} would be evaluated on a head that nobody trains: name another's in head"
        if not own:
            other = next((t for t in self.tasks if t.name == task.head), None)
            if other is None:
                yield f"head={task.head}  no such task. Tasks: {', '.join(t.name for t in self.tasks)}"
            elif other.head or not other.train or other.objective.heads != task.objective.heads:
                yield f"head={task.head}  is no trained head of its own, or of another kind"
