"""From a config to everything a run needs: tokenizer, data, model, adapter, labels, mesh, compiled step.

    setup = prepare(run, say=console)
    compiled = compile_train(setup, console)
    state, metrics = compiled(setup.state, setup.frozen, batch)

Every problem that can be found before compiling is found here.
"""

from __future__ import annotations

import dataclasses as dc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import config, params
from ftjax.data.batches import Examples
from ftjax.data.layouts import layout_of
from ftjax.data.pipeline import Batches, row_length
from ftjax.data.prepare import Prepared
from ftjax.data.prepare import prepare as prepare_data
from ftjax.data.together import PreparedTasks, TaskBatch, TaskBatches, loader_for, prepare_tasks
from ftjax.data.tokenizer import check_vocab, load_tokenizer
from ftjax.errors import ConfigError
from ftjax.models.base import Numerics
from ftjax.models.several import TaskHead, load_several
from ftjax.models.sources import source_of
from ftjax.models.transformer import Decoder
from ftjax.parallel.mesh import Placement, axes_of_store, check_batch, make_mesh, start_distributed
from ftjax.peft.base import Overlay, cut_for, with_head
from ftjax.peft.earlier import start_from
from ftjax.train import recorded, reference
from ftjax.train.average import start as start_average
from ftjax.train.fisher import fisher, rules_for
from ftjax.train.optimizer import OptimSpec, decay_groups, hyper_of, make_tx
from ftjax.train.state import Frozen, Parts, State, initial, kinds_of, partition, whole
from ftjax.train.step import Program
from ftjax.train.teacher import load_teacher


@dc.dataclass(frozen=True)
class View:
    """What one task's evaluation needs.

    Attributes:
      name: of the task; empty when the run has only one.
      objective: its loss.
      task: its data set.
      prepared: its examples.
      length: T.
    """

    name: str
    objective: Any
    task: Any
    prepared: Prepared
    length: int

    @property
    def prefix(self) -> str:
        """What its metrics begin with."""
        return f"{self.name}/" if self.name else ""

    def batch(self, part: Any) -> Any:
        """Its batch as the program takes it."""
        return TaskBatch({self.name: part}) if self.name else part


@dc.dataclass(frozen=True)
class Setup:
    """A run, ready to compile.

    Attributes:
      run: the config.
      tokenizer: of the data and of generation.
      data: encoded examples and what is known of them.
      batches: training batches in order, resumable.
      model: architecture with numerics.
      parts: the labelled store, split.
      program: pure step functions.
      placement: shardings.
      state: before the first step, placed.
      frozen: placed.
      warnings: for the user.
      asked: a teacher that is asked once, and its weights, until it has been (see `ftjax.train.recorded`).
    """

    run: config.Run
    tokenizer: Any
    data: Prepared
    batches: Batches
    model: Decoder
    parts: Parts
    program: Program
    placement: Placement
    state: State
    frozen: Frozen
    warnings: tuple[str, ...]
    asked: tuple[Any, Any] | None = None

    @property
    def adapted(self) -> bool:
        """Whether the result is an adapter: an overlay, or weights of the base for which the method's file has a place."""
        codec = getattr(self.run.peft, "hf_codec", None)
        overlay = jax.tree.leaves(self.state.trainable["overlay"])
        return bool(overlay) or (codec is not None and codec.holds_base(self.model.table))

    @property
    def has_tokens(self) -> bool:
        """Whether the loss is one of predicting tokens, whose exponential is a perplexity."""
        return "nll" in self.run.objective.coefficients()

    @property
    def views(self) -> tuple[View, ...]:
        """What is evaluated: the run's data, or those of each task, also of tasks that are not trained."""
        o, d = self.run.objective, self.data
        if not isinstance(d, PreparedTasks):
            return (View("", o, self.run.data, d, self.batches.length),)
        lengths = self.batches.lengths  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(View(t.name, t.objective, t.data, d.parts[t.name], lengths[t.name]) for t in o.tasks)

    def store(self, state: State) -> dict[str, Any]:
        """The whole store with the trained leaves of `state`."""
        return whole(state, self.frozen.store, state.mutable)


def numerics(compute: config.Compute) -> Numerics:
    """The part of `compute` that a model reads."""
    return Numerics(
        compute.dtype, compute.layers, compute.remat, compute.attention, compute.loss_chunk, compute.batch_norm
    )


def use_cache(compute: config.Compute) -> None:
    """Turns on the persistent compilation cache, unless the environment names one already (oneDNN's programs do not fit it)."""
    if compute.cache and not compute.onednn and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(compute.cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def tokenizer_of(run: config.Run, folder: Path) -> Any:
    """The run's tokenizer: the model's own, or one trained on the data and kept in the run folder."""
    source = run.model.tokenizer
    if source is not None:
        return load_tokenizer(source)
    own = folder / "tokenizer"
    if not (own / "tokenizer.json").exists():
        from ftjax.data.new_tokenizer import train_tokenizer

        train_tokenizer(run.model.tokenizer_kind, run.data.examples("train"), run.model.vocab, own)
    return load_tokenizer(own)


def prepare(run: config.Run, *, say: Callable[[str], None]) -> Setup:
    """Builds everything up to compilation.

    Raises:
      FtjaxError: whatever in the config, data, weights or devices does not fit.
    """
    start_distributed(run.compute)
    use_cache(run.compute)
    mesh = make_mesh(run.mesh, jax.devices())
    check_batch(mesh, run.train.batch, run.train.accumulate)
    several = hasattr(run.objective, "tasks")
    tokens = any(layout_of(t.objective).tokens for t in (run.objective.tasks if several else (run,)))
    tokenizer = tokenizer_of(run, run.folder) if tokens else None
    for line in getattr(run.data, "describe", list)():
        say(line)
    data: Any
    model: Any  # a family's, or several heads on one
    run, data, batches = (read_tasks if several else read_data)(run, tokenizer, mesh)
    say("loading the model")
    notes: list[str] = []
    vocab = len(tokenizer) if tokenizer else 0
    loading: Any = dict(seed=run.seed, vocab=vocab, say=notes.append)
    if several:
        model, base = load_several(run.model, numerics(run.compute), task_heads(run.objective, data), **loading)
    else:
        head = run.objective.head(data.labels, data.problem)
        model, base = source_of(run).load(numerics(run.compute), head=head, **loading)
    with recorded.where(run):
        teacher, known = load_teacher(run, model, tokenizer, numerics(run.compute), say=notes.append)
    warnings = (*data.warnings, *notes, *(check_vocab(tokenizer, model.config.vocab_size) if tokenizer else ()))
    rng = params.key_of(jax.random.key(run.seed), "objective")
    own = run.objective.learned(model, teacher, rng) if hasattr(run.objective, "learned") else {}
    overlay = first_overlay(run, model, base, own, mesh, batches, (teacher, known), tokenizer)
    if earlier := getattr(run.model, "adapter", ""):
        base, overlay = start_from(earlier, run.peft, overlay, model.table, base, base_path=run.model.label)
    check_prompts(run.peft, data.train)
    check_places(model, overlay, data.train, data.eval)
    check_places(teacher, {}, data.train, data.eval)
    (teacher, known), asked = recorded.apart(run, model, teacher, known)
    base = cut_for(base, overlay, run.peft, model.table)
    rules = with_head(run.peft.labels(model.table), model.always_trained)
    parts = partition(base, overlay, model.table, rules, own)
    store = {"base": base, "overlay": overlay}
    axes = axes_of_store(store, model.table)
    axes |= axes_of_store({"teacher": known}, teacher.table) if teacher and known else {}
    placement = Placement(mesh, axes)
    warnings += tuple(f"not split over the mesh: {line}" for line in placement.idle({**store, "teacher": known})[:3])
    program, state, frozen = assemble(run, model, parts, teacher, known)
    return Setup(
        run, tokenizer, data, batches, model, parts, program, placement,
        jax.device_put(state, placement.tree(state)), jax.device_put(frozen, placement.tree(frozen)), warnings, asked,
    )  # fmt: skip


def first_overlay(
    run: config.Run,
    model: Any,
    base: params.Store,
    own: params.Store,
    mesh: Any,
    batches: Any,
    teacher: tuple[Any, Any],
    tokenizer: Any,
) -> Overlay:
    """The overlay at step 0, by a text's tokens or by what the first batches ask of the weights where a method wants these."""
    key, count = params.key_of(jax.random.key(run.seed), "peft"), getattr(run.peft, "batches_for_start", 0)
    if text := getattr(run.peft, "text_for_start", ""):
        return run.peft.init(key, model.table, base, ids=tokenizer(text)["input_ids"])
    if not count:
        return run.peft.init(key, model.table, base)
    parts = partition(base, {}, model.table, rules_for(run.peft, model.table, base), own)
    plain = config.Optim(name="sgd", b1=0.0)  # nothing is updated: no moments
    program, state, frozen = assemble(run.model_copy(update={"optim": plain}), model, parts, *teacher)
    placement = Placement(mesh, axes_of_store({"base": base, "overlay": {}}, model.table))
    squares = fisher(program, state, frozen, batches.source, count, placement)
    return run.peft.init(key, model.table, base, squares=squares)


def read_data(run: config.Run, tokenizer: Any, mesh: Any) -> tuple[config.Run, Prepared, Batches]:
    """The run's one data set and its batches."""
    layout = layout_of(run.objective)
    data = prepare_data(
        run.data, run.loader, tokenizer, seed=run.seed, layout=layout,
        options=getattr(run.objective, "data_options", dict)(),
    )  # fmt: skip
    data = reference.awaited(data) if reference.wanted(run) else data
    data = recorded.awaited(run, data)
    return run, data, batches_of(run, data)


def batches_of(run: config.Run, data: Prepared) -> Batches:
    """The training batches of a run's one data set."""
    loader = loader_for(run.loader, run.objective)
    return Batches(
        data.train, loader=loader, batch=run.train.batch, accumulate=run.train.accumulate, seed=run.seed,
        length=row_length(loader, data.train, data.eval),
        fingerprint=data.fingerprint, shard=(jax.process_index(), jax.process_count()),
    )  # fmt: skip


def read_tasks(run: config.Run, tokenizer: Any, mesh: Any) -> tuple[config.Run, PreparedTasks, TaskBatches]:
    """The data of several tasks, their batches, and the run with each task's exact share of the mixture."""
    tasks = run.objective.tasks
    data = prepare_tasks(tasks, run.data, run.loader, tokenizer, seed=run.seed)
    batches = TaskBatches(
        data, {t.name: t.objective for t in tasks}, loader=run.loader, batch=run.train.batch,
        accumulate=run.train.accumulate, seed=run.seed, ways=mesh.shape["data"] * mesh.shape["fsdp"],
        shard=(jax.process_index(), jax.process_count()),
    )  # fmt: skip
    shared = tuple(t.model_copy(update={"share": data.shares.get(t.name, t.share)}) for t in tasks)
    objective = run.objective.model_copy(update={"tasks": shared})
    return run.model_copy(update={"objective": objective}), data, batches


def task_heads(objective: Any, data: PreparedTasks) -> tuple[TaskHead, ...]:
    """The head of every task, by its labels."""
    made = [(t, t.objective.head(data.parts[t.name].labels, data.parts[t.name].problem)) for t in objective.tasks]
    return tuple(TaskHead(t.name, spec, t.head or t.name) for t, spec in made)


def check_prompts(method: Any, examples: Any) -> None:
    """A method that edits the prompt alone learns nothing from texts that have none.

    Raises:
      ConfigError: all tokens of all examples are trained, but for the first, which never is.
    """
    editing = [m.name for m in getattr(method, "methods", (method,)) if getattr(m, "edits_prompts", False)]
    if not editing or not isinstance(examples, Examples):
        return
    second = examples.offsets[:-1] + 1
    if (examples.weights[second[examples.lengths > 1]] > 0).all():
        raise ConfigError(
            f"peft={editing[0]} edits hidden values of prompts, and the data have none: every token is trained. Use data of "
            "prompts and completions, peft.positions=all, or another method"
        )


def check_places(model: Any, overlay: Overlay, *parts: Any) -> None:
    """Learned positions end: a gather beyond them would take the last one for every token, and say nothing.

    Raises:
      ConfigError: an example of `parts` is longer than the positions that the model learned.
    """
    room = getattr(model, "places", None)
    if room is None:
        return
    room -= getattr(overlay.get("input/tap"), "shift", 0)
    longest = max((int(p.lengths.max()) for p in parts if len(p)), default=0)
    if longest > room:
        raise ConfigError(
            f"the longest example has {longest:,} tokens, but {model.family} learned positions for {model.places:,}"
            + (f", of which virtual tokens take {model.places - room}" if room < model.places else "")
            + f". Set loader.max_length={room} or less"
        )


def assemble(
    run: config.Run, model: Decoder, parts: Parts, teacher: Any = None, known: Any = None
) -> tuple[Program, State, Frozen]:
    """The step functions and the state before the first step; with a teacher and its weights where there is one."""
    spec, hyper = OptimSpec.of(run.optim, run.peft), hyper_of(run)
    groups = decay_groups(parts.groups, kinds_of(parts.trainable, model.table))
    rng = params.key_of(jax.random.key(run.seed), "train")
    state = initial(parts, make_tx(spec, groups, hyper, jnp.int32(0)), rng=rng, mutable=parts.mutable, hyper=hyper)
    first = start_average(spec.average, state.trainable)
    state = dc.replace(state, weighting=getattr(run.objective, "start", dict)(), average=first)
    # A real copy for the reference: it may not share buffers with what the step is given to consume.
    past = (parts.trainable, parts.mutable) if run.objective.needs_reference else (None, None)
    frozen = Frozen(parts.frozen, *jax.tree.map(jnp.copy, past), teacher=known)
    return Program(model, run.objective, spec, groups, teacher), state, frozen


# Compilation -----------------------------------------------------------------------------------------------------------


def abstract_batch(setup: Setup) -> Any:
    """Shapes of one step's batch, [M, B, ...] leaves."""
    M = setup.run.train.accumulate
    one = setup.batches.source.empty()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((M, *x.shape), x.dtype), one)


def compile_train(setup: Setup) -> Any:
    """The compiled train step ``(state, frozen, batch) -> (state, metrics)``; the state is donated."""
    p = setup.placement
    states, frozen = p.tree(setup.state), p.tree(setup.frozen)
    batch = jax.tree.map(lambda _: p.batch(1), abstract_batch(setup))
    step = jax.jit(
        setup.program.train,
        donate_argnums=0,
        in_shardings=(states, frozen, batch),
        out_shardings=(states, p.replicated),
    )
    return step.lower(setup.state, setup.frozen, abstract_batch(setup)).compile()


def compile_eval(setup: Setup, rows: int, view: View | None = None) -> Any:
    """The compiled evaluation ``(state, frozen, batch [rows, T]) -> metrics``, of one task where there are several."""
    p, view = setup.placement, view or setup.views[0]
    empty = view.batch(view.prepared.train.build([], view.length, count=rows))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty)
    placed = jax.tree.map(lambda _: p.batch(0), batch)
    step = jax.jit(
        setup.program.evaluate,
        in_shardings=(p.tree(setup.state), p.tree(setup.frozen), placed),
        out_shardings=p.replicated,
    )
    return step.lower(setup.state, setup.frozen, batch).compile()
