"""A small BERT learns to tell bank customers' questions apart, with and without a larger one that knows how.

    python -m experiments.e005_distillation.run --data banking77 --out /tmp/e005
    python -m experiments.e005_distillation.run --data banking77 --out /tmp/e005 --lr 3e-3 --rows 500 --ways 0 1 2

`--data` is a folder with train.csv and test.csv (columns text, category: the Banking77 data set). The teacher is trained by
configs/classify.py unless `--out` holds it already. Students of one seed begin with the same weights and see the same
batches, so that ways of training are compared by pairs. A way compiles once; rows are added to results.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.e003_banking77.run import subset
from ftjax import configfile
from ftjax.data.pipeline import eval_batches
from ftjax.models import hf
from ftjax.train.setup import Setup, compile_train, prepare
from ftjax.train.state import whole
from ftjax.verbs import main as ftjax

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "classify.py"
SHARED = (
    "hidden_act=gelu",
    "max_position_embeddings=64",
    "type_vocab_size=2",
    "layer_norm_eps=1e-12",
    "pad_token_id=0",
)
TEACHER = ("hidden_size=128", "intermediate_size=512", "num_hidden_layers=4", "num_attention_heads=4", *SHARED)
STUDENT = ("hidden_size=64", "intermediate_size=256", "num_hidden_layers=2", "num_attention_heads=4", *SHARED)
DISTILL = ("objective=distill_classification", "objective.teacher.path={teacher}")
WAYS: dict[str, tuple[str, ...]] = {
    "labels": (),
    "labels, smoothed by 0.1": ("objective.label_smoothing=0.1",),
    "distilled (a=0.5, T=2)": DISTILL,
    "distilled (a=0.9, T=4)": (*DISTILL, "objective.alpha=0.9", "objective.temperature=4.0"),
}
COLUMNS: tuple[str, ...] = ("rows", "steps", "lr", "way", "seed", "accuracy", "loss")
MEASURES = COLUMNS[-2:]


def settings(files: tuple[Path, Path], model: tuple[str, ...], *, steps: int, lr: float) -> list[str]:
    """Overrides of configs/classify.py that teacher and students share."""
    return [
        "model=scratch", "model.family=bert", f"model.settings={json.dumps(model)}", "model.tokenizer_kind=wordpiece",
        "model.vocab=2048", f"data.path={files[0]}", f"data.eval_path={files[1]}", "loader.max_length=32",
        f"optim.lr={lr:g}", f"optim.warmup={steps // 10}", f"train.steps={steps}", "train.batch=32", "evaluate.examples=0",
        "evaluate.every=100000",
    ]  # fmt: skip


def measure(logits: Any, weights: Any, examples: Any) -> dict[str, float]:
    """Accuracy and cross entropy over the held-out rows, the same for every way.

    Args:
      logits: ``(weights, inputs) -> [B, C]``.
      weights: the model's.
      examples: the held-out rows.
    """
    nll, right = [], []
    for batch in eval_batches(examples, 128, 32):
        inputs = {"input_ids": batch.tokens, "positions": batch.positions, "segments": batch.segments}
        z = np.asarray(logits(weights, inputs), np.float64)[batch.weights > 0]
        y = batch.labels[batch.weights > 0]
        picked = z[np.arange(len(y)), y]
        top = z.max(-1)
        nll.append(top + np.log(np.exp(z - top[:, None]).sum(-1)) - picked)
        right.append(picked >= top)
    return {"accuracy": float(np.concatenate(right).mean()), "loss": float(np.concatenate(nll).mean())}


def logits_of(model: Any) -> Any:
    """A compiled ``(weights, inputs) -> logits``."""
    return jax.jit(lambda weights, inputs: model.apply(weights, inputs).logits)


def teacher(out: Path, files: tuple[Path, Path], steps: int) -> Path:
    """The teacher's folder."""
    folder = out / "teacher" / "model"
    if not folder.exists():
        assert (
            ftjax(["--config", str(CONFIG), f"out={out / 'teacher'}", *settings(files, TEACHER, steps=steps, lr=1e-3)])
            == 0
        )
    return folder


def trained(setup: Setup, step: Any, steps: int) -> dict[str, Any]:
    """The student's weights after training."""
    state = setup.state
    for batch in itertools.islice(setup.batches, steps):
        state, _ = step(state, setup.frozen, batch)
    setup.batches.close()
    return whole(state, setup.frozen.store, state.mutable)["base"]


def few(path: Path, rows: int) -> Path:
    """A CSV file with some of its rows, drawn once; 0: all."""
    if not rows:
        return path
    header, *lines = list(csv.reader(path.open(newline="")))
    taken = np.random.default_rng(0).permutation(len(lines))[:rows]
    out = path.with_name(f"{path.stem}-{rows}.csv")
    with out.open("w", newline="") as f:
        csv.writer(f).writerows([header, *(lines[i] for i in sorted(taken))])
    return out


def chosen(args: argparse.Namespace) -> list[str]:
    """The ways that are asked for; labels alone are always one."""
    return [list(WAYS)[i] for i in args.ways]


def students(args: argparse.Namespace, files: tuple[Path, Path], known: Path) -> list[dict[str, Any]]:
    """Every way with every seed."""
    rows = []
    for way in chosen(args):
        step: Any = None
        logits: Any = None
        for seed in range(args.seeds):
            given = [
                *settings(files, STUDENT, steps=args.steps, lr=args.lr),
                f"model.tokenizer_path={known}",
                f"seed={seed}",
            ]
            run = configfile.load(CONFIG, [*given, *(x.format(teacher=known) for x in WAYS[way])])
            setup = prepare(run, say=lambda _: None)
            step, logits = step or compile_train(setup), logits or logits_of(setup.model)
            found = measure(logits, trained(setup, step, args.steps), setup.data.eval)
            rows.append({"rows": args.rows, "steps": args.steps, "lr": args.lr, "way": way, "seed": seed, **found})
            print(rows[-1], f"{time.process_time():.0f} s", flush=True)
    return rows


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval, by Student's t over the seeds."""
    n = len(differences)
    return float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)


def table(rows: list[dict[str, Any]], best: dict[str, float]) -> None:
    """Means of each way and its gain over labels alone; the last column is the gain's share of the teacher's lead."""
    print("| way | accuracy | gain | held-out loss | gain | share of the teacher's lead |\n|---|---|---|---|---|---|")
    print(f"| teacher | {best['accuracy']:.3f} | | {best['loss']:.3f} | | |")
    values = {
        w: {k: np.array([r[k] for r in rows if r["way"] == w]) for k in MEASURES}
        for w in dict.fromkeys(r["way"] for r in rows)
    }
    plain = values["labels"]
    for way, v in values.items():
        cells = [way]
        for k in MEASURES:
            mean, half = interval(v[k] - plain[k])
            cells += [f"{v[k].mean():.3f}", "" if way == "labels" else f"{mean:+.3f} ± {half:.3f}"]
        lead = best["accuracy"] - plain["accuracy"].mean()
        gain = (v["accuracy"] - plain["accuracy"]).mean()
        cells.append("" if way == "labels" else f"{gain / lead:.0%}")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=0, help="that the students see; 0: all")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the students")
    parser.add_argument("--ways", type=int, nargs="+", default=list(range(len(WAYS))), help="by number; 0 is needed")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = subset(args.data, args.classes, args.out)
    known = teacher(args.out, files, args.teacher_steps)
    run = configfile.load(CONFIG, [*settings(files, TEACHER, steps=1, lr=1e-3), f"model.tokenizer_path={known}"])
    setup = prepare(run, say=lambda _: None)
    model, weights = hf.load(str(known), head=setup.model.head, say=print)
    best = measure(logits_of(model), weights, setup.data.eval)
    print("teacher", best, f"{time.process_time():.0f} s", flush=True)
    rows = students(args, (few(files[0], args.rows), files[1]), known)
    path = HERE / "results.csv"
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if new:
            writer.writeheader()
            rows = [{"rows": 0, "steps": args.teacher_steps, "lr": 0.001, "way": "teacher", "seed": 0, **best}, *rows]
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    table([r for r in rows if r["way"] != "teacher"], best)


if __name__ == "__main__":
    main()
