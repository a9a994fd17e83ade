"""The command line: verbs, options, exit codes, and that simple questions are answered without loading JAX."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from ftjax import envinfo, registry, verbs
from ftjax.configfile import dump, load
from ftjax.errors import CheckpointError, DataError, DeviceError
from ftjax.options import FolderArgs, GenerateArgs, ModelArgs, SoupArgs
from ftjax.schema import Component
from ftjax.verbs import VERBS, main

ROOT = Path(__file__).resolve().parent.parent
CONFIG = (
    '"""Says what it is.\n\nMore."""\nfrom ftjax.config import Run\n\ndef get_config():\n    return Run(name="x")\n'
)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """A working directory with `configs/x.py` and a run folder, plain components, bodies that only note their call."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/x.py").write_text(CONFIG)
    noted: list = []
    entry = types.ModuleType("ftjax.entry")
    for name in ("train", "check", "evaluate", "evaluate_model", "generate", "merge", "export_run", "soup", "ensemble"):
        setattr(entry, name, lambda *args, name=name: noted.append((name, *args)) or 0)
    monkeypatch.setitem(sys.modules, entry.__name__, entry)
    with registry.scratch():
        for kind, name in dict(
            model="pretrained", peft="lora", objective="causal_lm", data="stdlib_docs", regime="fit"
        ).items():
            fields = {"__annotations__": {"name": Literal[name]}, "name": name, "__module__": __name__}
            registry.register(kind)(type(name, (Component,), fields))
        (tmp_path / "runs/x").mkdir(parents=True)
        (tmp_path / "runs/x/config.json").write_text(dump(load("configs/x.py")))
        yield noted


def fails(capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    """The text on standard error."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.rstrip("\n")


# ------------------------------------------------------------------------------------------------ verbs
def test_train_is_the_default(calls):
    assert main(["--config", "configs/x.py", "train.steps=3", "--allow-change", "optim.lr", "seed=4"]) == 0
    assert main(["train.steps=3", "--allow-change", "optim.lr", "train.batch=2", "--config", "configs/x.py"]) == 0
    (_, first, allowed), (name, second, _) = calls
    assert (first.train.steps, first.seed, allowed, name) == (3, 4, ("optim.lr",), "train")
    assert second.train.batch == 2


def test_check_and_out(calls):
    assert main(["check", "--config", "runs/x/config.json", "--out", "elsewhere"]) == 0
    assert (calls[0][0], str(calls[0][1].folder)) == ("check", "elsewhere")


def test_eval_passes_the_folder_and_overrides(calls):
    assert main(["eval", "--run", "runs/x", "evaluate.examples=0"]) == 0
    assert main(["eval", "--config", "runs/x/config.json", "evals=lm_eval", "tasks=a,b"]) == 0
    assert calls == [
        ("evaluate", Path("runs/x"), ("evaluate.examples=0",), ""),
        ("evaluate", Path("runs/x"), ("evals=lm_eval", "tasks=a,b"), ""),
    ]
    calls.clear()
    assert main(["eval", "--run", "runs/x", "--task", "text", "evals=lm_eval", "tasks=a"]) == 0
    assert calls == [("evaluate", Path("runs/x"), ("evals=lm_eval", "tasks=a"), "text")]


def test_eval_of_several_runs(calls, capsys):
    other = Path("runs/y")
    other.mkdir()
    (other / "config.json").write_text(Path("runs/x/config.json").read_text())
    assert main(["eval", "--runs", "runs/x", "runs/y", "evaluate.examples=0"]) == 0
    assert calls == [("ensemble", (Path("runs/x"), other), ("evaluate.examples=0",))]
    assert "run.py eval: --runs takes two or more runs" in fails(capsys, "eval", "--runs", "runs/x")
    text = fails(capsys, "eval", "--task", "text", "--runs", "runs/x", "runs/y")
    assert "--task text is of one run; give --run DIR" in text


def test_eval_of_a_model(calls, capsys):
    words = ("evals=lm_eval", "tasks=a")
    assert main(["eval", "--model", "m", "--adapter", "a", "--out", "n.json", *words]) == 0
    assert calls == [("evaluate_model", ModelArgs("m", Path("a"), Path("n.json")), words)]
    Path("n.json").touch()
    for given, text in (
        (("--model", "m"), "--model has no held-out data; choose an evaluation"),
        (("--model", "m", "--run", "runs/x", *words), "--model is instead of a run"),
        (("--run", "runs/x", "--adapter", "a"), "--adapter a  needs --model"),
        (("--run", "runs/x", "--out", "n.json", *words), "--out n.json  needs --model"),
        (("--model", "m", "--out", "n.json", *words), "--out n.json: it exists already"),
    ):
        assert text in fails(capsys, "eval", *given)


def test_generate(calls, monkeypatch):
    assert main(["generate", "--run", "runs/x", "--prompt", "a", "--stop", "X", "--stop", "Y", "--top-k", "5"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert main(["generate", "--model", "m", "--adapter", "a", "--temperature", "0.7", "--seed", "1"]) == 0
    assert main(["generate", "--run", "runs/x", "--prompt", "a", "--task", "text"]) == 0
    assert calls == [
        ("generate", GenerateArgs(prompt="a", run=Path("runs/x"), stop=("X", "Y"), top_k=5)),
        ("generate", GenerateArgs(prompt="from a pipe\n", model="m", adapter=Path("a"), temperature=0.7, seed=1)),
        ("generate", GenerateArgs(prompt="a", run=Path("runs/x"), task="text")),
    ]


@pytest.mark.parametrize("verb, body", [("merge", "merge"), ("export", "export_run")])
def test_merge_and_export(calls, capsys, verb, body):
    assert main([verb, "--run", "runs/x", "--to", "new"]) == 0
    assert main([verb, "--run", "runs/x", "--to", "new", "--task", "tone"]) == 0
    whole = FolderArgs(run=Path("runs/x"), to=Path("new"))
    assert calls == [(body, whole), (body, FolderArgs(run=whole.run, to=whole.to, task="tone"))]
    assert "--to runs: it exists already" in fails(capsys, verb, "--run", "runs/x", "--to", "runs")


def test_soup(calls, capsys):
    other = Path("runs/y")
    other.mkdir()
    (other / "config.json").write_text(Path("runs/x/config.json").read_text())
    assert main(["soup", "--runs", "runs/x", "runs/y", "--out", "new"]) == 0
    assert calls == [("soup", SoupArgs((Path("runs/x"), other), Path("new"), "uniform", "cat"))]
    assert "run 'runs/z' does not exist" in fails(capsys, "soup", "--runs", "runs/x", "runs/z", "--out", "new")


def test_ls_and_cp(calls, capsys):
    assert main(["ls"]) == 0
    assert capsys.readouterr().out == "configs/x.py  Says what it is.\n"
    assert main(["cp", "x", "mine.py"]) == 0
    assert Path("mine.py").read_text() == CONFIG
    capsys.readouterr()
    assert fails(capsys, "cp", "x", "mine.py") == "mine.py exists already; it is not overwritten"
    assert fails(capsys, "cp", "x", "no/mine.py") == "no/mine.py: there is no folder 'no'"
    assert fails(capsys, "cp", "xx", "b.py").startswith("no config 'xx'. Did you mean 'configs/x.py'?")


def test_explain(calls, capsys):
    assert main(["explain", "optim.lr"]) == 0
    assert "a float > 0" in capsys.readouterr().out
    assert "Did you mean 'optim.lr'?" in fails(capsys, "explain", "optim.rl")


@pytest.mark.parametrize("verb", VERBS)
def test_help_on_each_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert VERBS[verb].help in text and f"python run.py {VERBS[verb].example}" in text


def test_overview_names_every_verb(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"\n  {verb} ") == 2 for verb in VERBS)


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    "argv, text",
    [
        (["trian", "--config", "x"], "no verb 'trian'. Did you mean 'train'? Verbs: train, check, eval"),
        (["train"], "--config is missing. Configs: configs/x.py"),
        (["--config", "configs/y.py"], "no config 'configs/y.py'. Configs: configs/x.py"),
        (
            ["--config", "configs/x.py", "train.stpes=3"],
            "configs/x.py: 1 problem\n  train.stpes=3  unknown field of Train.",
        ),
        (
            ["--config", "configs/x.py", "--optim.lr=1"],
            "run.py train: unrecognized arguments: --optim.lr=1. Overrides have",
        ),
        (["--config"], "run.py train: argument --config: expected one argument\nusage: run.py train"),
        (["eval"], "run.py eval: give one of --run DIR and --config DIR/config.json"),
        (["eval", "--config", "configs/x.py"], "--config configs/x.py: only a run can be evaluated"),
        (["eval", "--run", "runs/y"], "run 'runs/y' does not exist. Runs: runs/x"),
        (["eval", "--run", "configs"], "run 'configs' has no config.json, so it is not a run folder. Runs: runs/x"),
        (["generate", "--prompt", "a"], "generate: 1 problem\n  --run, --model  give one of them"),
        (["generate", "--model", "m", "--prompt", ""], "generate: the prompt is empty"),
        (
            ["generate", "--model", "m", "--prompt", "a", "--top-k", "x"],
            "run.py generate: argument --top-k: invalid int",
        ),
    ],
)
def test_mistakes_exit_with_2(calls, capsys, argv, text):
    assert fails(capsys, *argv).startswith(text)
    assert calls == []


def test_all_wrong_options_at_once(calls, capsys):
    argv = "--run runs/x --adapter a --prompt p --top-p 0 --temperature nan --max-new-tokens 0 --seed -1 --top-k -1"
    assert fails(capsys, "generate", *argv.split()).splitlines() == [
        "generate: 6 problems",
        "  --adapter a         needs --model; a run has its adapter already",
        "  --max-new-tokens 0  expected at least 1",
        "  --temperature nan   expected a number >= 0",
        "  --top-k -1          expected at least 1, or 0 for all",
        "  --top-p 0           expected a share > 0 and <= 1",
        "  --seed -1           expected 0 to 2147483647",
    ]


def test_warnings_do_not_stop_a_run(calls, capsys):
    assert main(["--config", "configs/x.py", "optim.lr=1"]) == 0
    assert capsys.readouterr().err.startswith("warning: optim.lr=1  outside the usual range for lora with adamw")
    assert calls[0][0] == "train"


# ------------------------------------------------------------------------------------------------ exit codes
def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(*args: object) -> int:
        raise error

    monkeypatch.setattr(sys.modules["ftjax.entry"], "train", body)


@pytest.mark.parametrize("error, code", [(DataError("d"), 3), (CheckpointError("c"), 3), (DeviceError("v"), 4)])
def test_errors_for_users_have_no_traceback(calls, capsys, monkeypatch, error, code):
    raising(error, monkeypatch)
    assert "Traceback" not in fails(capsys, "--config", "configs/x.py", code=code)


def test_ctrl_c(calls, capsys, monkeypatch):
    raising(KeyboardInterrupt(), monkeypatch)
    assert fails(capsys, "--config", "configs/x.py", code=130) == "interrupted"


def test_our_own_faults_keep_their_traceback(calls, capsys, monkeypatch):
    raising(AssertionError("ours"), monkeypatch)
    assert "Traceback" in fails(capsys, "--config", "configs/x.py", code=1)


def test_out_of_memory(calls, capsys, monkeypatch):
    from jax.errors import JaxRuntimeError

    raising(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.\nmore"), monkeypatch)
    text = fails(capsys, "--config", "configs/x.py", code=4)
    assert "train.accumulate=2" in text and "compute.remat=full" in text and text.endswith("17179869184 bytes.")
    raising(JaxRuntimeError("INTERNAL: something else"), monkeypatch)
    fails(capsys, "--config", "configs/x.py", code=1)


# ------------------------------------------------------------------------------------------------ environment
@pytest.mark.parametrize(
    "flax, jax, bad",
    [
        ("0.12.8", "0.11.1", ["flax <= 0.12.8 breaks on jax >= 0.11.1: pip install -U flax==0.12.12"]),
        ("0.12.0", "0.12.0.1", ["flax <= 0.12.8 breaks on jax >= 0.11.1: pip install -U flax==0.12.12"]),
        ("0.12.9", "0.11.2", ["flax 0.12.9 breaks on jax 0.11.2: pip install -U flax==0.12.12"]),
        ("0.12.8", "0.11.0", []),
        ("0.12.12", "0.12.0.1", []),
    ],
)
def test_bad_pairs(flax, jax, bad):
    assert envinfo.bad_pairs({"flax": flax, "jax": jax}) == bad


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "python " in text and "devices" in text and "(cpu)" in text and "bad pairs: none of the known ones" in text


# ------------------------------------------------------------------------------------------------ weight of imports
LIGHT = """
import contextlib, io, json, sys
from ftjax.verbs import main
codes = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            codes.append(main(argv))
        except SystemExit as e:
            codes.append(e.code)
print(json.dumps([codes, sorted({"jax", "flax", "torch", "transformers", "datasets", "numpy"} & set(sys.modules))]))
"""


def test_simple_questions_load_nothing_heavy(tmp_path):
    asked = [["--help"], ["train", "--help"], ["ls"], ["trian"], ["--config", "no.py"], ["explain", "optim.lr"]]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/x.py").write_text(CONFIG)
    command = [sys.executable, "-c", LIGHT, json.dumps(asked)]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[0, 0, 0, 2, 2, 0], []]


def test_the_program_itself():
    source = (ROOT / "run.py").read_text()
    assert len(source.splitlines()) <= 40
    done = subprocess.run([sys.executable, ROOT / "run.py", "explian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no verb 'explian'. Did you mean 'explain'?")


def test_warnings_are_one_line_without_a_place_in_the_code(monkeypatch, capsys):
    def warns(argv):
        warnings.warn("an answer ends early", stacklevel=2)
        return 0

    monkeypatch.setattr(verbs, "dispatch", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["generate"]) == 0
    assert capsys.readouterr().err == "warning: an answer ends early\n"
