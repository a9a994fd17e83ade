"""What the compiled step does and does not do: read from the program itself, not from a clock."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from ftjax.models.base import Numerics
from ftjax.parallel import xla_flags
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA, up
from tests import tiny

ROWS = 3
TOKENS = ROWS * tiny.LENGTH  # 48, and RANK 4: neither is a side of a weight
each_form = pytest.mark.parametrize("layers", ["scan", "unroll"])


def start(layers: str = "scan", *, chunk: int = 12, peft: Any = None) -> tuple[Any, tiny.Tiny, Any]:
    """(jitted step, a tiny run, its batch)."""
    run = tiny.tiny(peft or LoRA(rank=4), model=tiny.llama(Numerics(layers=layers, loss_chunk=chunk)))
    return jax.jit(run.program.train, donate_argnums=0), run, tiny.batch(ROWS, micro=1)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of inner programs (scan, derivatives) included."""
    yield from jaxpr.eqns
    for inner in subjaxprs(jaxpr):
        yield from equations(inner)


def products(step: Any, run: tiny.Tiny, batch: Any) -> set[tuple[int, ...]]:
    """Shapes of all matrix products of a step."""
    program = step.trace(run.state, run.frozen, batch).jaxpr.jaxpr
    return {e.outvars[0].aval.shape for e in equations(program) if e.primitive.name == "dot_general"}


def kernels(run: tiny.Tiny) -> set[tuple[int, ...]]:
    """Shapes that the gradient of a base kernel of one layer can have, before or after transposing."""
    shapes = {s.unstacked.shape for s in run.model.table.values() if s.kind in ("kernel", "embed")}
    return shapes | {shape[::-1] for shape in shapes}


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree; a random key counts as its data."""
    keys = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return sum((jax.random.key_data(x) if keys(x) else x).nbytes for x in jax.tree.leaves(tree))


def logits_in(text: str) -> list[str]:
    """Arrays of a compiled program that hold the logits of all tokens."""
    shapes = re.findall(r"\b\w+\[([\d,]+)\]", text)
    sides = [[int(n) for n in shape.split(",")] for shape in shapes]
    return [str(s) for s in sides if tiny.VOCAB in s and math.prod(s) >= TOKENS * tiny.VOCAB]


@each_form
def test_a_step_compiles_once(layers):
    step, run, batch = start(layers)
    state = run.state
    for _ in range(4):
        state, _ = step(state, run.frozen, batch)
    assert step._cache_size() == 1


@each_form
def test_no_gradient_of_a_frozen_weight(layers):
    step, run, batch = start(layers)
    assert not products(step, run, batch) & kernels(run)


@each_form
def test_the_search_for_weight_gradients_finds_them_where_they_are(layers):
    step, run, batch = start(layers, peft=Full())
    expected = {s.unstacked.shape for s in run.model.table.values() if s.kind == "kernel"}
    found = products(step, run, batch)
    assert all(shape in found or shape[::-1] in found for shape in expected)


@each_form
def test_no_frozen_leaf_is_returned(layers):
    step, run, batch = start(layers)
    state, metrics = jax.eval_shape(step, run.state, run.frozen, batch)
    assert jax.tree.structure(state) == jax.tree.structure(run.state)
    returned = {x.shape for x in jax.tree.leaves((state, metrics))}
    frozen = {x.shape for x in jax.tree.leaves(run.frozen) if x.ndim >= 2}
    assert frozen and not returned & frozen


@each_form
def test_just_the_state_is_donated(layers):
    step, run, batch = start(layers)
    memory = step.lower(run.state, run.frozen, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes == nbytes(run.state)
    learnt = nbytes((run.state.trainable, run.state.opt))
    numbers = nbytes((run.state.step, run.state.rng, run.state.const, run.state.hyper))
    assert nbytes(run.state) == learnt + numbers and numbers < 1024
    # Beyond the state, only the scalars of the log come out.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024


@each_form
@pytest.mark.parametrize("chunk", [12, 24])
def test_the_logits_of_all_tokens_never_exist(layers, chunk):
    step, run, batch = start(layers, chunk=chunk)
    compiled = step.lower(run.state, run.frozen, batch).compile()
    assert not logits_in(compiled.as_text())


def test_the_search_for_logits_finds_them_where_they_are():
    step, run, batch = start(chunk=0)
    assert logits_in(step.lower(run.state, run.frozen, batch).compile().as_text())


def test_the_low_rank_product_has_the_plain_gradient_also_under_vmap():
    def both(z, b):
        plain = jax.grad(lambda z, b: jnp.sin(z @ b).sum(), (0, 1))(z, b)
        return plain, jax.grad(lambda z, b: jnp.sin(up(z, b)).sum(), (0, 1))(z, b)

    z, b = jax.random.normal(jax.random.key(0), (2, 3, 5, 4)), jax.random.normal(jax.random.key(1), (2, 4, 7))
    for plain, ours in (both(z[0], b[0]), jax.vmap(both)(z, b)):
        for x, y in zip(plain, ours, strict=True):
            np.testing.assert_allclose(y, x, rtol=2e-6, atol=2e-6)


# Settings of the process -----------------------------------------------------------------------------------------------

OURS = " ".join(xla_flags.ONEDNN)


def test_flags_come_after_what_the_user_set():
    given = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert xla_flags.flags(given, machine="x86_64", jaxlib="0.12.0.1") == f"{given['XLA_FLAGS']} {OURS}"
    assert xla_flags.flags({}, machine="AMD64", jaxlib="0.11.2") == OURS


@pytest.mark.parametrize("word", ["--xla_cpu_use_onednn=false", "--xla_cpu_experimental_onednn_fusion_type=eltwise"])
def test_flags_of_the_user_stay(word):
    assert xla_flags.flags({"XLA_FLAGS": word}, machine="x86_64", jaxlib="0.12.0.1") == word


@pytest.mark.parametrize(("machine", "jaxlib"), [("aarch64", "0.12.0.1"), ("x86_64", "0.10.2"), ("x86_64", "0.13.0")])
def test_no_flags_where_they_were_not_tried(machine, jaxlib):
    assert xla_flags.flags({}, machine=machine, jaxlib=jaxlib) == ""


def test_large_pages_leave_the_users_tunables_alone():
    assert xla_flags.large_pages({}, libc="glibc") == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert xla_flags.large_pages({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, libc="glibc") == {}
    assert xla_flags.large_pages({}, libc="") == {}


UNDER_FLAGS = """
import os, platform
from ftjax.parallel import xla_flags
if __name__ == "__main__":
    xla_flags.restart_with_large_pages()
    xla_flags.apply()
    import jax, numpy as np
    from ftjax.models.base import Numerics
    from ftjax.peft.base import bind
    from tests import tiny
    run = tiny.tiny(model=tiny.llama(Numerics(layers="unroll"), hidden_size=64, intermediate_size=160))
    inputs = {"input_ids": tiny.batch(8).tokens}
    look = jax.jit(lambda params: run.model.apply(params, inputs).logits)
    assert np.array_equal(look(run.base), look(bind(run.base, run.overlay))), "not the identity"
    step = jax.jit(run.program.train)
    batch = tiny.batch(8, micro=1)
    first, again = (jax.tree.leaves(step(run.state, run.frozen, batch)[0].trainable) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(first, again)), "not deterministic"
    print("pages", os.environ.get("GLIBC_TUNABLES", "none"))
    print("onednn", "__onednn" in step.lower(run.state, run.frozen, batch).compile().as_text())
"""


def test_the_flags_take_effect_and_change_neither_identity_nor_repeatability(tmp_path):
    script = tmp_path / "under_flags.py"
    script.write_text(UNDER_FLAGS, encoding="utf-8")
    drop = ("XLA_FLAGS", "GLIBC_TUNABLES")
    keep = {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(script)], env=keep, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    value = xla_flags.flags({}, machine=os.uname().machine, jaxlib=jax.lib.__version__)
    assert f"onednn {bool(value)}" in done.stdout
    if xla_flags.large_pages({}, libc=platform.libc_ver()[0]):
        assert f"pages {xla_flags.LARGE_PAGES}" in done.stdout
