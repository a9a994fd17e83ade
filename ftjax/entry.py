"""Bodies of the verbs that need JAX: train, check, eval, generate, merge, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ftjax import api
from ftjax.config import Run
from ftjax.configfile import load
from ftjax.data.templates import resolve_template
from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError, did_you_mean
from ftjax.evals.request import Evaluation, Measured, asks, requested
from ftjax.generate.api import stream
from ftjax.generate.sampling import Sampling
from ftjax.models.sources import source_of
from ftjax.options import FolderArgs, GenerateArgs, ModelArgs, SoupArgs
from ftjax.params import Store, join
from ftjax.quant.base import bits_per_parameter
from ftjax.regimes.ensemble import ensemble as ensemble_of
from ftjax.regimes.fit import card_of, compiled_step, introduce, restored_state
from ftjax.regimes.soup import soup as make_soup
from ftjax.report.console import Console
from ftjax.train import recorded
from ftjax.train.averaged import averaged, described
from ftjax.train.metrics import read_lines
from ftjax.train.reference import known
from ftjax.train.runfolder import RunFolder
from ftjax.train.session import Evaluator, export, merged, write_model
from ftjax.train.setup import Setup, prepare
from ftjax.train.state import State


def train(run: Run, allow_change: tuple[str, ...]) -> int:
    """Trains or resumes."""
    return run.regime.train(run, allow=allow_change)


def check(run: Run) -> int:
    """The dry run: everything up to the first step, compiled memory included; leaves no run folder behind."""
    console = Console()
    console.header(run)
    setup = prepare(run, say=console.note)
    introduce(setup, console)
    compiled_step(setup, console)
    console.note("nothing was trained; the same command without `check` trains")
    return 0


def _open(folder: Path, overrides: tuple[str, ...], console: Console) -> tuple[Setup, State, int]:
    """A run folder's setup and the state it would export, its weights as they were trained."""
    run = load(folder / "config.json", [*overrides, f"out={folder}"])
    setup = prepare(run, say=console.note)
    state, step = restored_state(setup, RunFolder(folder, message=console.note), console.warn)
    console.note(f"{folder}: step {step}")
    return setup, state, step


def _finished(folder: Path, console: Console) -> tuple[Setup, State, int]:
    """A run folder's setup and the state it would export, its weights averaged where it keeps an average."""
    setup, state, step = _open(folder, (), console)
    state = averaged(setup, state)
    if what := described(setup, state):
        console.note(what)
    return setup, state, step


def evaluate(folder: Path, overrides: tuple[str, ...], task: str = "") -> int:
    """Held-out numbers of a run's best (or last) checkpoint; or another evaluation (``evals=NAME``) of what it exported."""
    console = Console()
    if asks(overrides):
        return _measure(folder, requested(overrides), console, task)
    if task:
        raise ConfigError(f"eval: --task {task}  is for evals=NAME; without it every task of the run is evaluated")
    setup, state, step = _open(folder, overrides, console)
    setup = recorded.known(known(setup, say=console.note), say=console.note)
    evaluator = Evaluator(setup, console.compiling)
    seen = averaged(setup, state)
    numbers = evaluator.compared(seen, state)
    answers, metrics = evaluator.answers(seen)
    console.evaluation(step, numbers | metrics)
    console.samples([], answers)
    return 0


def ensemble(folders: tuple[Path, ...], overrides: tuple[str, ...]) -> int:
    """Held-out numbers of several runs and of their ensembles."""
    if asks(overrides):
        raise ConfigError("eval: evals=NAME is of one run; give --run DIR")
    return ensemble_of(folders, overrides)


def _measure(folder: Path, evaluation: Evaluation, console: Console, task: str) -> int:
    """Evaluates what a run exported, adapter unmerged; prints a table and leaves a JSON file in the run folder."""
    model, params, tokenizer = _model_for(GenerateArgs(prompt="", run=folder, task=task))
    run = load(folder / "config.json")
    name = speaking(run, folder, task)
    named = (run.objective.named(name) if name else run).data.chat_template
    measured = evaluation.measure(
        model, params, tokenizer, template=resolve_template(tokenizer, named) if named else ""
    )
    _told(measured, folder / "evals" / f"{evaluation.label}{f'-{name}' if name else ''}.json", console)
    return 0


def evaluate_model(args: ModelArgs, words: tuple[str, ...]) -> int:
    """Evaluates a model that is no run, e.g. the base that runs are compared with."""
    console, evaluation = Console(), requested(words)
    model, params, tokenizer = _model_for(GenerateArgs(prompt="", model=args.model, adapter=args.adapter))
    _told(evaluation.measure(model, params, tokenizer, template=""), args.to, console)
    return 0


def _told(measured: Measured, target: Path | None, console: Console) -> None:
    """Prints a table, and writes all numbers where there is a place for them."""
    console.note(measured.table)
    if target is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(measured.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.where({"numbers": target})


def generate(args: GenerateArgs) -> int:
    """Streams the answer to one prompt."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.stop, args.seed)
    model, params, tokenizer = _model_for(args)
    for piece in stream(model, params, tokenizer, args.prompt, sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _model_for(args: GenerateArgs) -> tuple[Any, Store, Any]:
    """Model, parameters and tokenizer of a run folder or a model folder."""
    if args.run is None:
        assert args.model is not None
        model, params = api.load_pretrained(args.model, adapter=args.adapter)
        return model, params, load_tokenizer(args.model)
    run = load(args.run / "config.json")
    name = speaking(run, args.run, args.task)
    trained = args.run / "model" / name
    if (trained / "config.json").exists():
        return *api.load_pretrained(trained), load_tokenizer(trained)
    adapter = args.run / "adapter" / name
    if not (adapter / "adapter_config.json").exists():
        raise ConfigError(f"{args.run} holds neither an adapter nor a model yet: it has not finished training")
    base = run.model.folder
    loaded = api.load_pretrained(
        base, dtype=run.model.dtype, adapter=adapter, quantize=source_of(run, begins=False).quantize
    )
    return *loaded, load_tokenizer(base)


def speaking(run: Run, folder: Path, task: str) -> str:
    """The task of a run that answers: `task`, or the only one that can; empty where the run has no tasks.

    Raises:
      ConfigError: it predicts no text, or there are several; the text lists them.
    """
    name = _task_of(run, folder, task)
    tasks = {t.name: t.objective for t in getattr(run.objective, "tasks", ())}
    able = [n for n, o in tasks.items() if o.heads[0] in ("causal_lm", "seq2seq_lm")]
    if not tasks or name in able:
        return name
    if not name and len(able) == 1:
        return able[0]
    listed = ", ".join(f"{n} ({o.name})" for n, o in tasks.items())
    if name or not able:
        what = f"--task {name}  its objective is {tasks[name].name}" if name else f"{folder}  is a run of {listed}"
        raise ConfigError(f"{what}, which predicts no text. Tasks that do: {', '.join(able) or 'none'}")
    raise ConfigError(f"--task  is missing: {len(able)} tasks of {folder} answer: {', '.join(able)}")


def _task_of(run: Run, folder: Path, task: str) -> str:
    """The name of a task, which may be empty.

    Raises:
      ConfigError: the run has no such task.
    """
    names = [t.name for t in getattr(run.objective, "tasks", ())]
    if task and task not in names:
        known = f"Tasks: {', '.join(names)}" if names else "It has one task; leave --task out"
        raise ConfigError(f"--task {task}  is no task of {folder}.{did_you_mean(task, names)} {known}")
    return task


def merge(args: FolderArgs) -> int:
    """Writes a run's model with its adapter folded in."""
    console = Console()
    _task_of(load(args.run / "config.json"), args.run, args.task)
    setup, state, step = _finished(args.run, console)
    _refuse_full(args.to)
    if bits := bits_per_parameter(setup.store(state)["base"]):
        console.note(
            f"the base is quantized ({bits:.2f} bits per parameter): its kernels are dequantized and the adapter is added "
            f"in float32. The result is a plain {setup.run.model.dtype} model, which is not quantized"
        )
    write_model(setup, join(merged(setup, state)), args.to, card=_card(setup, step, adapter=False), task=args.task)
    console.where({"model": args.to})
    return 0


def export_run(args: FolderArgs) -> int:
    """Writes what a run trained: its adapter, or its model."""
    console = Console()
    _task_of(load(args.run / "config.json"), args.run, args.task)
    setup, state, step = _finished(args.run, console)
    _refuse_full(args.to)
    card = _card(setup, step, adapter=setup.adapted)
    console.where({"exported": export(setup, state, args.to, card=card, task=args.task)})
    return 0


def soup(args: SoupArgs) -> int:
    """Averages the weights of several runs."""
    return make_soup(args.runs, args.to, how=args.how, lora=args.lora)


def _card(setup: Setup, step: int, *, adapter: bool) -> str:
    """The README.md of what is written, with the held-out numbers that the run has logged."""
    lines = read_lines(RunFolder(setup.run.folder).metrics)
    found = {r["step"]: r for r in lines if r["event"] == "eval"}
    return card_of(setup, step, found.get(0, {}), found.get(step, {}), adapter=adapter)


def _refuse_full(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; nothing is overwritten")
