"""A step of DPO with LoRA against SFT on the same tokens (chosen and rejected as rows): seconds, side by side.

    python benchmarks/dpo_step.py --quick
    python benchmarks/dpo_step.py --output benchmarks/results/dpo_step.md

Three compiled steps of one process take turns, and a ratio is that of neighbours in a turn, so that a busy machine slows all.
With a frozen base SFT costs a forward pass and the gradient of the inputs, about two passes; a live reference adds a third.
The goal for DPO with the live reference is at most 2.2 times SFT; what the passes alone ask for is 1.5.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

GOAL = 2.2
SFT, LIVE, AHEAD = "SFT on both answers", "DPO, live reference", "DPO, precomputed reference"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few turns")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step; SFT has twice as many rows")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.quick:
        args.length, args.layers, args.width, args.vocab, args.turns = 64, 4, 256, 2048, 8
    return args


def pairs_of(args: argparse.Namespace) -> Any:
    """Random pairs; the prompt is the first quarter of every row."""
    import jax
    import jax.numpy as jnp

    from ftjax.data.pairs import PairBatch

    shape = (args.pairs, 2, args.length)
    at = jnp.broadcast_to(jnp.arange(args.length, dtype=jnp.int32), shape)
    return PairBatch(
        tokens=jax.random.randint(jax.random.key(1), shape, 3, args.vocab, dtype=jnp.int32), positions=at,
        segments=jnp.zeros(shape, jnp.int32), weights=(at >= args.length // 4).astype(jnp.float32),
        labels=jnp.zeros(args.pairs), rows=jnp.ones(args.pairs),
    )  # fmt: skip


def programs(args: argparse.Namespace) -> dict[str, tuple[Any, Any, Any, Any]]:
    """(compiled step, state, frozen, batch) by name; all over one base."""
    import jax
    import jax.numpy as jnp

    from ftjax.config import Run, Train
    from ftjax.headspec import HeadSpec
    from ftjax.models.base import Numerics
    from ftjax.models.llama import Llama, LlamaConfig, Rope
    from ftjax.objectives.causal_lm import CausalLM
    from ftjax.objectives.dpo import DPO
    from ftjax.objectives.preference import flat
    from ftjax.params import init_params
    from ftjax.peft.lora import LoRA
    from ftjax.train.setup import assemble
    from ftjax.train.state import partition

    width = args.width
    shape = LlamaConfig(
        vocab_size=args.vocab, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers, num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64,
        max_position_embeddings=4096, rms_norm_eps=1e-5, rope=Rope(1e4, "default", 1.0, 0.0, 0.0, 0),
        tie_word_embeddings=True, attention_bias=False, mlp_bias=False, initializer_range=0.02,
    )  # fmt: skip
    model = Llama(shape, Numerics(args.dtype, layers="unroll"), HeadSpec())
    base = init_params(model.table, jax.random.key(0), dtype=jnp.dtype(args.dtype))
    method, pairs = LoRA(rank=args.rank, alpha=2.0 * args.rank), pairs_of(args)
    known = pairs.replace(reference=jnp.full((args.pairs, 2), -float(args.length)))
    found = {}
    for name, objective, batch in (
        (SFT, CausalLM(), flat(pairs)), (LIVE, DPO(), pairs), (AHEAD, DPO(precompute=True), known)
    ):  # fmt: skip
        overlay = method.init(jax.random.key(2), model.table, base)
        parts = partition(base, overlay, model.table, method.labels(model.table))
        run = Run(peft=method, objective=objective, train=Train(steps=1000, batch=len(jax.tree.leaves(batch)[0])))
        program, state, frozen = assemble(run, model, parts)
        batch = jax.tree.map(lambda x: x[None], batch)
        step = jax.jit(program.train, donate_argnums=0).lower(state, frozen, batch).compile()
        found[name] = (step, state, frozen, batch)
    return found


def measured(made: dict[str, tuple[Any, Any, Any, Any]], turns: int) -> list[dict[str, float]]:
    """Seconds of each step in each turn, after one that is not counted; the order turns round every time."""
    import jax

    states = {name: state for name, (_, state, _, _) in made.items()}

    def seconds(name: str) -> float:
        step, _, frozen, batch = made[name]
        start = time.perf_counter()
        states[name], metrics = step(states[name], frozen, batch)
        jax.block_until_ready((states[name], metrics))
        return time.perf_counter() - start

    for name in made:
        seconds(name)
    names = list(made)
    return [{n: seconds(n) for n in (names if i % 2 == 0 else names[::-1])} for i in range(turns)]


def report(args: argparse.Namespace, made: dict[str, Any], found: list[dict[str, float]]) -> str:
    """The table in Markdown."""
    import jax

    best = {n: min(t[n] for t in found) for n in made}
    middle = {n: statistics.median(t[n] for t in found) for n in made}
    each = {n: statistics.median(t[n] / t[SFT] for t in found) for n in made}
    flops = {n: (step.cost_analysis() or {}).get("flops", float("nan")) for n, (step, *_) in made.items()}
    text = "# A step of DPO over one of SFT\n\n"
    text += (
        f"{args.layers} layers of {args.width}, vocabulary {args.vocab}, {args.pairs} pairs ({2 * args.pairs} rows) of "
    )
    text += f"{args.length} tokens, {args.dtype}, LoRA of rank {args.rank} on all linear layers; {args.turns} turns. "
    text += f"The goal for the live reference is at most {GOAL}.\n\n"
    text += (
        "| | best, ms | median, ms | over SFT: best | median of turns | FLOPs over SFT |\n|---|---|---|---|---|---|\n"
    )
    text += "".join(
        f"| {n} | {1e3 * best[n]:,.1f} | {1e3 * middle[n]:,.1f} | {best[n] / best[SFT]:.2f} | {each[n]:.2f} "
        f"| {flops[n] / flops[SFT]:.2f} |\n"
        for n in made
    )
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "numpy"))
    text += f"\n    python {' '.join(['benchmarks/dpo_step.py', *sys.argv[1:]])}\n\n"
    text += (
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}, Python {platform.python_version()}, "
    )
    return text + f"{versions}. Load average at the end: {', '.join(f'{x:.1f}' for x in os.getloadavg())}.\n"


def main() -> None:
    """Measures and prints."""
    args = arguments()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    made = programs(args)
    text = report(args, made, measured(made, args.turns))
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
