"""The resolved run in ten lines.

for name, text in run_lines(run):
    print(f"{name:<10} {text}")
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftjax.words import short

if TYPE_CHECKING:
    from ftjax.config import Mesh, Run
    from ftjax.schema import Component

OFF = ("", "auto", "none", (), None, False)  # values that need not be told
WIDEST = 100


def run_lines(run: Run) -> list[tuple[str, str]]:
    """(name, text) of the ten things that matter."""
    o, t, c = run.optim, run.train, run.compute
    optim = [o.name, f"lr {o.lr:g}", o.schedule]
    optim += [f"warm-up {o.warmup}"] if o.warmup else []
    optim += [f"weight decay {o.weight_decay:g}"] if o.weight_decay else []
    optim += [f"clip {o.clip:g}"] if o.clip else []
    micro = f" (in {t.accumulate} micro-batches)" if t.accumulate > 1 else ""
    steps = [f"{t.steps} steps x {t.batch} rows{micro} x {run.loader.max_length} tokens"]
    for word, every in (("evaluated", run.evaluate.every), ("saved", run.checkpoint.every)):
        steps += [f"{word} every {every}"] if every else []
    lines = {
        "model": described(run.model),
        "peft": described(run.peft),
        "objective": f"{described(run.objective)}, regime {run.regime.name}",
        "data": f"{described(run.data)}, packing {run.loader.packing}, loss on {run.loader.loss_on}",
        "optim": ", ".join(optim),
        "steps": ", ".join(steps),
        "compute": f"{c.dtype}, layers {c.layers}, remat {c.remat}, attention {c.attention}",
        "mesh": _mesh(run.mesh),
        "seed": str(run.seed),
        "out": str(run.folder),
    }
    return [(name, short(text, WIDEST)) for name, text in lines.items()]


def described(component: Component) -> str:
    """A component's name and those of its settings that say something: ``lora: rank=16 alpha=32``."""
    settings = " ".join(_settings(component))
    name = str(getattr(component, "name", ""))
    return f"{name}: {settings}" if settings else name


def _settings(component: Component) -> Iterator[str]:
    for key in type(component).model_fields:
        value = getattr(component, key)
        if key != "name" and not (value in OFF or (isinstance(value, float) and value == 0)):
            yield f"{key}={_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mesh(mesh: Mesh) -> str:
    # Devices are not counted here: asking for them would start JAX before the hosts of a cluster have met.
    sizes = {axis: getattr(mesh, axis) for axis in type(mesh).model_fields}
    return " x ".join(f"{axis} {'all the rest' if n == -1 else n}" for axis, n in sizes.items())
