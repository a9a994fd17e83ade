"""A CIFAR-10 ResNet-20 learns handwritten digits: all of it, its last block, or its head; and what BatchNorm does.

    python experiments/e002_resnet_digits/run.py --weights resnet20_cifar10.safetensors

Drives `Program` and `State` directly, because the parts that are trained are patterns of its own. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses as dc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import config, tree
from ftjax.data.layouts import layout_of
from ftjax.data.pipeline import Batches, eval_batches
from ftjax.data.prepare import prepare
from ftjax.data.tasks.digits import Digits
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.models.batchnorm import reestimate
from ftjax.models.resnet_cifar import convert
from ftjax.objectives.image_classification import ImageClassification
from ftjax.peft.base import FROZEN, with_head
from ftjax.train.optimizer import OptimSpec, decay_groups, hyper_of, make_tx
from ftjax.train.state import Frozen, initial, kinds_of, partition
from ftjax.train.step import Program

HERE = Path(__file__).resolve().parent
BATCH = 32


@dc.dataclass(frozen=True)
class Trial:
    """One way to train.

    Attributes:
      name: in the table.
      patterns: trained weights beside the head.
      lr: peak rate.
      batch_norm: see `Numerics`.
      anew: whether the running statistics are estimated on the training pictures first.
    """

    name: str
    patterns: tuple[str, ...]
    lr: float
    batch_norm: str = "train"
    anew: bool = False


TRIALS = (
    Trial("full", ("*",), 2e-3),
    Trial("last block", ("stage3/block2/*",), 5e-3),
    Trial("head", (), 2e-2),
    Trial("head, statistics frozen", (), 2e-2, "frozen"),
    Trial("head, statistics re-estimated, then frozen", (), 2e-2, "frozen", anew=True),
)


def rules_of(trial: Trial) -> Sequence[tuple[str, str]]:
    """Labels of the base's weights."""
    chosen = [(f"base/{p}", "part") for p in trial.patterns]
    return with_head(chosen if "*" in trial.patterns else [*chosen, ("base/*", FROZEN)], ("head/*",))


def train(trial: Trial, folder: str, data: Any, *, steps: int, seed: int) -> dict[str, Any]:
    """One run: held-out accuracy, number of trained parameters, median seconds a step."""
    objective = ImageClassification()
    numerics = Numerics(batch_norm=trial.batch_norm)  # type: ignore[arg-type]
    model, base = hf.load(folder, numerics=numerics, head=objective.head(data.labels), seed=seed, say=lambda _: None)
    if trial.anew:
        some = (data.train.build([[i] for i in range(at, at + 128)]) for at in range(0, 1024, 128))
        base = reestimate(model, base, (objective.inputs(b) for b in some))
    parts = partition(base, {}, model.table, rules_of(trial))
    optim = config.Optim(lr=trial.lr, schedule="cosine", warmup=steps // 10, weight_decay=0.01)
    run: Any = SimpleNamespace(optim=optim, train=config.Train(steps=steps), objective=objective)
    spec, hyper = OptimSpec.of(optim), hyper_of(run)
    groups = decay_groups(parts.groups, kinds_of(parts.trainable, model.table))
    program, frozen = Program(model, objective, spec, groups), Frozen(parts.frozen)
    tx = make_tx(spec, groups, hyper, jnp.int32(0))
    state = initial(parts, tx, rng=jax.random.key(seed), mutable=parts.mutable, hyper=hyper)
    batches = Batches(data.train, loader=config.Loader(packing="none"), batch=BATCH, seed=seed)
    step, times = jax.jit(program.train, donate_argnums=0), []
    state = jax.tree.map(jnp.copy, state)  # the base's own arrays are read again by the next run
    for _ in range(steps):
        batch = batches.next()
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    batches.close()
    measure = jax.jit(program.evaluate)
    sums = [measure(state, frozen, b)["metrics"]["accuracy"] for b in eval_batches(data.eval, 128, 1)]
    right, all_ = (float(sum(x)) for x in zip(*sums, strict=True))
    return {
        "accuracy": right / all_, "trained": tree.count(parts.trainable), "loss": float(metrics["loss"]),
        "step_ms": 1000 * float(np.median(times[2:])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="resnet20_cifar10.safetensors")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = str(convert(args.weights, made))
        task = Digits(size=32, like=folder)
        data = prepare(task, config.Loader(), None, layout=layout_of(ImageClassification()))
        rows = []
        for trial in TRIALS:
            for seed in range(args.seeds):
                found = train(trial, folder, data, steps=args.steps, seed=seed)
                rows.append((trial.name, seed, found))
                print(trial.name, seed, found, flush=True)
    with (HERE / "results.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["method", "seed", "accuracy", "trained", "last_loss", "step_ms"])
        for name, seed, r in rows:
            writer.writerow(
                [name, seed, f"{r['accuracy']:.4f}", r["trained"], f"{r['loss']:.4f}", f"{r['step_ms']:.1f}"]
            )
    for trial in TRIALS:
        own = [r for name, _, r in rows if name == trial.name]
        accuracy, ms = np.array([r["accuracy"] for r in own]), np.mean([r["step_ms"] for r in own])
        spread = accuracy.std(ddof=1) if len(own) > 1 else 0.0
        print(f"| {trial.name} | {own[0]['trained']:,} | {accuracy.mean():.3f} ± {spread:.3f} | {ms:.0f} |")


if __name__ == "__main__":
    main()
