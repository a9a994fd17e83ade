"""Ensembles of runs over one held-out set: members and their means side by side (`ftjax.evals.ensemble`).

    python run.py eval --runs runs/a runs/b runs/c

Runs are opened one after the other, each with its own model, method and tokenizer; classifiers need the same rows with the same
labels in common, language models the very same tokens.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax.configfile import load
from ftjax.data.batches import TokenBatch
from ftjax.data.pipeline import eval_batches
from ftjax.data.recorded import RecordedBatch
from ftjax.data.seq2seq import SeqBatch
from ftjax.errors import ConfigError
from ftjax.evals import ensemble as means
from ftjax.objectives.causal_lm import shift
from ftjax.peft.base import bind
from ftjax.regimes.fit import restored_state
from ftjax.report.console import Console
from ftjax.report.grid import Grid, plain
from ftjax.report.units import number
from ftjax.train.averaged import averaged
from ftjax.train.runfolder import RunFolder
from ftjax.train.session import Evaluator, held_out_examples
from ftjax.train.setup import Setup, prepare
from ftjax.train.state import State

TARGETS: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    TokenBatch: shift, RecordedBatch: shift, SeqBatch: lambda b: (b.labels, b.weights),
}  # fmt: skip
"""(targets, weights) [B, T] of the kinds of batch whose tokens are predicted one by one."""

COLUMNS = ("accuracy", "nll", "perplexity", "ece")


@dc.dataclass(frozen=True)
class Predictions:
    """What a run says of the held-out rows.

    Attributes:
      values: logits [n, C] of classes, or negative log-likelihoods [n] of tokens.
      truth: labels or tokens [n].
      weights: [n].
    """

    values: np.ndarray
    truth: np.ndarray
    weights: np.ndarray


def ensemble(folders: Sequence[Path], overrides: Sequence[str] = ()) -> int:
    """Prints the numbers of several runs and of their ensembles; returns the exit code."""
    console = Console()
    said: dict[str, Predictions] = {}
    for folder in folders:
        run = load(folder / "config.json", [*overrides, f"out={folder}"])
        setup = prepare(run, say=console.note)
        state, step = restored_state(setup, RunFolder(folder, message=console.note), console.warn)
        console.note(f"{folder}: step {step}")
        said[str(folder)] = predictions(setup, averaged(setup, state), console)
    console.note("\n".join(plain(table_of(measured(said)))))
    return 0


def predictions(setup: Setup, state: State, console: Console) -> Predictions:
    """A run's held-out predictions.

    Raises:
      ConfigError: it has several tasks, no held-out examples, or an objective without classes or tokens.
    """
    view, run = setup.views[0], setup.run
    if view.name or not len(view.prepared.eval):
        raise ConfigError(
            f"{run.folder}: " + ("several tasks" if view.name else "no held-out examples") + " to compare"
        )
    if type(view.prepared.train.build([], view.length, count=1)) in TARGETS:
        return token_losses(setup, state)
    rows = Evaluator(setup, console.compiling).rows_of(state, view)
    if not {"logits", "labels", "weights"} <= rows.keys() or rows["labels"].ndim > 1 or rows["logits"].ndim != 2:
        raise ConfigError(f"{run.folder}: objective={run.objective.name} predicts neither one class per row nor tokens")
    real = rows["weights"] > 0
    return Predictions(rows["logits"][real], rows["labels"][real], rows["weights"][real])


def token_losses(setup: Setup, state: State) -> Predictions:
    """Negative log-likelihoods of the held-out tokens that count, without smoothing; rows are not packed."""
    view, store = setup.views[0], setup.store(state)
    bound = bind(store["base"], store["overlay"])
    rows = setup.run.train.batch // setup.run.train.accumulate

    @jax.jit
    def one(bound: Any, batch: Any) -> Any:
        targets, weights = TARGETS[type(batch)](batch)
        output = setup.model.apply(bound, view.objective.inputs(batch))
        return output.nll(targets).nll, targets, weights

    found = []
    for batch in eval_batches(held_out_examples(setup, view), rows, view.length):
        nll, targets, weights = jax.device_get(one(bound, jax.device_put(batch, setup.placement.batch(0))))
        found.append((nll[weights > 0], targets[weights > 0], weights[weights > 0]))
    return Predictions(*(np.concatenate(x) for x in zip(*found, strict=True)))


def measured(said: dict[str, Predictions]) -> dict[str, dict[str, float]]:
    """The numbers of members and ensembles.

    Raises:
      ConfigError: the members were not asked about the same things.
    """
    names = list(said)
    first = said[names[0]]
    for name in names[1:]:
        other = said[name]
        if other.values.shape[1:] != first.values.shape[1:]:
            raise ConfigError(f"{name} predicts {_kind(other)}, but {names[0]} {_kind(first)}")
        if not np.array_equal(other.truth, first.truth):
            raise ConfigError(
                f"{name} and {names[0]} have other held-out {'labels' if first.values.ndim > 1 else 'tokens'} "
                f"({len(other.truth):,} and {len(first.truth):,}): an ensemble is of runs over one data set"
            )
    values = {name: p.values for name, p in said.items()}
    if first.values.ndim > 1:
        return means.classification(values, first.truth)
    return means.tokens(values, first.weights)


def _kind(p: Predictions) -> str:
    return f"{p.values.shape[1]} classes" if p.values.ndim > 1 else "tokens"


def table_of(found: dict[str, dict[str, float]]) -> Grid:
    """One line each."""
    columns = [c for c in COLUMNS if any(c in x for x in found.values())]
    rows = tuple((name, *(number(x[c]) if c in x else "-" for c in columns)) for name, x in found.items())
    return Grid("ensemble", ("", *columns), rows)
