"""Memory of one training step of Llama 3 8B by the compiler's account: full fine-tuning, LoRA, and LoRA over NF4.

    python benchmarks/memory_8b.py --output benchmarks/results/memory_8b.md
    python benchmarks/memory_8b.py --layers 2                # quick

Nothing is allocated: weights are shapes only. One row of `--length` tokens, bfloat16 compute, layers rematerialised,
AdamW. Trained arrays and both moments are float32, the frozen base bfloat16 or NF4 with double quantization.
The account is that of the backend it runs on; XLA for CPUs multiplies bfloat16 in float32, so that it holds float32 copies of
one layer's weights that an accelerator does not need.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import platform
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import config, tree
from ftjax.data.batches import TokenBatch
from ftjax.models.base import Numerics
from ftjax.models.llama import Llama, LlamaConfig
from ftjax.models.rope import Rope
from ftjax.objectives.causal_lm import CausalLM
from ftjax.params import init_params, key_of
from ftjax.peft.base import cut_for
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.quant.base import pack_store
from ftjax.quant.nf4 import NF4
from ftjax.train.optimizer import OptimSpec, decay_groups, hyper_of, make_tx
from ftjax.train.state import Frozen, initial, kinds_of, partition
from ftjax.train.step import Program

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope=Rope(5e5, "default", 1.0, 0.0, 0.0, 0), tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
    initializer_range=0.02,
)  # fmt: skip
GIB = 2**30


def measure(model: Llama, peft: Any, *, dtype: Any, quantize: Any, length: int) -> dict[str, float]:
    """GiB of each component of one step."""
    table, objective, optim = model.table, CausalLM(), config.Optim(lr=1e-4)
    run: Any = SimpleNamespace(optim=optim, train=config.Train(steps=100), objective=objective)
    spec, hyper = OptimSpec.of(optim, peft), hyper_of(run)
    made: dict[str, Any] = {}

    def state_and_frozen() -> tuple[Any, Any]:
        base = init_params(table, jax.random.key(0), dtype=dtype)
        base = pack_store(quantize, base, table) if quantize else base
        overlay = peft.init(key_of(jax.random.key(0), "peft"), table, base)
        parts = partition(cut_for(base, overlay, peft, table), overlay, table, peft.labels(table))
        made["groups"] = groups = decay_groups(parts.groups, kinds_of(parts.trainable, table))
        tx = make_tx(spec, groups, hyper, jnp.int32(0))
        state = initial(parts, tx, rng=jax.random.key(0), mutable=parts.mutable, hyper=hyper)
        return state, Frozen(parts.frozen)

    state, frozen = jax.eval_shape(state_and_frozen)
    row = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    batch = TokenBatch(row, row, row, jax.ShapeDtypeStruct(row.shape, jnp.float32))  # type: ignore[arg-type]
    program = Program(model, objective, spec, made["groups"])
    account: Any = jax.jit(program.train, donate_argnums=0).lower(state, frozen, batch).compile().memory_analysis()
    trained, moments = tree.nbytes(state.trainable), tree.nbytes(state.opt)
    parts = {
        "frozen": tree.nbytes(frozen), "trained": trained, "optimizer": moments, "gradients": trained,
        "activations and workspace": max(account.temp_size_in_bytes - trained, 0),
    }  # fmt: skip
    return {k: v / GIB for k, v in parts.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    numbers = dc.replace(LLAMA_3_8B, num_hidden_layers=args.layers)
    model = Llama(numbers, Numerics(dtype="bfloat16", remat="full"))
    weights = sum(
        tree.nbytes(jax.ShapeDtypeStruct(s.shape, jnp.bfloat16)) for s in model.table.values() if s.kind != "site"
    )
    ways = {
        "full, float32": (Full(), jnp.float32, None),
        "LoRA r16, bfloat16 base": (LoRA(rank=16), jnp.bfloat16, None),
        "LoRA r16, NF4 base": (LoRA(rank=16), jnp.bfloat16, NF4()),
    }
    found = {n: measure(model, p, dtype=d, quantize=q, length=args.length) for n, (p, d, q) in ways.items()}
    names = list(next(iter(found.values())))
    text = f"# Memory of Llama 3 8B shapes\n\n{weights / 2 / 1e9:.2f} billion parameters ({args.layers} layers), "
    text += f"{weights / GIB:.1f} GiB in bfloat16; one row of {args.length} tokens. GiB:\n\n"
    text += f"| | {' | '.join(names)} | all | bytes per parameter | times the bfloat16 weights |\n"
    text += "|---" * (len(names) + 4) + "|\n"
    for way, parts in found.items():
        total = sum(parts.values())
        text += f"| {way} | {' | '.join(f'{x:.2f}' for x in parts.values())} | {total:.1f} "
        text += f"| {total * GIB / (weights / 2):.1f} | {total * GIB / weights:.1f} |\n"
    text += f"\n    python {' '.join(['benchmarks/memory_8b.py', *sys.argv[1:]])}\n\n"
    text += f"{platform.machine()}, {jax.devices()[0].platform}, jax {metadata.version('jax')}.\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
