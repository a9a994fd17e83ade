"""One contender of `cpu_step.py` as a process of its own: it trains when told to and answers in JSON lines.

    python benchmarks/contenders.py ftjax --model 15m --folder /tmp/base      # then "run 5" and "quit" on stdin

Both contenders load the same base from a folder and train on the same batches: LoRA r16 on all linear layers, AdamW,
gradient clipping at 1, no dropout, float32. A process per contender has peak memory of its own, and no thread pool
of one slows down the other.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RANK, ALPHA, LR, CLIP, THREADS, STEPS = 16, 32, 1e-3, 1.0, 2, 1000


@dc.dataclass(frozen=True)
class Shape:
    """A Llama and the batch that it is trained on; `remat` is ours to choose, as torch's SDPA chooses for itself."""

    dim: int
    layers: int
    ffn: int
    heads: int
    vocab: int
    tied: bool
    rows: int
    length: int
    remat: str = "none"

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.length

    def config(self) -> dict:
        """The numbers as transformers' LlamaConfig takes them."""
        return {
            "vocab_size": self.vocab, "hidden_size": self.dim, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "max_position_embeddings": 2048, "tie_word_embeddings": self.tied,
        }  # fmt: skip

    def batch(self, step: int) -> np.ndarray:
        """Token ids [rows, length]; the same for every contender."""
        return np.random.default_rng(step).integers(3, self.vocab, (self.rows, self.length), dtype=np.int64)


# The 15M model is tied as llama2.c's stories15M is (untied it would have 24M parameters); the 45M one is not (46M).
SHAPES = {
    "15m": Shape(288, 6, 768, 6, 32000, True, 4, 256),
    "45m": Shape(512, 12, 1376, 8, 8192, False, 8, 256, remat="dots"),
    "tiny": Shape(64, 2, 172, 4, 512, True, 2, 32),
}


def make_base(folder: Path, shape: Shape) -> None:
    """A randomly initialised base in a folder that both contenders open."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape.config())).save_pretrained(folder)


Step = Callable[[int], float]


def peft_step(folder: Path, shape: Shape, _: argparse.Namespace) -> Step:
    """HF transformers + PEFT, eager, with the settings of its Trainer: SDPA attention, fused AdamW, clipping."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step(i: int) -> float:
        ids = torch.from_numpy(shape.batch(i))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ftjax_step(folder: Path, shape: Shape, args: argparse.Namespace) -> Step:
    """The train step of this package, as the loop calls it."""
    from ftjax.parallel import xla_flags

    if not args.plain_flags:
        xla_flags.apply()
    import jax
    import jax.numpy as jnp

    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from ftjax.config import Optim, Train
    from ftjax.data.batches import TokenBatch
    from ftjax.models import hf
    from ftjax.models.base import Numerics
    from ftjax.objectives.causal_lm import CausalLM
    from ftjax.peft.lora import LoRA
    from ftjax.train.optimizer import OptimSpec, decay_groups, hyper_of, make_tx
    from ftjax.train.state import Frozen, initial, kinds_of, partition
    from ftjax.train.step import Program

    @dc.dataclass
    class Run:
        optim: Optim
        train: Train
        objective: CausalLM

    numerics = Numerics(layers=args.layers, loss_chunk=args.loss_chunk, remat=args.remat or shape.remat)
    model, params = hf.load(folder, dtype="float32", numerics=numerics)
    peft = LoRA(rank=RANK, alpha=ALPHA)
    overlay = peft.init(jax.random.key(0), model.table, params)
    parts = partition(params, overlay, model.table, peft.labels(model.table))
    run = Run(Optim(lr=LR, schedule="constant", clip=CLIP), Train(steps=STEPS), CausalLM())
    hyper, spec = hyper_of(run), OptimSpec.of(run.optim)
    groups = decay_groups(parts.groups, kinds_of(parts.trainable, model.table))
    tx = make_tx(spec, groups, hyper, jnp.int32(0))
    state = initial(parts, tx, rng=jax.random.key(1), mutable={}, hyper=hyper)
    frozen = Frozen(parts.frozen)
    train = jax.jit(Program(model, run.objective, spec, groups).train, donate_argnums=0)
    places = np.broadcast_to(np.arange(shape.length, dtype=np.int32), (1, shape.rows, shape.length))
    weights = np.ones(places.shape, np.float32)
    weights[..., 0] = 0

    def step(i: int) -> float:
        nonlocal state
        tokens = shape.batch(i)[None].astype(np.int32)
        batch = TokenBatch(tokens=tokens, positions=places, segments=np.zeros_like(places), weights=weights)
        state, metrics = train(state, frozen, batch)
        return float(metrics["loss"])

    return step


CONTENDERS: dict[str, Callable[[Path, Shape, argparse.Namespace], Step]] = {"ftjax": ftjax_step, "peft": peft_step}


def peak_mib() -> float:
    """Largest resident memory of this program so far, from Linux (getrusage would count the parent's before exec)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve(step: Step, started: float) -> None:
    """First step, then whatever stdin asks for."""

    def say(**what: object) -> None:
        print(json.dumps(what), flush=True)

    loss = step(0)
    say(loss=loss, first_step_s=time.time() - started)
    done = 1
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "quit":
            say(peak_mib=peak_mib())
            return
        seconds, cpu, losses = [], [], []
        for _ in range(int(rest[0])):
            begin, busy = time.perf_counter(), time.process_time()
            losses.append(step(done))
            seconds.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - busy)
            done += 1
        say(seconds=seconds, cpu=cpu, losses=losses)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--model", choices=SHAPES, default="15m")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", choices=("scan", "unroll"), default="unroll")
    parser.add_argument("--loss-chunk", type=int, default=256)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="", help="default: the model's own")
    parser.add_argument("--cache", default="")
    parser.add_argument("--plain-flags", action="store_true", help="leave XLA's flags as they are")
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was started")
    return parser.parse_args(argv)


def main() -> None:
    """Builds one contender and serves it."""
    args = arguments()
    serve(CONTENDERS[args.contender](args.folder, SHAPES[args.model], args), args.started)


if __name__ == "__main__":
    main()
