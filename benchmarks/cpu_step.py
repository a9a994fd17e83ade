"""LoRA training on the CPU side by side with HF PEFT: tokens/s, peak memory, time to the first step.

    python benchmarks/cpu_step.py --quick                # the 15M model, a few minutes
    python benchmarks/cpu_step.py --output benchmarks/results/cpu_step.md

Each contender is a process of its own (see `contenders.py`); they take turns in the order A B .. B A, one running
while the others wait, so that a slow phase of the machine hits all of them. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.contenders import SHAPES, THREADS, make_base  # noqa: E402
from ftjax.parallel import xla_flags  # noqa: E402

# A thread pool keeps spinning for up to 0.2 s after its work; nobody starts within that time of another's turn.
PAUSE_S = 0.3
PAGES = {"GLIBC_TUNABLES": xla_flags.LARGE_PAGES}


@dc.dataclass(frozen=True)
class Contender:
    """A row of the table: which program, its arguments and its environment."""

    name: str
    program: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = dc.field(default_factory=dict)


PEFT = Contender("PEFT eager", "peft")
OURS = Contender("ftjax", "ftjax", env=PAGES)
FIELD = (
    PEFT,
    Contender("PEFT eager, large pages", "peft", env=PAGES),
    OURS,
    Contender("ftjax without oneDNN", "ftjax", ("--plain-flags",), PAGES),
    Contender("ftjax without oneDNN and large pages", "ftjax", ("--plain-flags",)),
)


class Process:
    """A running contender, past its first step."""

    def __init__(self, contender: Contender, model: str, folder: Path, cache: Path) -> None:
        dropped = ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")
        env = {k: v for k, v in os.environ.items() if k not in dropped}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(HERE.parent),
            "TOKENIZERS_PARALLELISM": "false",
            **contender.env,
        }
        command = [sys.executable, str(HERE / "contenders.py"), contender.program, "--model", model]
        command += ["--folder", str(folder), "--cache", str(cache), "--started", str(time.time()), *contender.args]
        self.pipe: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
        )
        self.name, self.seconds, self.cpu, self.losses = contender.name, [], [], []
        first = json.loads(self.pipe.stdout.readline())
        self.loss, self.first_step_s = first["loss"], first["first_step_s"]

    def run(self, steps: int) -> None:
        """One turn."""
        time.sleep(PAUSE_S)
        answer = self._ask(f"run {steps}")
        self.seconds.append(answer["seconds"])
        self.cpu += answer["cpu"]
        self.losses += answer["losses"]

    def quit(self) -> float:
        """Ends the process; its peak memory in MiB."""
        peak = self._ask("quit")["peak_mib"]
        self.pipe.wait()
        return peak

    def _ask(self, line: str) -> dict[str, Any]:
        self.pipe.stdin.write(line + "\n")
        self.pipe.stdin.flush()
        return json.loads(self.pipe.stdout.readline())


@dc.dataclass(frozen=True)
class Row:
    """What one contender did: seconds per step of each turn, CPU seconds of its cheapest step, memory, start, losses."""

    name: str
    turns: list[list[float]]
    cpu_s: float
    peak_mib: float
    cold_s: float
    warm_s: float
    loss: float

    @property
    def steps(self) -> list[float]:
        """Seconds of every timed step."""
        return [s for turn in self.turns for s in turn]


def measure(model: str, field: tuple[Contender, ...], *, turns: int, steps: int) -> list[Row]:
    """Starts every contender twice (cold, then warm compilation cache), then lets the second ones take turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        make_base(folder, SHAPES[model])
        cold, processes = [], []
        for i, contender in enumerate(field):
            cache = Path(scratch) / f"cache{i}"
            first = Process(contender, model, folder, cache)
            # Compiling takes memory too, so the peak of the cold start is the one that counts.
            cold.append((first.first_step_s, first.quit()))
            processes.append(Process(contender, model, folder, cache))
            say(f"{model}: {contender.name} starts in {cold[-1][0]:.1f} s, again in {processes[-1].first_step_s:.1f} s")
        for turn in range(turns):
            for process in processes if turn % 2 == 0 else processes[::-1]:
                process.run(steps)
            say(f"{model}: turn {turn + 1} of {turns}, load {os.getloadavg()[0]:.1f}")
        return [
            Row(p.name, p.seconds, min(p.cpu), max(peak, p.quit()), start, p.first_step_s, p.loss)
            for p, (start, peak) in zip(processes, cold, strict=True)
        ]


def ratios(row: Row, base: Row) -> list[float]:
    """Speed over `base`, turn by turn: medians of the same turn."""
    pairs = zip(base.turns, row.turns, strict=True)
    return [statistics.median(b) / statistics.median(r) for b, r in pairs]


def table(model: str, rows: list[Row]) -> str:
    """The result for one model in Markdown."""
    shape, base = SHAPES[model], rows[0]
    head = (
        f"### {model}: dim {shape.dim}, {shape.layers} layers, ffn {shape.ffn}, {shape.heads} heads, vocabulary "
        f"{shape.vocab} ({'tied' if shape.tied else 'untied'}), {shape.rows} x {shape.length} tokens; ftjax with "
        f"remat={shape.remat}, unrolled layers, loss in chunks of 256 tokens\n\n"
        "| | tokens/s best | median | speed: best / best | turn by turn: median (min to max) | CPU s per step "
        "| peak MiB | memory ratio | first step, s: cold | warm cache | loss at step 0 |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in rows:
        each = ratios(row, base)
        lines.append(
            f"| {row.name} | {shape.tokens / min(row.steps):.0f} | {shape.tokens / statistics.median(row.steps):.0f} "
            f"| {min(base.steps) / min(row.steps):.2f} "
            f"| {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}) | {row.cpu_s:.2f} "
            f"| {row.peak_mib:.0f} | {row.peak_mib / base.peak_mib:.2f} | {row.cold_s:.1f} | {row.warm_s:.1f} "
            f"| {row.loss:.5f} |"
        )
    return head + "\n".join(lines) + "\n"


def circumstances() -> str:
    """Command, hardware and versions."""
    cpu = next(
        (x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    wide = "AVX-512" if any("avx512f" in x for x in _lines("/proc/cpuinfo")) else "no AVX-512"
    packages = ("jax", "jaxlib", "torch", "transformers", "peft")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    return (
        f"    python {' '.join(['benchmarks/cpu_step.py', *sys.argv[1:]])}\n\n"
        f"{cpu}, {os.cpu_count()} cores, {wide}; Python {platform.python_version()}, {versions}; torch with {THREADS} threads. "
        f"Load average at the end: {', '.join(f'{x:.1f}' for x in os.getloadavg())}.\n"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="15m only, PEFT and ftjax only, few turns")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["15m", "45m"])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    steps = {"15m": 5, "45m": 2, "tiny": 20}
    models, field, turns = (["15m"], (PEFT, OURS), 4) if args.quick else (args.models, FIELD, args.turns)
    parts = [table(m, measure(m, field, turns=turns, steps=steps[m])) for m in models]
    text = "\n".join([*parts, circumstances()])
    print(text)
    if args.output:
        args.output.write_text("# LoRA r16 training step on the CPU, float32\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
