"""A run as one typed object: `Run` and its parts. Files and overrides: `configfile`; meanings: `explain`.

    def get_config() -> Run:
        return Run(model=Pretrained(path="my/llama"), peft=LoRA(rank=16), optim=Optim(lr=3e-4))

`python run.py --config configs/x.py peft.rank=8 peft=lora optim.lr=1e-3` overrides fields by dotted paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftjax.schema import Component, Default, Slot

Dtype = Literal["float32", "bfloat16"]


# Components may declare `usual_lr: ClassVar[tuple[float, float]]`, the usual range with AdamW; this is for the rest.
ANY_LR = (1e-7, 0.5)
# The usual rate of an optimizer over AdamW's. SGD has none: its rate depends on the scale of the loss.
LR_SHARE = {"adamw": 1.0, "adafactor": 1.0, "lion": 0.2}


class Optim(Component):
    """The optimizer, its schedule and what is clipped."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = Field(default="adamw", description="Update rule, from optax.")
    lr: float = Field(
        default=1e-3, gt=0, description="Peak learning rate. Usual: 1e-4 to 2e-3 for LoRA, 1e-5 to 1e-4 for full."
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="linear", description="Shape after the warm-up."
    )
    warmup: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    final: float = Field(default=0.0, ge=0, le=1, description="Share of the peak rate at the last step.")
    decay_share: float = Field(default=0.2, gt=0, le=1, description="wsd: share of the steps in the final decay.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled weight decay, on kernels and embeddings only."
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="First-moment decay (momentum for sgd).")
    b2: float = Field(default=0.999, ge=0, lt=1, description="Second-moment decay.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    clip: float = Field(default=1.0, ge=0, description="Largest global norm of the trainable gradients; 0 is off.")
    lora_plus: float = Field(default=1.0, gt=0, description="Rate of LoRA's B over A's (LoRA+, arXiv:2402.12354).")
    ema: float = Field(default=0.0, ge=0, lt=1, description="Decay of a moving average of the trained weights; 0: off.")
    swa_from: float = Field(
        default=1.0, ge=0, le=1, description="SWA: share of the steps behind which weights are averaged; 1: off."
    )
    swa_every: int = Field(default=1, gt=0, description="SWA: steps from one snapshot to the next.")
    average_batches: int = Field(
        default=100,
        gt=0,
        description="Training batches that BatchNorm's statistics of averaged weights are taken from.",
    )

    @property
    def averaging(self) -> Literal["", "ema", "swa"]:
        """Which average of the weights is kept; empty for none."""
        return "ema" if self.ema else "swa" if self.swa_from < 1 else ""

    def check(self, run: Run) -> Iterator[str]:
        if self.warmup > run.train.steps:
            yield (
                f"optim.warmup={self.warmup}, train.steps={run.train.steps}  the warm-up is longer than the run, "
                f"so the peak rate is never reached; at most {run.train.steps}"
            )
        if self.ema and self.swa_from < 1:
            yield f"optim.ema={self.ema:g}, optim.swa_from={self.swa_from:g}  a run keeps one average: leave one of them off"
        behind = run.train.steps - int(self.swa_from * run.train.steps + 1e-9)
        if self.averaging == "swa" and behind < self.swa_every:
            yield (
                f"optim.swa_from={self.swa_from:g}, optim.swa_every={self.swa_every}  no snapshot would be taken: "
                f"{behind} of train.steps={run.train.steps} lie behind that share"
            )
        pruned = [m.name for m in getattr(run.peft, "methods", (run.peft,)) if hasattr(m, "around")]
        if self.averaging and pruned:
            yield (
                f"optim.{'ema' if self.ema else 'swa_from'}, peft={pruned[0]}  the method takes parts of its update out "
                "while it trains, and an average of the weights would hold them again"
            )

    def advise(self, run: Run) -> Iterator[str]:
        # A model that starts from random weights wants another rate than its PEFT method does, so it is asked first.
        ranges = (getattr(part, "usual_lr", None) for part in (run.model, run.peft))
        low, high = next(filter(None, ranges), ANY_LR)
        share = LR_SHARE.get(self.name)
        if share is not None and not low * share <= self.lr <= high * share:
            yield (
                f"optim.lr={self.lr:g}  outside the usual range for {run.peft.name} with {self.name}, "
                f"{low * share:g} to {high * share:g}"
            )
        if self.schedule != "wsd" and self.decay_share != type(self).model_fields["decay_share"].default:
            yield f"optim.decay_share={self.decay_share:g}  has no effect with schedule={self.schedule}"
        if self.schedule == "constant" and self.final:
            yield f"optim.final={self.final:g}  has no effect with schedule=constant"
        if self.averaging != "swa" and self.swa_every != type(self).model_fields["swa_every"].default:
            yield f"optim.swa_every={self.swa_every}  has no effect with swa_from=1"


class Train(Component):
    """How long, how many at once, and when to stop."""

    steps: int = Field(default=100, gt=0, description="Optimizer steps.")
    batch: int = Field(default=8, gt=0, description="Rows per optimizer step, over all devices and micro-batches.")
    accumulate: int = Field(default=1, gt=0, description="Micro-batches per step; the result equals one large batch.")
    log_every: int = Field(
        default=10, gt=0, description="Steps between printed lines; every step goes to metrics.jsonl."
    )
    skip_nonfinite: int = Field(
        default=3, ge=0, description="Steps with a non-finite loss or gradient skipped in a row before stopping."
    )
    neftune: float = Field(
        default=0.0,
        ge=0,
        description="Size of NEFTune's noise on embedded tokens (arXiv:2310.05914), usually 5; 0: off.",
    )

    def check(self, run: Run) -> Iterator[str]:
        if self.batch % self.accumulate:
            near = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - self.accumulate))[:3])
            yield (
                f"train.batch={self.batch}, train.accumulate={self.accumulate}  a batch must split evenly into "
                f"micro-batches; accumulate that fit: {', '.join(map(str, near))}"
            )


class Evaluate(Component):
    """Held-out evaluation and samples while training."""

    every: int = Field(default=0, ge=0, description="Steps between evaluations; 0: before and after only.")
    examples: int = Field(default=256, ge=0, description="Held-out examples used for the loss; 0: all.")
    generate: int = Field(default=4, ge=0, description="Fixed prompts answered at each evaluation.")
    max_new_tokens: int = Field(default=48, gt=0, description="Longest generated answer, in tokens.")
    metric_examples: int = Field(default=32, ge=0, description="Held-out examples for generation-based metrics.")
    patience: int = Field(default=0, ge=0, description="Early stopping: evaluations without improvement; 0 is off.")
    min_delta: float = Field(default=0.0, ge=0, description="Smallest improvement of the held-out loss that counts.")

    def check(self, run: Run) -> Iterator[str]:
        if self.patience and not self.every:
            yield (
                f"evaluate.patience={self.patience}, evaluate.every=0  early stopping needs evaluations "
                "while training; set evaluate.every"
            )


class Checkpoint(Component):
    """What is kept on disk while training."""

    every: int = Field(default=100, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep: int = Field(default=2, gt=0, description="Newest checkpoints kept.")
    keep_best: bool = Field(
        default=True, description="Also keep the one with the best held-out loss, and export that one."
    )


class Loader(Component):
    """From rows to batches."""

    max_length: int = Field(default=512, gt=1, description="Tokens per row.")
    packing: Literal["bfd", "none"] = Field(
        default="bfd", description="bfd: best-fit packing; none: one example per row."
    )
    truncation: Literal["right", "drop", "error"] = Field(
        default="right", description="What happens to a longer example."
    )
    loss_on: Literal["auto", "all", "completion", "assistant"] = Field(
        default="auto",
        description="Trained tokens. auto: completion for prompt-completion, assistant for messages, else all.",
    )
    skip_bad: int = Field(default=0, ge=0, description="Malformed rows tolerated (counted and reported).")
    shuffle: bool = Field(default=True, description="Shuffle the training examples anew in each epoch.")
    workers: int = Field(default=0, ge=0, description="Threads that build batches; the order does not depend on them.")
    prefetch: int = Field(default=2, ge=0, description="Batches prepared ahead.")


class Compute(Component):
    """Numerics and the shape of the compiled program."""

    dtype: Dtype = Field(default="float32", description="Compute dtype; loss, norms and adapters stay in float32.")
    layers: Literal["scan", "unroll"] = Field(
        default="scan", description="scan compiles faster, unroll may run faster."
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="What is recomputed in the backward pass."
    )
    attention: Literal["auto", "xla"] = Field(default="auto", description="auto: the fastest that fits.")
    loss_chunk: int = Field(default=1024, ge=0, description="Tokens whose logits exist at once; 0: all.")
    batch_norm: Literal["train", "frozen"] = Field(
        default="train",
        description="BatchNorm while training. train: by each micro-batch, running statistics follow; frozen: by these.",
    )
    cache: str = Field(default="~/.cache/ftjax/xla", description="Persistent compilation cache; empty: off.")
    onednn: bool = Field(
        default=False, description="CPU: matrix products by oneDNN, a little faster; programs then cannot be cached."
    )
    distributed: bool = Field(default=False, description="Join the processes of several hosts (jax.distributed).")


class Mesh(Component):
    """Devices along each axis; -1 takes what is left."""

    data: int = Field(default=-1, ge=-1, description="Batch split, weights replicated.")
    fsdp: int = Field(default=1, ge=-1, description="Batch and weights split.")
    tensor: int = Field(default=1, ge=-1, description="Heads, feed-forward and vocabulary split.")

    def check(self, run: Run) -> Iterator[str]:
        sizes = {axis: getattr(self, axis) for axis in type(self).model_fields}
        yield from (f"mesh.{axis}=0  an axis has at least one device; 1 is off" for axis, n in sizes.items() if n == 0)
        free = [axis for axis, n in sizes.items() if n == -1]
        if len(free) > 1:
            yield f"{', '.join(f'mesh.{axis}=-1' for axis in free)}  only one axis can take what is left"


class Run(Component):
    """Everything that decides the numbers of a run, and where they go."""

    name: str = Field(
        default="run",
        pattern=r"^\w[\w.-]*$",
        description="Name of the run; its folder is runs/<name> unless out is set.",
    )
    out: str = Field(default="", description="Run folder.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of adapters, new heads, data order and dropout.")
    model: Annotated[Any, Slot("model")] = Default("model", "pretrained")
    peft: Annotated[Any, Slot("peft")] = Default("peft", "lora")
    objective: Annotated[Any, Slot("objective")] = Default("objective", "causal_lm")
    data: Annotated[Any, Slot("data")] = Default("data", "stdlib_docs")
    loader: Loader = Loader()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    regime: Annotated[Any, Slot("regime")] = Default("regime", "fit")

    @property
    def folder(self) -> Path:
        """The run folder: `out`, or ``runs/<name>``."""
        return Path(self.out or f"runs/{self.name}")
