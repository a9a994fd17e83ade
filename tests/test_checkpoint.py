"""Checkpoints: bit-exact, verified, and whole whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from ftjax.errors import CheckpointError
from ftjax.train import checkpoint, leaves
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.manifest import MANIFEST, sealed
from ftjax.train.metrics import MetricLog


@pytest.fixture(autouse=True)
def late_writes(monkeypatch):
    """When one write fails, orbax closes its event loop; TensorStore's other writes then have nobody to answer to."""
    report = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", hook)


@struct.dataclass
class State:
    step: jax.Array
    trainable: dict
    opt: Any
    rng: jax.Array
    mutable: dict


def make_state(seed: int = 0, rank: int = 4) -> State:
    """Everything a state can hold: holes, NamedTuples, bfloat16, integers, keys, an empty leaf, odd bit patterns."""
    key = jax.random.key(seed)
    odd = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 1], np.uint32).view(np.float32)
    trainable = {
        "layers[0:2]/q/w": {"a": jax.random.normal(key, (2, 8, rank)), "b": jnp.zeros((2, rank, 8))},
        "frozen": None,
        "head.w": jax.random.normal(key, (8, 3)).astype(jnp.bfloat16),
        "odd": jnp.asarray(odd),
        "empty": jnp.zeros((0, 3)),
    }
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(trainable)
    return State(jnp.int32(7), trainable, opt, jax.random.split(key, 3), {"rbg": jax.random.key(seed, impl="rbg")})


def bits(tree: Any) -> dict[str, tuple]:
    def of(x):
        x = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        return x.tobytes()

    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p): (str(x.dtype), x.shape, of(x)) for p, x in pairs}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def filled(folder: Path, steps: tuple[int, ...] = (3, 6, 9), keep: int = 5) -> dict[int, State]:
    states = {step: make_state(step) for step in steps}
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, extra={"position": step}, metric=1 / step)
            checkpoints.wait()
    return states


def test_restored_equals_saved_bit_for_bit(tmp_path):
    state = make_state()
    extra = {"data": {"position": 12, "seed": "x"}, "best": 0.1 + 0.2}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state) is None
        assert checkpoints.save(7, state, extra=extra, metric=1.5)
        extra["data"]["position"] = 99  # what the loop does next may not reach the file
    for template in (make_state(1), abstract(state)):
        with Checkpoints(tmp_path / "c") as checkpoints:
            found = checkpoints.restore(template)
            assert checkpoints.last_step == checkpoints.best_step == 7
        assert bits(found.state) == bits(state)
        assert jax.tree.structure(found.state) == jax.tree.structure(state)
        assert found.step == 7 and found.lost == 0
        assert found.extra == {"data": {"position": 12, "seed": "x"}, "best": 0.1 + 0.2}
        assert jnp.array_equal(jax.random.bits(found.state.mutable["rbg"]), jax.random.bits(state.mutable["rbg"]))


def test_donated_buffers_do_not_reach_the_file(tmp_path):
    step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = step(jnp.zeros(2_000_000))
    saved = np.array(x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, extra={})
        for _ in range(20):
            x = step(x)
        checkpoints.wait()
        found = checkpoints.restore({"x": x})
    assert np.array_equal(np.asarray(found.state["x"]), saved)


def test_sharded_restore(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.P("data"))
    state = {"w": jnp.arange(64.0).reshape(16, 4), "keys": jax.random.split(jax.random.key(0), 16)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(state, split), extra={})
        checkpoints.wait()
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), state)
        found = checkpoints.restore(template)
        whole = checkpoints.restore(state)
    assert found.state["w"].sharding == split and found.state["keys"].sharding.is_equivalent_to(split, 1)
    assert bits(found.state) == bits(state) == bits(whole.state)


def test_saving_does_not_wait_for_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint, "hash_files", lambda path, real=checkpoint.hash_files: (time.sleep(0.5), real(path))[1]
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), extra={})  # also warms up
        checkpoints.wait()
        start = time.monotonic()
        checkpoints.save(2, make_state(), extra={})
        assert time.monotonic() - start < 0.4
        assert checkpoints.last_step == 1 and checkpoints.steps == (1,)
        checkpoints.wait()
        assert checkpoints.last_step == 2


def test_newest_and_best_are_kept(tmp_path):
    losses = {1: float("nan"), 2: 1.0, 3: None, 4: 2.0, 5: float("-inf"), 6: 1.0}
    with Checkpoints(tmp_path / "best", keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), extra={}, metric=loss)
        checkpoints.wait()
        assert checkpoints.steps == (2, 5, 6) and checkpoints.best_step == 2
    with Checkpoints(tmp_path / "best", keep=1) as checkpoints:
        assert checkpoints.best_step == 2
        assert bits(checkpoints.load(2, make_state()).state) == bits(make_state(2))
        checkpoints.restore(make_state())
        checkpoints.save(7, make_state(), extra={})
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["2", "7"]
    with Checkpoints(tmp_path / "plain", keep=2, keep_best=False) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), extra={}, metric=loss)
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == ["5", "6"]


def test_saving_the_same_step_again_is_said_and_harmless(tmp_path):
    said: list[str] = []
    filled(tmp_path, (3,))
    with Checkpoints(tmp_path, message=said.append) as checkpoints:
        checkpoints.restore(make_state())
        assert checkpoints.save(3, make_state(5), extra={}) is False
        assert said == ["the checkpoint of step 3 exists already and stays as it is"]
        assert bits(checkpoints.restore(make_state()).state) == bits(make_state(3))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def array_file(step: Path) -> Path:
    return max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def drop(path: Path) -> None:
    path.unlink()


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def swap_dtype(step: Path) -> None:
    text = (step / MANIFEST).read_text()
    assert '"bfloat16"' in text
    (step / MANIFEST).write_text(text.replace('"bfloat16"', '"float32"'))


def wrong_step(step: Path) -> None:
    manifest = json.loads((step / MANIFEST).read_text())
    (step / MANIFEST).write_text(sealed(manifest | {"step": 8}))


DAMAGES = {
    "hash": (lambda s: flip(array_file(s), 100), "sha256 of state/"),
    "size": (lambda s: os.truncate(array_file(s), 10), "has 10 bytes, saved were"),
    "missing-file": (lambda s: drop(array_file(s)), "is missing"),
    "empty": (empty, "the folder is empty"),
    "no-manifest": (lambda s: drop(s / MANIFEST), "manifest.json is missing, so nothing proves the files"),
    "manifest": (swap_dtype, "manifest.json does not agree with its own checksum"),
    "manifest ": (lambda s: (s / MANIFEST).write_text("[1]"), "manifest.json does not agree"),
    "manifest  ": (lambda s: os.truncate(s / MANIFEST, 50), "manifest.json does not agree"),
    "step": (wrong_step, "manifest.json is of step 8"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(tmp_path, reason):
    states = filled(tmp_path)
    damage, text = DAMAGES[reason]
    damage(tmp_path / "9")
    said: list[str] = []
    with Checkpoints(tmp_path, keep=5, message=said.append) as checkpoints:
        found = checkpoints.restore(make_state())
        assert found.step == 6 and found.lost == 3 and found.extra == {"position": 6}
        assert bits(found.state) == bits(states[6])
        place = tmp_path / "quarantine" / f"9-{reason.strip()}"
        assert place.is_dir() and checkpoints.steps == (3, 6) and checkpoints.best_step == 6
        assert said[0].startswith("the checkpoint of step 9 is damaged: ") and text in said[0] and str(place) in said[0]
        assert said[1] == "resuming from step 6; 3 steps are lost and will be repeated"
        assert checkpoints.save(9, states[9], extra={})  # the step is reached again
        checkpoints.wait()
        damage(tmp_path / "9")
        with pytest.raises(CheckpointError, match="the checkpoint of step 9 is damaged"):
            checkpoints.load(9, make_state())
        assert (tmp_path / "quarantine" / f"9-{reason.strip()}-2").is_dir()


def test_all_damaged_starts_anew_and_says_so(tmp_path):
    filled(tmp_path, (3, 6))
    for step in (3, 6):
        flip(array_file(tmp_path / str(step)), 8)
    said: list[str] = []
    with Checkpoints(tmp_path, message=said.append) as checkpoints:
        assert checkpoints.restore(make_state()) is None
        assert said[-1] == "no good checkpoint is left: starting anew; 6 steps are lost and will be repeated"
        assert checkpoints.best_step is None and checkpoints.steps == ()


def test_every_flipped_bit_is_found(tmp_path):
    """20 bits at random, evenly over all bytes of the step, and one in each of its files."""
    filled(tmp_path, (9,))
    files = sorted(p for p in (tmp_path / "9").rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) >= 8
    rng = random.Random(0)
    ends = np.cumsum([p.stat().st_size * 8 for p in files])
    spots = [(p, rng.randrange(p.stat().st_size * 8)) for p in files]
    for _ in range(20):
        at = rng.randrange(int(ends[-1]))
        i = int(np.searchsorted(ends, at, side="right"))
        spots.append((files[i], at - int(ends[i - 1] if i else 0)))
    for path, bit in spots:
        assert checkpoint.examine(tmp_path / "9") is None
        flip(path, bit)
        assert checkpoint.examine(tmp_path / "9") is not None, (path, bit)
        flip(path, bit)


def test_an_intact_checkpoint_of_another_state_is_refused_not_set_aside(tmp_path):
    filled(tmp_path, (3,))
    other = make_state(rank=8)
    del other.trainable["odd"]
    other.trainable["heed.w"] = other.trainable.pop("head.w").astype(jnp.float32)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError) as e:
            checkpoints.restore(other)
        assert checkpoints.steps == (3,)
    text = str(e.value)
    assert "the checkpoint of step 3 is intact but belongs to another state (" in text
    assert ".trainable['layers[0:2]/q/w']['a']: saved as float32[2, 8, 4], the run has float32[2, 8, 8]" in text
    with pytest.raises(CheckpointError, match=r"x: saved as float32\[2\], the run has bfloat16\[2\]"):
        leaves.require_same(1, {"x": ["float32", 2]}, {"x": ["bfloat16", 2]})
    with pytest.raises(CheckpointError, match="heed: the run has it, the checkpoint has not. Did you mean 'head'?"):
        leaves.require_same(1, {"head": ["float32"]}, {"heed": ["float32"]})


def test_load_of_an_absent_step(tmp_path):
    filled(tmp_path, (3, 6))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint of step 4. Steps: 3, 6"),
    ):
        checkpoints.load(4, make_state())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_a_reader_changes_nothing(tmp_path):
    """Evaluation looks at a folder in which a training is just saving."""
    filled(tmp_path)
    flip(array_file(tmp_path / "9"), 100)
    (tmp_path / "12.saving").mkdir()
    before = contents(tmp_path)
    said: list[str] = []
    with Checkpoints(tmp_path, readonly=True, message=said.append) as checkpoints:
        assert checkpoints.restore(make_state()).step == checkpoints.best_step == 6
        with pytest.raises(CheckpointError, match="the checkpoint of step 9 is damaged"):
            checkpoints.load(9, make_state())
    assert contents(tmp_path) == before and said[0].endswith("differs from what was saved. It is not used")
    with Checkpoints(tmp_path / "absent", readonly=True) as checkpoints:
        assert checkpoints.restore(make_state()) is None and checkpoints.steps == ()
    assert not (tmp_path / "absent").exists()
    with Checkpoints(tmp_path, keep=5, message=said.append) as checkpoints:
        assert said[-1] == "removed the unfinished checkpoint of step 12" and not (tmp_path / "12.saving").exists()


# Faults while saving.


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["hash_files", "write_atomic", "orbax", "mkdir"])
def test_first_failure_is_reported_second_ends_the_run(tmp_path, monkeypatch, place):
    said: list[str] = []
    with Checkpoints(tmp_path / "c", message=said.append) as checkpoints:
        checkpoints.save(1, make_state(), extra={})
        checkpoints.wait()
        with monkeypatch.context() as m:
            if place == "orbax":
                m.setattr(checkpoints._orbax, "save", full_disk)
            elif place == "mkdir":
                m.setattr(Path, "mkdir", full_disk)
            else:
                m.setattr(checkpoint, place, full_disk)
            checkpoints.save(2, make_state(), extra={})
            with pytest.raises(CheckpointError) as e:
                checkpoints.save(3, make_state(), extra={})
            assert "No space left on device; the last good checkpoint is step 1" in str(e.value)
            assert e.value.exit_code == 3
        assert (
            len(said) == 1 and "No space left on device; the last good checkpoint is step 1. Training cont" in said[0]
        )
        assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1"]  # failed ones give their space back


def test_a_good_save_forgives_and_wait_forgives_nothing(tmp_path, monkeypatch):
    said: list[str] = []
    with Checkpoints(tmp_path / "c", message=said.append) as checkpoints:
        for step in (1, 3):
            with monkeypatch.context() as m:
                m.setattr(checkpoint, "hash_files", full_disk)
                checkpoints.save(step, make_state(), extra={})
                checkpoints._thread.join()
            checkpoints.save(step + 1, make_state(), extra={})
        assert [("there is no good one yet" in s, "is step 2" in s) for s in said] == [(True, False), (False, True)]
        monkeypatch.setattr(checkpoint, "hash_files", full_disk)
        checkpoints.save(5, make_state(), extra={})
        for _ in range(2):
            with pytest.raises(CheckpointError, match="No space left on device; the last good checkpoint is step 4"):
                checkpoints.wait()
        assert checkpoints.steps == (2, 4)


def test_extra_must_be_json(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, make_state(), extra={"x": {1, 2}})


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use the checkpoint folder .*/file/c: Not a directory"):
        Checkpoints(tmp_path / "file" / "c")


STEPS = 60


# Other processes: a server that has imported everything and started nothing forks each of them.


@pytest.fixture(scope="module")
def fork():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optax", "orbax.checkpoint", "ftjax.train.checkpoint", "ftjax.train.metrics"])
    return context


def wait_for(process: multiprocessing.Process, code: int) -> None:
    process.join(30)
    assert process.exitcode == code


def save_with_small_files(folder: Path, results: Any) -> None:
    """The kernel refuses files over 64 KiB, as a quota does."""
    said: list[str] = []
    small, large = {"x": jnp.ones(8)}, {"x": jax.random.normal(jax.random.key(0), (100_000,))}
    checkpoints = Checkpoints(folder, message=said.append)
    checkpoints.save(1, small, extra={})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    checkpoints.save(2, large, extra={})
    try:
        checkpoints.save(3, large, extra={})
    except CheckpointError as e:
        said.append(str(e))
    checkpoints.save(4, small, extra={})  # room again: the object still works
    checkpoints.close()
    results.put((said, sorted(p.name for p in folder.iterdir())))


def test_file_size_limit_of_the_kernel(tmp_path, fork):
    results = fork.SimpleQueue()
    process = fork.Process(target=save_with_small_files, args=(tmp_path, results))
    process.start()
    wait_for(process, 0)
    said, names = results.get()
    assert len(said) == 2 and all("File too large" in s and "the last good checkpoint is step 1" in s for s in said), (
        said
    )
    assert "Training continues" in said[0] and names == ["1", "4"]


def test_full_tmpfs(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    said: list[str] = []
    try:
        with Checkpoints(place / "c", keep=9, message=said.append) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, {"x": jax.random.normal(jax.random.key(step), (40_000,))}, extra={})
            checkpoints.save(3, {"x": jax.random.normal(jax.random.key(3), (100_000,))}, extra={})
            with pytest.raises(CheckpointError, match="No space left on device; the last good checkpoint is step 2"):
                checkpoints.save(4, {"x": jax.random.normal(jax.random.key(4), (100_000,))}, extra={})
            assert checkpoints.restore({"x": jnp.zeros(40_000)}).step == 2
        assert "No space left on device" in said[0] and "Training continues" in said[0]
    finally:
        subprocess.run(["umount", str(place)], check=True)


def one_of_two_hosts(index: int, port: int, folder: Path, results: Any) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    draw = jax.jit(
        lambda key: {"w": jax.random.normal(key, (16, 4)), "key": key}, out_shardings={"w": split, "key": whole}
    )
    states = [draw(jax.random.key(s)) for s in range(4)]
    said: list[Any] = []
    with Checkpoints(folder, message=said.append) as checkpoints:
        assert checkpoints.restore(states[0]) is None
        for step in (1, 2, 3):
            checkpoints.save(step, states[step], extra={"step": step}, metric=-step if step < 3 else 0.0)
        checkpoints.wait()
        said.append((checkpoints.best_step, checkpoints.last_step))
    if index == 0:
        flip(array_file(folder / "3"), 100)
    with Checkpoints(folder, message=said.append) as checkpoints:
        found = checkpoints.restore(states[0])
        mine = [
            (a.data, b.data)
            for a, b in zip(found.state["w"].addressable_shards, states[2]["w"].addressable_shards, strict=True)
        ]
        said.append((found.step, found.extra, all(np.array_equal(a, b) for a, b in mine), len(mine)))
        said.append(bits(found.state["key"]) == bits(states[2]["key"]))
        checkpoint.hash_files = full_disk  # of the host that has the files
        checkpoints.save(4, states[0], extra={})
        try:
            checkpoints.save(5, states[0], extra={})
        except CheckpointError as e:
            said.append(str(e))
        said.append((checkpoints.best_step, checkpoints.last_step))
    results.put((index, said))


def test_two_hosts(tmp_path, fork):
    """Each writes and reads its own shards; the first decides, and both hear of a failure."""
    results = fork.SimpleQueue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [fork.Process(target=one_of_two_hosts, args=(i, port, tmp_path / "c", results)) for i in range(2)]
    for host in hosts:
        host.start()
    for host in hosts:
        wait_for(host, 0)
    said = dict(results.get() for _ in hosts)
    place = tmp_path / "c" / "quarantine" / "3-hash"
    assert said[0][1].endswith(f"differs from what was saved. Set aside as {place}")
    assert said[0][2] == "resuming from step 2; 1 steps are lost and will be repeated"
    for index, why in ((0, "No space left on device"), (1, "see the first host")):
        shared = said[index][3:] if index == 0 else said[index][1:]
        assert said[index][0] == (2, 3) and shared[:2] == [(2, {"step": 2}, True, jax.device_count()), True]
        text = f"saving a checkpoint to {tmp_path / 'c'} failed: {why}; the last good checkpoint is step 2"
        assert shared[2:] == [f"{text}. Training continues; the run stops if the next save fails too", text, (2, 2)]


def train(folder: Path, tell: Any, die_at: int = 0) -> None:
    """A run in small: donated jit step, random numbers, data position, metric lines, a checkpoint every second step.

    die_at: the process kills itself at the n-th file operation of saving after its first checkpoint.
    """
    os.fsync = lambda fd: None  # for power cuts; a kill needs none, and disks of test machines are slow
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    tx = optax.adam(0.1)

    @jax.jit
    def start():
        w = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
        return {"w": w, "opt": tx.init(w), "rng": jax.random.key(1), "step": jnp.int32(0)}

    def update(state, x):
        noise = jax.random.normal(jax.random.fold_in(state["rng"], state["step"]), (64, 32))
        loss, g = jax.value_and_grad(lambda p: jnp.square(p["w"] + noise - x).mean())(state["w"])
        u, opt = tx.update(g, state["opt"])
        return state | {"w": optax.apply_updates(state["w"], u), "opt": opt, "step": state["step"] + 1}, loss

    update = jax.jit(update, donate_argnums=0)
    checkpoints = Checkpoints(folder / "checkpoints", message=lambda text: None)
    log = MetricLog(folder, message=lambda text: None, tensorboard=False)
    state = start()
    found = checkpoints.restore(state)
    position, first = 0, 0
    if found:
        state, position, first = found.state, found.extra["position"], found.step
    log.truncate_after(found.step if found else None)
    for step in range(first + 1, STEPS + 1):
        state, loss = update(state, jnp.float32(position))
        position += step
        log.metrics("train", step, {"loss": loss})
        if step % 2 == 0:
            tell.send(step)
            log.sync()
            checkpoints.save(step, state, extra={"position": position}, metric=float(loss))
            if die_at:
                checkpoints.wait()
                kill_at(die_at)
                die_at = 0
    checkpoints.wait()
    checkpoints.close()
    log.close()
    digest = hashlib.sha256(repr(bits(state)).encode()).hexdigest()
    (folder / "digest").write_text(f"{digest} {position} {checkpoints.best_step}")


def kill_at(count: int) -> None:
    left, rmtree = [count], shutil.rmtree

    def deadly(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if function is rmtree:  # killed in the middle of it
                    os.unlink(args[0] / MANIFEST)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("write_atomic", "hash_files", "sealed", "sync_folder"):
        setattr(checkpoint, name, deadly(getattr(checkpoint, name)))
    checkpoint.Path.rename = deadly(Path.rename)
    shutil.rmtree = deadly(rmtree)


def run_to_the_end(fork: Any, folder: Path) -> list[str]:
    ours, theirs = fork.Pipe()
    process = fork.Process(target=train, args=(folder, theirs))
    process.start()
    wait_for(process, 0)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    return [(folder / "digest").read_text(), (folder / "metrics.jsonl").read_text(), *names]


@pytest.fixture(scope="module")
def uninterrupted(fork, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("whole")
    result = run_to_the_end(fork, folder)
    assert len(result[1].splitlines()) == STEPS and {str(STEPS - 2), str(STEPS)} <= set(result[2:])
    return result


def test_sigkill_at_random_moments_of_saving(tmp_path, fork, uninterrupted):
    """Killed eight times, then left alone: the same bits, the same lines, the same files."""
    rng = random.Random(0)
    for _ in range(8):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=train, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        for _ in range(rng.randint(1, 3)):
            ours.recv()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        wait_for(process, -signal.SIGKILL)
    assert run_to_the_end(fork, tmp_path) == uninterrupted


def test_sigkill_at_each_file_operation_of_saving(tmp_path, fork, uninterrupted):
    """Each resumes from what the one before left behind."""
    for count in range(1, 11):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=train, args=(tmp_path, theirs, count))
        process.start()
        wait_for(process, -signal.SIGKILL)
    assert run_to_the_end(fork, tmp_path) == uninterrupted
