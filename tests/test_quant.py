"""Quantized bases: codes against the published algorithm in numpy, gradients, memory, sharding, the whole program."""

from __future__ import annotations

import dataclasses as dc
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import config, registry
from ftjax.configfile import load
from ftjax.errors import ConfigError
from ftjax.models import hf
from ftjax.models.base import Numerics
from ftjax.parallel.mesh import Placement, axes_of_store, make_mesh
from ftjax.params import ParamSpec, cut, join
from ftjax.peft.base import bind, merge
from ftjax.peft.lora import LoRA
from ftjax.quant import base as quant
from ftjax.quant.base import bits_per_parameter, pack_store, unpack_store
from ftjax.quant.fp8 import FP8, FP8Weight
from ftjax.quant.int8 import Int8, Int8Weight
from ftjax.quant.nf4 import D8_VALUES, NF4, NF4_VALUES, NF4Weight
from ftjax.report.parameters import QUANTIZED, parameter_report
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.state import whole
from tests import tiny
from tests.test_hlo import equations

ROOT = Path(__file__).resolve().parent.parent
STORAGES = {"nf4": NF4(), "nf4-single": NF4(double=False), "int8": Int8(), "fp8": FP8()}
each = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
# (in, out): whole blocks of one output; blocks across outputs, the last not full; odd numbers of weights
SHAPES = [(256, 96), (128, 300), (96, 50), (33, 5)]


def gaussian(shape: tuple[int, ...], *, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# The published algorithm, a second time -------------------------------------------------------------------------------


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """By trying all values in float64; of two equally near the lower."""
    return np.abs(x.astype(np.float64)[..., None] - np.asarray(values, np.float64)).argmin(-1)


def blocks_of(flat: np.ndarray, size: int) -> list[np.ndarray]:
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def published_nf4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, absmax) of a kernel [in, out], read as torch holds it."""
    codes, absmax = [], []
    for block in blocks_of(w.T.flatten(), 64):
        absmax.append(np.abs(block).max())
        codes += list(nearest(block * (np.float32(1) / absmax[-1]), np.array(NF4_VALUES)))
    codes += [7] * (-len(codes) % 64)
    return np.array([16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]), np.array(absmax)


def published_double(absmax: np.ndarray, mean: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(codes, absmax of absmax)."""
    blocks = blocks_of(absmax - mean, 256)
    nested = [np.abs(b).max() for b in blocks]
    return np.concatenate([nearest(b * (np.float32(1) / m), D8_VALUES) for b, m in zip(blocks, nested, strict=True)]), (
        np.array(nested)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_the_published_algorithm(shape):
    w = gaussian(shape, scale=0.02)
    codes, absmax = published_nf4(w)
    single, double = NF4(double=False).encode(w), NF4().encode(w)
    for q in (single, double):
        np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), codes)
    np.testing.assert_array_equal(np.asarray(single.absmax).reshape(-1), absmax)
    assert double.absmax2 is not None and double.mean is not None
    np.testing.assert_allclose(double.mean, absmax.mean(dtype=np.float64), rtol=3e-7)
    codes8, absmax2 = published_double(absmax, np.float32(double.mean))
    np.testing.assert_array_equal(np.asarray(double.absmax).reshape(-1), codes8)
    np.testing.assert_array_equal(double.absmax2, absmax2)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_values_are_table_times_scale(shape):
    w = gaussian(shape)
    codes, absmax = published_nf4(w)
    values = np.array(NF4_VALUES, np.float32)[np.stack([codes >> 4, codes & 15], -1).reshape(-1)][: w.size]
    want = (values * np.repeat(absmax, 64)[: w.size]).reshape(shape[::-1]).T
    np.testing.assert_array_equal(NF4(double=False).encode(w).materialize(), want)
    assert np.abs(want - NF4().encode(w).materialize()).max() < 0.02 * np.abs(w).max()


def test_the_nf4_values_are_the_quantiles_of_a_normal_distribution():
    norm = pytest.importorskip("scipy.stats").norm
    outermost = (
        1 - 1 / 32 + 1 - 1 / 30
    ) / 2  # appendix E: between the middles of the last of 16 and of 15 equal shares
    upper = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    lower = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([upper, lower, [0]]))
    np.testing.assert_allclose(NF4_VALUES, want / want.max(), atol=3e-7)


def test_the_table_of_scales_has_256_values_over_seven_decades():
    assert len(np.unique(D8_VALUES)) == 256 and (D8_VALUES[-1], D8_VALUES[127]) == (1, 0)
    inside = np.delete(D8_VALUES, [127, 255])
    np.testing.assert_allclose(inside, -inside[::-1])
    counts = np.histogram(np.log10(inside[inside > 0]), bins=np.arange(-7, 1))[0]
    np.testing.assert_array_equal(counts, 2 ** np.arange(7))


def test_a_block_of_zeros_stays_zero():
    w = gaussian((128, 8))
    w[:64, 3] = 0
    for storage in STORAGES.values():
        q = np.asarray(storage.encode(w).materialize())
        assert not q[:64, 3].any() and np.isfinite(q).all()
    for storage in (Int8(), FP8()):
        assert not np.asarray(storage.encode(0 * w).materialize()).any()


def test_int8_by_output_channels():
    w = gaussian((48, 20))
    q = Int8().encode(w)
    absmax = np.abs(w).max(0)
    np.testing.assert_array_equal(q.absmax, absmax)
    np.testing.assert_array_equal(q.codes, np.rint(w * (np.float32(127) / absmax)))
    assert (np.abs(q.materialize() - w) <= absmax / 127 * 0.5001).all()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_fp8_by_output_channels(scale):
    w = gaussian((96, 40), scale=scale)
    w[:8] *= 1e-3  # below the smallest normal number in units of the largest: these have fewer bits
    q = FP8().encode(w)
    absmax = np.abs(w).max(0)
    np.testing.assert_array_equal(q.absmax, absmax)
    codes = np.asarray(q.codes)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    want = (w * (np.float32(448) / absmax)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes, want.view(np.uint8))
    assert np.abs(values).max(0).min() == np.abs(values).max() == 448  # the whole range, and nothing beyond it (NaN)
    # 3 bits after the point: half a step is 2^-4 of the number, and 2^-10 below the smallest normal number, 2^-6
    bound = np.maximum(2.0**-4 * np.abs(w), 2.0**-10 * absmax / 448) * 1.0001
    assert (np.abs(q.materialize() - w) <= bound).all()
    again = FP8().encode(np.asarray(q.materialize()))
    np.testing.assert_array_equal(again.codes, codes)


def test_fp8_is_for_heavy_tails_and_int8_for_normal_weights():
    """Root mean square of the error over that of the weights. FP8's is 2.6 % whatever the tail, int8's grows with it."""
    rng, shape = np.random.default_rng(0), (1024, 256)
    spiked = rng.normal(size=shape) * np.where(np.arange(1024)[:, None] % 256 == 7, 30, 1)  # 4 inputs 30 times as large
    kinds = {"normal": rng.normal(size=shape), "t2": rng.standard_t(2, size=shape), "spiked": spiked}

    def error(storage, w):
        w = w.astype(np.float32)
        return float(np.sqrt(((storage.encode(w).materialize() - w) ** 2).mean() / (w**2).mean()))

    fp8, int8 = ({k: error(s, w) for k, w in kinds.items()} for s in (FP8(), Int8()))
    assert fp8["normal"] == pytest.approx(0.0265, abs=5e-4) and int8["normal"] == pytest.approx(0.0079, abs=2e-4)
    assert fp8["t2"] < 0.5 * int8["t2"] and fp8["spiked"] < 0.4 * int8["spiked"]
    assert max(fp8.values()) < 0.027 and min(fp8.values()) > 0.015


def test_bits_per_parameter_of_a_100_million_parameter_model():
    model = tiny.llama(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64,
    )  # fmt: skip

    def bits(storage):
        shapes = {k: jax.ShapeDtypeStruct(s.shape, jnp.float32) for k, s in model.table.items() if s.kind != "site"}
        packed = jax.eval_shape(lambda p: pack_store(storage, p, model.table), shapes)
        assert 1e8 < sum(v.entries for v in packed.values() if isinstance(v, quant.Quantized)) < 1.1e8
        return bits_per_parameter(packed)

    assert abs(bits(NF4()) - 4.127) < 1e-3
    assert abs(bits(NF4(double=False)) - 4.5) < 1e-9
    assert 8 < bits(Int8()) < 8.05
    assert bits(FP8()) == bits(Int8())


def test_the_error_on_normal_weights_is_below_that_of_int4_and_fp4():
    w = gaussian((1024, 256))

    def error(values):
        values = np.sort(np.array(values)) / np.abs(values).max()
        rows = w.T.reshape(-1, 64)
        scale = np.abs(rows).max(1, keepdims=True)
        at = np.searchsorted((values[1:] + values[:-1]) / 2, rows / scale)
        return float(((values[at] * scale - rows) ** 2).mean())

    fp4 = [s * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1, -1)]
    ours = [float(((NF4(double=d).encode(w).materialize() - w) ** 2).mean()) for d in (True, False)]
    assert max(ours) < 0.9 * min(error(np.arange(-7, 8)), error(np.arange(-8, 8)), error(fp4))
    assert ours[0] < 1.01 * ours[1]
    np.testing.assert_allclose(ours[1], error(NF4_VALUES), rtol=1e-4)


# In a model -----------------------------------------------------------------------------------------------------------


def packed(storage, model=None):
    """(model, its weights, the same quantized)."""
    model = model or tiny.llama()
    base = tiny.weights(model)
    return model, base, pack_store(storage, base, model.table)


@each
def test_only_the_kernels_of_blocks_are_quantized(storage):
    model, base, held = packed(storage)
    for key, spec in model.table.items():
        if spec.kind != "site":
            quantized = key.startswith("layers") and spec.kind == "kernel"
            assert isinstance(held[key], quant.Quantized) == quantized, key
            assert quantized or held[key] is base[key]
    assert 0.3 > tiny.relative(unpack_store(held), base) > 1e-3


CASES = [f"nf4 scan {peft}" for peft in ("lora", "dora", "ia3", "prompt", "prefix")]


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        "nf4 unroll lora",
        "nf4-single scan lora",
        "int8 scan lora",
        "int8 scan dora",
        "fp8 scan lora",
        "fp8 unroll lora",
    ],
)
def test_numbers_equal_those_of_the_dequantized_base(case):
    name, layers, peft = case.split()
    storage = STORAGES[name]
    model, _, held = packed(storage, tiny.llama(Numerics(layers=layers), num_hidden_layers=2))
    plain = unpack_store(held)
    method = registry.get("peft", peft)()
    a, b = (tiny.tiny(method, model=model, base=x, randomize=True) for x in (held, plain))
    inputs = {"input_ids": tiny.batch(3).tokens}
    look = jax.jit(model.apply)
    out = [look(bind(whole(t.parts, t.parts.frozen, {})["base"], whole(t.parts, t.parts.frozen, {})["overlay"]), inputs)
           for t in (a, b)]  # fmt: skip
    assert tiny.relative(out[0].logits, out[1].logits) < 1e-6

    def gradients(t):
        batch = tiny.batch(3)
        loss = lambda x: sum(t.program.output(x, {}, t.state, t.frozen, batch, None).sums.values())  # noqa: E731
        return jax.jit(jax.grad(loss))(t.state.trainable)

    found, wanted = gradients(a), gradients(b)
    # By norms, over two layers: the kernel lies transposed, so the product sums in another order than a plain array's.
    # Over four layers plain arrays in the two orders differ by 0.8e-6 themselves, and NF4 from the plain one by 1.2e-6.
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.linalg.norm(x - y) < 1e-6 * jnp.linalg.norm(y)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)) > 1e-3


def kernel_stacks(model, held, *, peft) -> list[tuple[int, ...]]:
    """Arrays in the program of a step that have the size of all layers of a quantized kernel, or are copies of its codes."""
    t = tiny.tiny(peft, model=model, base=held)
    program = jax.jit(t.program.train).trace(t.state, t.frozen, tiny.batch(3, micro=1)).jaxpr.jaxpr
    kernels = {model.table[k].shape for k, v in held.items() if isinstance(v, quant.Quantized)}
    kernels |= {(n, o, i) for n, i, o in kernels}
    codes = {(v.codes.shape, v.codes.dtype) for v in held.values() if isinstance(v, NF4Weight | Int8Weight | FP8Weight)}
    made = [v.aval for e in equations(program) for v in e.outvars]
    return [a.shape for a in made if a.shape in kernels or (a.shape, a.dtype) in codes]


@pytest.mark.parametrize("storage", [NF4(), Int8(), FP8()], ids=["nf4", "int8", "fp8"])
@pytest.mark.parametrize("peft", ["lora", "dora"])
def test_no_dequantized_stack_is_kept_for_the_backward_pass(storage, peft):
    model, _, held = packed(storage)
    assert not kernel_stacks(model, held, peft=registry.get("peft", peft)(rank=3))


def test_the_search_for_residuals_finds_those_of_a_plain_product(monkeypatch):
    monkeypatch.setattr(quant, "product", lambda x, w: x @ w.kernel().astype(x.dtype))
    model, _, held = packed(NF4())
    assert len(kernel_stacks(model, held, peft=LoRA(rank=3))) >= 7


@pytest.mark.parametrize("storage", [NF4(), Int8(), FP8()], ids=["nf4", "int8", "fp8"])
def test_memory_of_the_compiled_step(storage):
    """Neither saved kernels nor constants that the compiler moves out of the loop: 16 kernels' worth, once."""
    model, base, held = packed(
        storage,
        tiny.llama(Numerics(loss_chunk=12), hidden_size=256, intermediate_size=512, num_hidden_layers=4, head_dim=64),
    )
    sizes = []
    for x in (base, held):
        t = tiny.tiny(LoRA(rank=4), model=model, base=x)
        step = jax.jit(t.program.train, donate_argnums=0)
        sizes.append(step.lower(t.state, t.frozen, tiny.batch(3, micro=1)).compile().memory_analysis())
    plain, ours = sizes
    kernel = 4 * 256 * 512
    saved = sum(math.prod(s.shape) * 4 for k, s in model.table.items() if storage.covers(k, s))
    assert ours.temp_size_in_bytes < plain.temp_size_in_bytes + 2 * kernel
    share = bits_per_parameter(held) / 32
    assert ours.argument_size_in_bytes == pytest.approx(plain.argument_size_in_bytes - (1 - share) * saved, rel=1e-3)


@each
def test_stacks_are_cut_and_joined(storage):
    model, _, held = packed(storage)
    parts = cut(held, {"layers": {1, 3}})
    assert {k for k in parts if k.endswith("q/w")} == {f"layers[{r}]/q/w" for r in ("0:1", "1:3", "3:4")}
    jax.tree.map(np.testing.assert_array_equal, join(parts), held)
    np.testing.assert_array_equal(parts["layers[1:3]/q/w"].materialize(), unpack_store(held)["layers[0:4]/q/w"][1:3])
    step = tiny.tiny(LoRA(rank=4, layers=(1, 3)), model=model, base=held)
    assert {k for k in step.overlay if k.endswith("q/w")} == {"layers[1:2]/q/w", "layers[3:4]/q/w"}


SPLIT = [("nf4", (32, 48)), ("nf4", (128, 256)), ("int8", (128, 256)), ("fp8", (128, 256))]


@pytest.mark.parametrize(("name", "sizes"), SPLIT, ids=["nf4-flat", "nf4-rows", "int8", "fp8"])
def test_eight_devices_equal_one(name, sizes):
    storage = STORAGES[name]
    model, _, held = packed(storage, tiny.llama(hidden_size=sizes[0], intermediate_size=sizes[1]))
    # So that a gradient that is rounding alone is not a step of random sign: what is measured here falls as 1 / eps.
    optim = config.Optim(lr=1e-2, eps=1e-3)
    t, data = tiny.tiny(LoRA(rank=4), model=model, base=held, optim=optim), tiny.batch(16, micro=2)
    want, once = t.state, jax.jit(t.program.train)
    for _ in range(2):
        want, _ = once(want, t.frozen, data)
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    p = Placement(mesh, axes_of_store({"base": t.base, "overlay": t.overlay}, model.table))
    states, frozen = p.tree(t.state), p.tree(t.frozen)
    placed = jax.device_put(t.frozen, frozen), jax.device_put(data, p.batch(1))
    codes = [x for x in jax.tree.leaves(placed[0]) if x.dtype in (jnp.uint8, jnp.int8)]
    split = [x for x in codes if not x.is_fully_replicated]
    flat = sizes[0] % 64 and isinstance(storage, NF4)
    assert bool(split) != bool(flat)  # blocks that run across outputs lie whole on every device
    step = jax.jit(t.program.train, in_shardings=(states, frozen, p.batch(1)), out_shardings=(states, p.replicated))
    state = jax.device_put(t.state, states)
    for _ in range(2):
        state, _ = step(state, *placed)
    assert tiny.relative(state.trainable, want.trainable) < 2e-4


@pytest.mark.parametrize("storage", [NF4(), Int8(), FP8()], ids=["nf4", "int8", "fp8"])
def test_going_on_from_a_checkpoint_equals_not_stopping(storage, tmp_path):
    model, base, held = packed(storage)
    t, data = tiny.tiny(LoRA(rank=4, dropout=0.1), model=model, base=held), tiny.batch(4, micro=2)
    step = jax.jit(t.program.train)
    states = [t.state]
    for _ in range(3):
        states.append(step(states[-1], t.frozen, data)[0])
    with Checkpoints(tmp_path, message=pytest.fail) as checkpoints:
        checkpoints.save(1, states[1], extra={})
        checkpoints.wait()
        restored = checkpoints.restore(t.state)
    assert restored is not None
    state = restored.state
    again = tiny.tiny(LoRA(rank=4, dropout=0.1), model=model, base=pack_store(storage, base, model.table))
    for _ in range(2):
        state, _ = step(state, again.frozen, data)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, states[3].trainable)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.trainable, t.state.trainable)), strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), ("int8", "float32"), ("fp8", "float32")]
)
def test_a_merged_model_is_plain(name, dtype):
    storage = STORAGES[name]
    model = tiny.llama()
    base = {k: v.astype(dtype) for k, v in tiny.weights(model).items()}
    held = pack_store(storage, base, model.table)
    t = tiny.tiny(LoRA(rank=4, targets=("q_proj",)), model=model, base=held, randomize=True)
    store = whole(t.parts, t.parts.frozen, {})
    folded = merge(bind(store["base"], store["overlay"]), model.table)
    assert all(isinstance(v, jax.Array) and v.dtype == dtype for v in folded.values())
    delta, key = store["overlay"]["layers[0:4]/q/w"], "layers[0:4]/q/w"
    want = held[key].materialize() + delta.scale[:, None, None] * (delta.a @ delta.b)
    assert tiny.relative(folded[key].astype(jnp.float32), want) < (1e-6 if dtype == "float32" else 2**-8)
    # Not bit for bit: within one program the scales' product and sum are rounded once.
    other = "layers[0:4]/up/w"
    assert tiny.relative(folded[other], unpack_store(held)[other]) < (1e-6 if dtype == "float32" else 2**-8)


# Loading, refusals, report --------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_quantized_as_it_is_read(storage, dtype, tmp_path):
    model = tiny.llama(tie_word_embeddings=True)
    folder = hf.save(model, tiny.weights(model), tmp_path)
    plain, held = hf.load(str(folder), dtype=dtype)[1], hf.load(str(folder), dtype=dtype, storage=storage)[1]
    want = pack_store(storage, plain, model.table)
    assert list(held) == list(want)
    jax.tree.map(np.testing.assert_array_equal, held, want)
    seen = []
    place = lambda _: lambda key, x: seen.append(key) or jnp.asarray(x)  # noqa: E731
    hf.load(str(folder), storage=storage, place=place)
    assert {"layers[0:4]/q/w/codes", "layers[0:4]/q/w/absmax", "embed/w"} <= set(seen)


TRAINS = {"full": {}, "partial": {"last": 1}}
LEAVES = {"norms": {}, "lora": {}, "prompt": {}, "partial": {"last": 0, "parts": ("norm/*",)}}


@pytest.mark.parametrize("name", TRAINS)
def test_methods_that_train_quantized_weights_are_refused(name):
    model, _, held = packed(NF4())
    with pytest.raises(ConfigError, match=r"trains layers/.*/w.* which model.quantize holds in few bits"):
        tiny.tiny(registry.get("peft", name)(**TRAINS[name]), model=model, base=held)


@pytest.mark.parametrize("name", LEAVES)
def test_methods_that_leave_them_alone_are_not(name):
    model, _, held = packed(NF4())
    assert tiny.tiny(registry.get("peft", name)(**LEAVES[name]), model=model, base=held)


def test_the_config_is_refused_before_anything_is_loaded(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from ftjax.config import Run\ndef get_config():\n    return Run()\n")
    with pytest.raises(ConfigError) as caught:
        load(file, ["peft=full", "model.quantize=nf4"])
    assert "peft=full, model.quantize=nf4  the method trains layers/" in str(caught.value)
    with pytest.raises(ConfigError, match="trains layers/"):
        load(file, ["peft=partial", "model.quantize=int8"])
    with pytest.raises(ConfigError, match="Known: fp8, int8, nf4, none"):
        load(file, ["model.quantize=nf5"])
    assert load(file, ["model.quantize=nf4"]).model.quantize == NF4()
    assert load(file, ["model.quantize=nf4", "model.quantize.double=false"]).model.quantize == NF4(double=False)
    assert load(file, ["model.quantize=fp8"]).model.quantize == FP8()
    for peft in ("norms", "lora"):
        assert load(file, [f"peft={peft}", "model.quantize=int8"]).model.quantize == Int8()


def test_the_report_counts_what_the_bits_stand_for():
    model, base, held = packed(NF4())
    rows = {}
    for name, x in (("plain", base), ("held", held)):
        t = tiny.tiny(LoRA(rank=4), model=model, base=x)
        report = parameter_report(model.table, t.parts.trainable, t.parts.const, t.parts.frozen, t.parts.groups)
        rows[name] = report
    assert rows["plain"].total == rows["held"].total and rows["plain"].trainable == rows["held"].trainable
    row = next(r for r in rows["held"].rows if r.name == QUANTIZED)
    assert row.tensors == 28 and row.bytes < 0.55 * row.entries


def test_axes_name_every_array_of_a_weight():
    spec = ParamSpec((3, 128, 64), ("layer", "embed", "mlp"))
    for storage in STORAGES.values():
        weight = jax.vmap(lambda w, s=storage: s.pack(w, "float32"))(jnp.ones(spec.shape))
        axes = weight.axes(spec)
        arrays = {
            f.name: getattr(weight, f.name) for f in dc.fields(weight) if hasattr(getattr(weight, f.name), "ndim")
        }
        assert {k: len(v) for k, v in axes.items()} == {k: v.ndim for k, v in arrays.items()}
    assert weight.layers == 3 and isinstance(NF4().encode(np.ones((64, 2), np.float32)), NF4Weight)


# The whole program ----------------------------------------------------------------------------------------------------


def run(*words: str) -> str:
    keep = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path("~/.cache/ftjax/test-xla").expanduser())
    env = keep | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_shipped_base_is_trained_resumed_and_merged(tmp_path):
    rows = [{"prompt": f"def f{i}(x):", "completion": f" return x + {i}"} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = [
        "train", "--config", str(ROOT / "configs" / "forkme.py"), "model=pretrained", "model.quantize=nf4",
        "peft=lora", "peft.rank=2", "data=local", f"data.path={tmp_path / 'data.jsonl'}", "loader.max_length=32",
        "train.steps=4", "train.batch=4", "train.accumulate=2", "compute.dtype=float32",
        "optim.warmup=0", "checkpoint.every=2", "evaluate.generate=0",
        "evaluate.examples=4", "evaluate.every=0", "evaluate.patience=0", "evaluate.metric_examples=0", "compute.layers=scan",
    ]  # fmt: skip
    text = run(*words, f"out={tmp_path / 'a'}")
    assert "frozen, quantized" in text
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "4")  # as if it had been stopped after step 2
    shutil.rmtree(tmp_path / "b" / "adapter")
    assert "resuming after step 2" in run(*words, f"out={tmp_path / 'b'}")
    a, b = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and any(v.any() for k, v in a.items() if "lora_B" in k)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    text = run("merge", "--run", str(tmp_path / "a"), "--to", str(tmp_path / "merged"))
    assert "the base is quantized (4.13 bits per parameter)" in text and "not quantized" in text
    model, params = hf.load(str(tmp_path / "merged"))
    assert not bits_per_parameter(params) and set(params) == {k for k, s in model.table.items() if s.kind != "site"}
