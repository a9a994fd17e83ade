"""A run folder is this run's or untouched, one process works in it, and a changed config is shown and refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Literal

import jax
import pytest
from pydantic import Field

from ftjax.errors import CheckpointError, ConfigError
from ftjax.schema import Component
from ftjax.train import environment, lock, runfolder
from ftjax.train.runfolder import Change, RunFolder


class Train(Component):
    steps: int = 100
    batch: int = 8


class LoRA(Component):
    name: Literal["lora", "full"] = "lora"
    rank: int = 8
    targets: tuple[str, ...] = ("q", "v")


class Checkpoint(Component):
    keep: int = 2


class Config(Component):
    name: str = "run"
    out: str = ""
    seed: int = 0
    peft: LoRA = LoRA()
    train: Train = Train()
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch):
    now = {"python": "3.12.1", "packages": {"jax": "0.12.0"}, "commit": "abc"}
    monkeypatch.setattr(runfolder, "environment", lambda: json.loads(json.dumps(now)))
    return now


def begin(path, config=None, allow=(), said=None):
    start = RunFolder(path, message=(said if said is not None else []).append).begin(config or Config(), allow=allow)
    measured(path)
    return start


def measured(path):
    """The folder as it is once something was measured: from then on it belongs to this run."""
    (path / "metrics.jsonl").write_text('{"event": "eval", "step": 0}\n')


def files(path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_first_start_and_resume(tmp_path):
    path = tmp_path / "runs" / "a"
    folder = RunFolder(path)
    assert not path.exists()  # a dry run leaves no trace
    with folder.begin(Config(seed=3)) as start:
        assert not start.resumed and start.changes == ()
        assert sorted(p.name for p in path.iterdir()) == [
            "checkpoints",
            "config.json",
            "environment.json",
            "lock",
            "tb",
        ]
    assert Config.model_validate_json(folder.config.read_text()) == Config(seed=3)
    # nothing was measured yet: what is mended now is this run, and nobody is asked
    with folder.begin(Config(seed=4)) as start:
        assert not start.resumed
    with folder.begin(Config(seed=3)):
        measured(path)
    before = folder.config.read_text()
    said: list[str] = []
    with begin(path, Config(seed=3), said=said) as start:
        assert start.resumed and start.changes == () and start.environment == ()
    assert folder.config.read_text() == before and said == []
    names = ("config", "environment", "metrics", "timing", "samples", "tensorboard", "checkpoints", "adapter", "report")
    assert [getattr(folder, n).name for n in names] == [
        "config.json", "environment.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "tb", "checkpoints",
        "adapter", "report.html",
    ]  # fmt: skip


def test_a_changed_config_is_shown_and_refused(tmp_path):
    begin(tmp_path).folder.close()
    before = files(tmp_path)
    changed = Config(seed=1, train=Train(steps=200, batch=16), peft=LoRA(targets=("q",)))
    with pytest.raises(ConfigError) as e:
        begin(tmp_path, changed, allow=("train",))
    assert e.value.exit_code == 2
    assert str(e.value) == (
        f"{tmp_path} was started with another config: 3 problems\n"
        "  seed: 0 -> 1\n"
        '  peft.targets: ["q", "v"] -> ["q"]\n'
        "  to go on all the same, allow them: --allow-change seed peft.targets\n"
        "  to start anew, choose another folder with out=..."
    )
    assert files(tmp_path) == before
    begin(tmp_path).folder.close()  # and the lock is free


def test_harmless_and_allowed_changes_go_on_and_are_told(tmp_path):
    begin(tmp_path).folder.close()
    said: list[str] = []
    with begin(tmp_path, Config(train=Train(steps=200), out="x", checkpoint=Checkpoint(keep=9)), said=said) as start:
        assert start.resumed
        assert start.changes == (
            Change("out", "", "x"),
            Change("train.steps", 100, 200),
            Change("checkpoint.keep", 2, 9),
        )
    assert said == [
        'config changed: out: "" -> "x"',
        "config changed: train.steps: 100 -> 200",
        "config changed: checkpoint.keep: 2 -> 9",
    ]
    for allow in (("peft.rank",), ("peft",), ("peft.*",)):
        with begin(tmp_path, Config(train=Train(steps=200), peft=LoRA(rank=16)), allow=(*allow, "out")) as start:
            assert Change("peft.rank", 8, 16) in start.changes
        with begin(tmp_path, Config(train=Train(steps=200)), allow=allow):
            pass
    assert json.loads((tmp_path / "config-1.json").read_text())["train"]["steps"] == 100  # nothing is forgotten
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 200


def test_fields_that_came_or_went(tmp_path):
    begin(tmp_path).folder.close()
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["seed"]
    saved["peft"]["alpha"] = 16
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError) as e:
        begin(tmp_path)
    assert "  peft.alpha: 16 -> (absent)\n" in str(e.value) and "  seed: (absent) -> 0\n" in str(e.value)


def test_another_run_is_not_touched(tmp_path):
    begin(tmp_path).folder.close()
    with pytest.raises(
        ConfigError, match="holds the run 'run', not 'other'. Nothing was changed. Choose another folder"
    ):
        begin(tmp_path, Config(name="other"))
    with begin(tmp_path, Config(name="other"), allow=("name",)) as start:
        assert start.changes == (Change("name", "run", "other"),)


def test_foreign_content_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError) as e:
        begin(tmp_path)
    assert str(e.value) == (
        f"{tmp_path} is not empty and has no config.json, so it is not the folder of a run: checkpoints, thesis.tex. "
        "Nothing was changed. Choose another folder with out=... or name=..."
    )
    assert files(tmp_path) == {"thesis.tex": "x"}
    with pytest.raises(ConfigError, match="thesis.tex is a file; choose another with out="):
        begin(tmp_path / "thesis.tex")


def test_a_start_that_was_killed_early_is_begun_again(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / "config.json.tmp").write_text('{"na')
    with begin(tmp_path) as start:
        assert not start.resumed


def test_a_damaged_config_is_said(tmp_path):
    begin(tmp_path).folder.close()
    for text in ('{"name": "ru', "[1]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match="config.json is damaged .* Restore it from a backup, or choose another"
        ):
            begin(tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use the run folder .*/file/a/b: Not a directory"):
        begin(tmp_path / "file" / "a" / "b")


def test_a_changed_environment_is_told(tmp_path, fixed_environment):
    begin(tmp_path).folder.close()
    fixed_environment["packages"]["jax"] = "0.13.0"
    said: list[str] = []
    with begin(tmp_path, said=said) as start:
        assert start.environment == (Change("packages.jax", "0.12.0", "0.13.0"),)
    assert said == ['environment changed: packages.jax: "0.12.0" -> "0.13.0"; results may differ in their last bits']
    assert json.loads((tmp_path / "environment.json").read_text()) == fixed_environment


def test_environment_is_of_this_process():
    now = environment.environment()
    assert now["python"] == sys.version.split()[0] and now["packages"]["jax"] == jax.__version__
    assert now["devices"].startswith(f"{jax.device_count()} x ") and json.loads(json.dumps(now)) == now


def test_commit_and_its_changes(tmp_path):
    assert environment.commit(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for args in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        (tmp_path / "a").touch()
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    head = environment.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", head)
    (tmp_path / "a").write_text("changed")
    assert environment.commit(tmp_path) == head + "+changes"


# The lock.

HOLD = """
import os, sys, time
from pathlib import Path
from ftjax.train.lock import Lock
Lock(Path(sys.argv[1]) / "lock", print).acquire()
child = os.fork() if "child" in sys.argv else os.getpid()
if child == 0:
    time.sleep(60)
print("held", child, flush=True)
time.sleep(60)
"""


def hold(path, *args: str) -> tuple[subprocess.Popen, int]:
    """A process that has the lock, and the pid of its child, if it shall have one."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *args], stdout=subprocess.PIPE, text=True)
    held, child = process.stdout.readline().split()
    assert held == "held"
    process.stdout.close()
    return process, int(child)


def test_two_processes_on_one_folder(tmp_path):
    begin(tmp_path).folder.close()
    process, _ = hold(tmp_path)
    with pytest.raises(CheckpointError) as e:
        begin(tmp_path)
    assert e.value.exit_code == 3
    assert re.search(
        rf"{tmp_path} is in use by process {process.pid} on \S+, since 20\S+ \S+\. Wait for it, stop it", str(e.value)
    )
    process.kill()
    process.wait()
    said: list[str] = []
    with begin(tmp_path, said=said) as start:
        assert start.resumed
    assert said == [f"took over {tmp_path} from process {process.pid}, which ended without a goodbye"]
    said.clear()
    begin(tmp_path, said=said).folder.close()
    assert said == []


def test_twice_in_one_process(tmp_path):
    with begin(tmp_path), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"):
        begin(tmp_path)
    begin(tmp_path).folder.close()


def test_a_child_that_a_killed_owner_left_behind_does_not_hold_the_folder(tmp_path):
    begin(tmp_path).folder.close()
    process, child = hold(tmp_path, "child")
    try:
        process.kill()
        process.wait()
        said: list[str] = []
        with begin(tmp_path, said=said):
            assert said == [f"took over {tmp_path} from process {process.pid}, which ended without a goodbye"]
            with pytest.raises(CheckpointError, match="in use by"):
                begin(tmp_path)
    finally:
        os.kill(child, 9)


def test_a_lock_of_another_host_is_not_broken(tmp_path):
    begin(tmp_path).folder.close()
    owner = {"pid": 1, "host": "elsewhere", "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    (tmp_path / "lock").write_text(json.dumps(owner))
    with pytest.raises(CheckpointError) as e:
        begin(tmp_path)
    assert "in use by process 1 on elsewhere" in str(e.value)
    assert str(e.value).endswith(f"If that process is gone, delete {tmp_path / 'lock'} and start again.")
    (tmp_path / "lock").unlink()
    begin(tmp_path).folder.close()


def test_alive():
    assert lock._alive(os.getpid()) and lock._alive(1)
    process = subprocess.Popen(["true"])
    process.wait()
    assert not lock._alive(process.pid)
