"""The default regime: one objective over one data set, from the first step to an exported adapter.

Everything a user sees happens here, in order: the resolved run, parameters, memory, a preview of the trained tokens,
compilation, progress, held-out numbers before and after, samples side by side, and where everything lies.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import itertools
import os
import socket
from collections.abc import Iterator
from typing import Any, Literal

import jax

from ftjax.config import Run
from ftjax.data.batches import Examples
from ftjax.data.prefetch import prefetch_to_device
from ftjax.data.preview import preview
from ftjax.errors import CheckpointError
from ftjax.evals.ngram import bigram_loss
from ftjax.registry import register
from ftjax.report.card import model_card
from ftjax.report.console import Console
from ftjax.report.html import write_report
from ftjax.report.memory import MemoryReport, device_bytes, memory_report
from ftjax.report.parameters import ParameterReport, parameter_report
from ftjax.report.samples import pair
from ftjax.schema import Component
from ftjax.train import recorded
from ftjax.train.averaged import averaged, described
from ftjax.train.checkpoint import Checkpoints, Restored
from ftjax.train.loop import Loop
from ftjax.train.metrics import MetricLog, read_lines
from ftjax.train.reference import known
from ftjax.train.runfolder import RunFolder
from ftjax.train.session import Answer, Evaluator, export, held_out_examples
from ftjax.train.setup import Setup, compile_train, prepare
from ftjax.train.signals import Signals
from ftjax.train.state import State


@register("regime")
class Fit(Component):
    """Train once, evaluate before and after, export."""

    name: Literal["fit"] = "fit"

    def train(self, run: Run, *, allow: tuple[str, ...]) -> int:
        """Runs or resumes a training run; returns the exit code."""
        console = Console()
        folder = RunFolder(run.folder, message=console.note)
        with folder.begin(run, allow=allow) as start, Signals(console.warn) as signals:
            if start.resumed:
                console.note(f"{run.folder} exists: continuing this run")
            console.header(run)
            setup = prepare(run, say=console.note)
            console.quiet = jax.process_index() != 0
            introduce(setup, console)
            setup = recorded.known(known(setup, say=console.note), say=console.note)
            step = compiled_step(setup, console)
            _Job(setup, step, console, folder, allow, signals).go()
        return 0


def introduce(setup: Setup, console: Console) -> None:
    """Data counts, warnings, parameters and a preview of what is trained."""
    for line in setup.data.report.lines():
        console.note(line)
    for text in setup.warnings:
        console.warn(text)
    baseline = corpus_baseline(setup)
    if baseline is not None:
        console.note(f"a bigram model of the training tokens has a held-out loss of {baseline:.4f}")
    console.parameters(parameters_of(setup))
    console.preview(preview(setup.data.train, setup.tokenizer, 2))


def corpus_baseline(setup: Setup) -> float | None:
    """Held-out loss of a bigram model, for corpora; None for other data."""
    if not setup.run.data.wraps or not len(setup.data.eval) or not isinstance(setup.data.train, Examples):
        return None
    return bigram_loss(setup.data.train, held_out_examples(setup), setup.model.config.vocab_size)


def parameters_of(setup: Setup) -> ParameterReport:
    """What is trained and what is not."""
    p = setup.parts
    return parameter_report(setup.model.table, p.trainable, p.const, p.frozen, p.groups)


def compiled_step(setup: Setup, console: Console) -> Any:
    """The compiled train step, its memory shown."""
    with console.compiling("train step"):
        step = compile_train(setup)
    console.memory(memory_of(setup, step))
    return step


def memory_of(setup: Setup, step: Any) -> MemoryReport:
    """Bytes by component against the device."""
    return memory_report(
        frozen_bytes=device_bytes(setup.frozen.store), trainable_bytes=device_bytes(setup.state.trainable),
        opt_bytes=device_bytes((setup.state.opt, setup.state.average)),
        reference_bytes=device_bytes((setup.frozen.reference, setup.frozen.teacher)),
        compiled=step.memory_analysis(), run=setup.run,
    )  # fmt: skip


@dc.dataclass
class _Job:
    """One process's work on a run folder."""

    setup: Setup
    step: Any
    console: Console
    folder: RunFolder
    allow: tuple[str, ...]
    signals: Signals

    def go(self) -> None:
        """Restores, trains, evaluates, exports, reports."""
        run, setup = self.setup.run, self.setup
        log = MetricLog(self.folder.path, message=self.console.warn)
        keep = run.checkpoint
        with (
            contextlib.closing(log),
            Checkpoints(
                self.folder.checkpoints, keep=keep.keep, keep_best=keep.keep_best, message=self.console.warn
            ) as checkpoints,
        ):
            self.log, self.checkpoints = log, checkpoints
            self.evaluator = Evaluator(setup, self.console.compiling)
            restored = checkpoints.restore(setup.state)
            log.truncate_after(restored.step if restored else None)
            state = self._resume(restored) if restored else setup.state
            start = restored.step if restored else 0
            before = self._measure(state, 0) if start == 0 else self._logged(0)
            state = self._train(state, start, restored)
            checkpoints.wait()
            self._finish(state, before)

    # Resuming ----------------------------------------------------------------------------------------------------------

    def _resume(self, restored: Restored) -> State:
        allowed = tuple(a.removeprefix("data.") for a in self.allow)
        self.setup.batches.check_fingerprint(restored.extra["fingerprint"], allow=allowed)
        self.setup.batches.restore(restored.extra["data"])
        self.console.note(f"resuming after step {restored.step} of {self.setup.run.train.steps}")
        # Numbers of the config hold, also where a change of them was allowed.
        return restored.state.replace(hyper=self.setup.state.hyper)

    def _logged(self, step: int) -> dict[str, float]:
        lines = read_lines(self.folder.metrics)
        return next((r for r in lines if r["event"] == "eval" and r["step"] == step), {})

    # Training ----------------------------------------------------------------------------------------------------------

    def _train(self, state: State, start: int, restored: Restored | None) -> State:
        run, setup = self.setup.run, self.setup
        if start >= run.train.steps:
            self.console.note(f"already trained for {start} steps")
            return state
        batch = setup.placement.batch(1)
        source = prefetch_to_device(
            setup.batches, lambda b: jax.device_put(b, batch), run.loader.prefetch, say=self._slow
        )
        with self.console.progress(run.train.steps, start=start, log_every=run.train.log_every) as progress:

            def show(step: int, numbers: dict[str, float], timing: dict[str, float]) -> None:
                progress.update(
                    step, loss=numbers["loss"], lr=numbers["lr"], grad_norm=numbers["grad_norm"],
                    tokens_per_s=timing["tokens_per_s"], data_wait=timing["data_wait"], seconds=timing["seconds"],
                )  # fmt: skip

            loop = Loop(
                setup=setup, step=self.step, source=source, rows_of=self._rows_of, log=self.log,
                checkpoints=self.checkpoints, signals=self.signals, evaluate=self._evaluate, show=show,
                message=self.console.warn, fingerprint=setup.batches.fingerprint,
            )  # fmt: skip
            if restored:
                loop.progress.restore(restored.extra["progress"])
            try:
                state = loop.run(state, start=start)
            finally:
                source.close()
                setup.batches.close()
        if loop.progress.early_stop.exhausted:
            best = loop.progress.early_stop.best_step
            self.console.note(f"stopped early: no improvement since step {best}")
        return state

    def _slow(self, text: str) -> None:
        self.console.warn(f"{socket.gethostname()} (process {jax.process_index()}): {text}")

    def _rows_of(self, step: int) -> Iterator[str]:
        source, examples = self.setup.batches.source, self.setup.data.train
        rows = source.rows_of(step).ravel().tolist()
        return (examples.origin(i) for i in itertools.chain.from_iterable(source.row(r) for r in rows))

    def _evaluate(self, state: State, step: int) -> float:
        return self._measure(state, step).get("loss", float("nan"))

    def _measure(self, state: State, step: int) -> dict[str, float]:
        """Held-out numbers and answers at a step, logged; of the averaged weights where an average is kept."""
        seen = averaged(self.setup, state)
        numbers = self.evaluator.compared(seen, state)
        answers, metrics = self.evaluator.answers(seen)
        numbers |= metrics
        if numbers:
            self.log.metrics("eval", step, numbers)
            self.console.evaluation(step, numbers)
        for a in answers:
            self.log.sample(step, dc.asdict(a))
        return numbers

    # The end -----------------------------------------------------------------------------------------------------------

    def _finish(self, state: State, before: dict[str, float]) -> None:
        run, setup = self.setup.run, self.setup
        last = int(state.step)
        best = self.checkpoints.best_step
        chosen = best if best is not None and run.checkpoint.keep_best else last
        if chosen != last:
            self.console.note(f"exporting step {chosen}, which has the best held-out loss")
            state = self.checkpoints.load(chosen, setup.state).state
        after = self._logged(chosen) or self._measure(state, chosen)
        state = averaged(setup, state)
        what = described(setup, state)
        if what:
            self.console.note(f"exporting: {what}")
        notes = " ".join(filter(None, (what, self._spent(chosen))))
        card = card_of(setup, chosen, before, after, adapter=setup.adapted, notes=notes)
        target = export(setup, state, self.folder.path, card=card)
        self.console.comparison(before, after)
        answers = self._samples(0), self._samples(chosen)
        self.console.samples(*answers)
        report = write_report(
            self.folder.path, before=before, after=after, memory=memory_of(setup, self.step),
            parameters=parameters_of(setup), preview=preview(setup.data.train, setup.tokenizer, 2),
            lines=read_lines(self.folder.metrics), samples=pair(*answers),
        )  # fmt: skip
        where = {"run": self.folder.path, target.name: target, "report": report, "metrics": self.folder.metrics}
        self.console.where(where | {"again": f"python run.py --config {self.folder.config}"})

    def _spent(self, step: int) -> str:
        """Tokens and time behind the exported weights."""
        lines = [r for r in read_lines(self.folder.metrics) if r["event"] == "train" and r["step"] <= step]
        tokens = sum(r.get("num_tokens", 0) for r in lines)
        seconds = sum(r["seconds"] for r in read_lines(self.folder.timing) if r["step"] <= step)
        where = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), {os.cpu_count()} processor cores"
        return f"Trained on {tokens:,.0f} tokens in {seconds / 60:.1f} minutes of steps, on {where}.{self._baseline()}"

    def _baseline(self) -> str:
        loss = corpus_baseline(self.setup)
        return "" if loss is None else f" A bigram model of the training tokens has a held-out loss of {loss:.4f}."

    def _samples(self, step: int) -> list[Answer]:
        lines = read_lines(self.folder.samples)
        return [Answer(r["prompt"], r["completion"], r["reference"]) for r in lines if r["step"] == step]


def card_of(
    setup: Setup, step: int, before: dict[str, float], after: dict[str, float], *, adapter: bool, notes: str = ""
) -> str:
    """The README.md of what a run exports."""
    return model_card(
        run=setup.run.model_dump(mode="json"), before=before, after=after, fingerprint=setup.data.fingerprint, step=step,
        base=setup.run.model.label, adapter=adapter, notes=notes,
    )  # fmt: skip


def restored_state(setup: Setup, folder: RunFolder, message: Any) -> tuple[State, int]:
    """The state a finished or interrupted run would export: its best step, or else its last; its weights are the raw ones.

    Raises:
      CheckpointError: the run has no checkpoint yet.
    """
    with Checkpoints(folder.checkpoints, readonly=True, message=message) as checkpoints:
        best = checkpoints.best_step if setup.run.checkpoint.keep_best else None
        found = checkpoints.load(best, setup.state) if best is not None else checkpoints.restore(setup.state)
        if found is None:
            raise CheckpointError(f"{folder.path} holds no checkpoint yet: train it first")
        return found.state, found.step
