"""The whole program as a user runs it: processes that are killed, stopped and started again; faults and exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax.data.new_tokenizer import train_tokenizer
from ftjax.data.rows import Row
from ftjax.models import hf
from ftjax.params import init_params
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
STEPS = 22

CONFIG = """
from ftjax.config import Checkpoint, Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.peft.lora import LoRA


def get_config() -> Run:
    return Run(
        name="small",
        model=Pretrained(path={base!r}),
        peft=LoRA(rank=4, alpha=8.0, dropout=0.1),
        data=Local(path={data!r}, eval_share=0.2),
        loader=Loader(max_length=32),
        optim=Optim(lr=1e-2, warmup=2),
        train=Train(steps={steps}, batch=4, accumulate=2, log_every=4),
        evaluate=Evaluate(every=5, examples=8, generate=1, max_new_tokens=4, metric_examples=0),
        checkpoint=Checkpoint(every=3, keep=2),
    )
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A base model, a tokenizer, a data set and a config."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "runs", "sits"]
    rows = [{"prompt": f"{w} {i} ", "completion": " ".join(rng.choice(words, 5))} for i in range(30) for w in words[:3]]
    (root / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train_tokenizer("bpe", [Row(r, "") for r in rows], 300, root / "base")
    vocab = json.loads((root / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    model = tiny.llama(vocab_size=len(vocab) + 3, eos_token_id=(2,), bos_token_id=1)
    hf.save(model, init_params(model.table, jax.random.key(0), dtype=jnp.float32), root / "base")
    text = CONFIG.format(base=str(root / "base"), data=str(root / "data.jsonl"), steps=STEPS)
    (root / "small.py").write_text(text)
    return root


def command(project: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), "--config", str(project / "small.py"), f"out={out}", *more]


def environment() -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path("~/.cache/ftjax/test-xla").expanduser())
    return keep | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache}


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(*args, capture_output=True, text=True, env=environment(), timeout=300, **kwargs)


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory) -> Path:
    """The run folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(project, out))
    assert done.returncode == 0, done.stderr
    return out


def assert_equal(a: Path, b: Path) -> None:
    """Two run folders hold the same numbers, bit for bit."""
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    x, y = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (a, b))
    assert x.keys() == y.keys()
    for name in x:
        np.testing.assert_array_equal(x[name], y[name])


def test_the_run_folder_is_complete(whole):
    names = {p.name for p in whole.iterdir()}
    want = "config.json metrics.jsonl timing.jsonl samples.jsonl tb checkpoints adapter report.html environment.json"
    assert set(want.split()) <= names
    lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["event"] == "train"] == list(range(1, STEPS + 1))
    assert {r["step"] for r in lines if r["event"] == "eval"} == {0, 5, 10, 15, 20, STEPS}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {p.name for p in (whole / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_config_json_repeats_the_run(project, whole, tmp_path):
    done = run(
        [sys.executable, str(ROOT / "run.py"), "--config", str(whole / "config.json"), f"out={tmp_path / 'again'}"]
    )
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path / "again", whole)


def test_killed_at_ten_random_moments_it_ends_bit_identical(project, whole, tmp_path):
    """SIGKILL while loading data, stepping, saving: each time the same command goes on; the end is that of no kill."""
    out, rng, steps = tmp_path / "run", random.Random(0), []
    # how far each start may come, in bytes of metrics, so that a fast machine does not finish before it is killed
    reach = sorted(rng.uniform(0.02, 0.95) * size(whole) for _ in range(10))
    for kill, target in enumerate(reach):
        process = subprocess.Popen(
            command(project, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # some while it starts, most shortly after a line was written: it steps, evaluates or saves then
        patience = rng.uniform(0, 8) if kill % 4 == 3 else 120.0
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and size(out) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        steps.append(size(out))
    done = run(command(project, out))
    assert done.returncode == 0, done.stderr
    assert_equal(out, whole)
    assert len({n for n in steps if n < size(whole)} - {0}) > 0, "the kills never hit a run that had begun"


def size(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def test_a_flipped_bit_in_the_newest_checkpoint_is_found(project, whole, tmp_path):
    out = tmp_path / "run"
    assert run(command(project, out, "train.steps=9")).returncode == 0
    newest = max((p for p in (out / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    done = run(command(project, out, "train.steps=9"))
    assert done.returncode == 0, done.stderr
    assert (out / "checkpoints" / "quarantine").exists()
    assert "resuming after step 6 of 9" in done.stdout and "warning:" in done.stdout


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_stopped_by_a_signal_it_saves_and_goes_on_bit_identical(project, whole, tmp_path, number, code):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(project, out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while size(out) == 0 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("it had finished before the signal came")
    assert process.returncode == code, stderr
    assert "Continue with: python" in stderr and "stopped by SIG" in stderr
    assert run(command(project, out)).returncode == 0
    assert_equal(out, whole)


def test_a_changed_config_is_refused_with_a_diff_and_allowed_by_name(project, whole):
    done = run(command(project, whole, "optim.lr=0.02"))
    assert done.returncode == 2
    assert "optim.lr: 0.01 -> 0.02" in done.stderr and "--allow-change optim.lr" in done.stderr


def test_two_processes_in_one_folder(project, whole):
    import fcntl

    with (whole / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "since": "now"}))
        lock.flush()
        done = run(command(project, whole))
    (whole / "lock").write_text("")
    assert done.returncode == 3 and str(os.getpid()) in done.stderr


def test_check_trains_nothing_and_leaves_nothing(project, tmp_path):
    args = command(project, tmp_path / "none")
    done = run([*args[:2], "check", *args[2:]])
    assert done.returncode == 0, done.stderr
    assert "tokens trained, EOS is trained" in done.stdout and "activations and workspace" in done.stdout
    assert not (tmp_path / "none").exists()


def test_eval_generate_merge_and_export_of_a_run(project, whole, tmp_path):
    python = [sys.executable, str(ROOT / "run.py")]
    evaluated = run([*python, "eval", "--run", str(whole)])
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluated.returncode == 0 and f"{last['loss']:.4f}" in evaluated.stdout
    answer = run([*python, "generate", "--run", str(whole), "--prompt", "red 1 ", "--max-new-tokens", "8"])
    assert answer.returncode == 0 and answer.stdout.strip()
    assert run([*python, "merge", "--run", str(whole), "--to", str(tmp_path / "merged")]).returncode == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "merged").iterdir()}
    merged = run(
        [*python, "generate", "--model", str(tmp_path / "merged"), "--prompt", "red 1 ", "--max-new-tokens", "8"]
    )
    assert merged.stdout == answer.stdout
    assert run([*python, "export", "--run", str(whole), "--to", str(tmp_path / "out")]).returncode == 0
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "overrides, code, text",
    [
        (["peft.targets=q_prj"], 2, "Nearest: q_proj"),
        (["peft.rank=4096"], 2, "peft.rank=4096 exceeds"),
        (["mesh.tensor=3"], 4, "does not make 1 devices"),
        (["train.batch=5"], 2, "train.batch=5"),
        (["model.path=/nowhere/model"], 3, "/nowhere/model"),
        (["data.path=/nowhere/data.jsonl"], 3, "/nowhere/data.jsonl"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_input_is_refused_before_anything_is_compiled(project, tmp_path, overrides, code, text):
    done = run(command(project, tmp_path / "run", *overrides))
    assert done.returncode == code, done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
