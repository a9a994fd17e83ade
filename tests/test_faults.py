"""The list of bad inputs and faults, item by item, through the command line: what a user sees and the exit code.

Exit codes: 2 wrong input, 3 data or checkpoint, 4 device or memory, 130 and 143 signals. Configs are Python and JSON files, so
the items on YAML have their counterparts there. Where a fault needs a process of its own or a machine's help, the tests are
elsewhere: 24 out of memory in test_cli; 25 disk full and read-only in test_checkpoint and test_metrics; 26 damaged checkpoints
and 28 signals and kills in test_run and test_checkpoint; 30 slow loader in test_data_pipeline; 31 two processes in test_run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.models import hf
from ftjax.models.sources import embedded_folder
from ftjax.verbs import main
from tests import tiny

ROWS = [{"prompt": f"def f{i}(x):", "completion": f" return x + {i}"} for i in range(40)]
CONFIG = '''"""A test."""
from ftjax.config import *
from ftjax.data.tasks.local import Local
from ftjax.models.sources import Pretrained
from ftjax.peft.lora import LoRA

def get_config():
    return Run(
        name="x", model=Pretrained(path="model"), data=Local(path="train.jsonl", eval_share=0.2), peft=LoRA(rank=2),
        loader=Loader(max_length=32), optim=Optim(lr=1e-3), train=Train(steps=4, batch=8),
        evaluate=Evaluate(generate=0, metric_examples=0), compute=Compute(cache=""),
    )
'''


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = tiny.llama(vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=4)
    hf.save(model, tiny.weights(model), folder, tokenizer_from=embedded_folder())
    return folder


@pytest.fixture
def project(tmp_path, base, monkeypatch) -> Path:
    """A folder with config, model and data, as the working directory."""
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/x.py").write_text(CONFIG)
    rows(tmp_path, *ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTJAX_CACHE", "")
    return tmp_path


def rows(folder: Path, *items: dict, name: str = "train.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(x) + "\n" for x in items))


@pytest.fixture
def says(capsys):
    """Runs a command and gives what it printed; never a traceback."""

    def run(code: int, *argv: str, config: str = "configs/x.py") -> str:
        assert main(["--config", config, *argv] if not argv or "=" in argv[0] else list(argv)) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return out + err

    return run


# Config ------------------------------------------------------------------------------------------------------------------


def test_1_config_path_missing(project, says):
    text = says(2, config="configs/xx.py")
    assert "configs/xx.py" in text and "configs/x.py" in text


def test_2_syntax(project, says):
    (project / "bad.py").write_text("def get_config(:\n    pass\n")
    text = says(2, config="bad.py")
    assert "bad.py:1:16" in text and "^" in text
    (project / "bad.json").write_text('{"seed": 1,,}')
    text = says(2, config="bad.json")
    assert "bad.json:1:12" in text and "^" in text


def test_3_to_5_all_problems_at_once(project, says):
    text = says(2, "peft.rnak=8", "train.steps=ten", "optim.lr=nan", "train.batch=-1", "evaluate.every=true")
    assert "5 problems" in text
    assert "peft.rnak" in text and "Did you mean 'rank'?" in text
    for place in ("train.steps=ten", "optim.lr=NaN", "train.batch=-1", "evaluate.every=true"):
        assert place in text
    assert "warm-up is longer than the run" in says(2, "optim.warmup=9")


def test_6_duplicate_key(project, says):
    (project / "twice.json").write_text('{\n"seed": 1,\n"seed": 2\n}')
    text = says(2, config="twice.json")
    assert "seed" in text and "2" in text and "3" in text


def test_7_and_8_targets(project, says):
    text = says(2, "peft.targets=q_porj")
    assert "q_porj" in text and "q_proj" in text
    text = says(2, "peft=partial", "peft.last=0", "peft.parts=layers/qq/*")
    assert "peft.parts='layers/qq/*' matches no weight. Nearest: layers/q/w" in text


# Data --------------------------------------------------------------------------------------------------------------------


def test_9_data_path(project, says):
    assert "trian.jsonl" in (text := says(3, "data.path=trian.jsonl")) and "train.jsonl" in text
    (project / "empty").mkdir()
    assert "holds no data file" in says(3, "data.path=empty")
    if os.geteuid():
        (project / "train.jsonl").chmod(0)
        assert "permission" in says(3).lower()


def test_10_empty(project, says):
    (project / "train.jsonl").write_text("")
    assert "train.jsonl" in says(3)


def test_11_malformed_line(project, says):
    with (project / "train.jsonl").open("a") as f:
        f.write('{"prompt": "a", \n')
    text = says(3)
    assert "train.jsonl:41" in text and "loader.skip_bad" in text
    assert "1 malformed row skipped" in says(0, "check", "--config", "configs/x.py", "loader.skip_bad=1")


@pytest.mark.parametrize(
    "damage, place",
    [(b"\xff\xfe bad", "byte"), (b'{"prompt": "\\ud800", "completion": "b"}', "surrogate"), (b"\x00", "NUL")],
)
def test_12_encoding(project, says, damage, place):
    path = project / "train.jsonl"
    path.write_bytes(path.read_bytes() + damage + b"\n")
    text = says(3)
    assert "train.jsonl:41" in text and place.lower() in text.lower()


def test_12_a_byte_order_mark_is_accepted(project, says):
    path = project / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "nothing was trained" in says(0, "check", "--config", "configs/x.py")


def test_13_schema(project, says):
    rows(project, *ROWS, {"prompt": 3, "completion": "b"})
    text = says(3)
    assert "train.jsonl:41" in text and "'prompt'" in text and "expected a string" in text
    rows(project, {"instructon": "a", "output": "b"})
    assert "Expected columns" in says(3)


def test_14_and_15_too_long(project, says):
    rows(project, *ROWS, {"prompt": "word " * 99, "completion": "b"}, {"prompt": "word " * 99, "completion": "c"})
    assert "no trained token within" in says(0, "check", "--config", "configs/x.py")
    assert "loader.truncation=error" in says(3, "loader.truncation=error")
    rows(project, *({"prompt": "word " * 99, "completion": "b"} for _ in range(9)))
    assert "no token would be trained" in says(3)


def test_16_and_17_templates(project, says):
    chat = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(40)
    ]
    rows(project, *chat)
    text = says(3)
    assert "template" in text and "data.chat_template" in text
    rows(project, *chat, {"messages": [{"role": "robot", "content": "a"}]})
    assert "has role" in says(3, "data.chat_template=chatml")
    rows(project, *chat)
    (project / "evil.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% generation %}{% endgeneration %}"
    )
    text = says(3, "data.chat_template=evil.jinja")
    assert "sandbox" in text


def test_18_vocabulary(project, says):
    path = project / "model/config.json"
    tensors = load_file(project / "model/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100]
    save_file(tensors, project / "model/model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    text = says(3)
    assert "the tokenizer does not fit the model" in text and "100 rows" in text


def test_19_pad_is_eos(project, says):
    path = project / "model/tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token": config["eos_token"]}))
    assert "padding is masked by position" in says(0, "check", "--config", "configs/x.py")


# Weights -----------------------------------------------------------------------------------------------------------------


def test_20_weights_that_are_none(project, says):
    path = project / "model/model.safetensors"
    whole = path.read_bytes()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "LFS" in says(3)
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in says(3)
    path.rename(project / "model/pytorch_model.bin")
    assert "pickle" in says(3)


def test_21_and_22_tensors(project, says):
    path = project / "model/model.safetensors"
    tensors = load_file(path)
    changed = {k: v for k, v in tensors.items() if "k_proj" not in k}
    changed["model.norm.weight"] = np.ones(3, np.float32)
    changed["surplus"] = np.ones(1, np.float32)
    save_file(changed, path)
    text = says(3)
    for word in ("missing", "misshapen", "extra", "k_proj", "model.norm.weight", "surplus"):
        assert word in text
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, path)
    assert "non-finite" in (text := says(3)) and "model.norm.weight" in text


def test_23_devices(project, says):
    text = says(4, "mesh.data=3")
    assert "8" in text and "3" in text


# The run -----------------------------------------------------------------------------------------------------------------


def test_26_and_27_a_changed_run_is_refused(project, says):
    says(0, "train.batch=8", "mesh.data=1", "mesh.fsdp=8")
    text = says(2, "train.batch=8", "mesh.data=1", "mesh.fsdp=8", "optim.lr=2e-3")
    assert "optim.lr: 0.001 -> 0.002" in text and "--allow-change" in text
    rows(project, *ROWS, {"prompt": "new", "completion": "row"})
    text = says(3, "train.batch=8", "mesh.data=1", "mesh.fsdp=8")
    assert "not those of the checkpoint" in text


def test_29_non_finite_steps(project, says):
    """Every loss is infinite: three steps are skipped, the fourth ends the run and names the rows."""
    path = project / "model/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], 3e38)
    save_file(tensors, path)
    text = says(3, "train.steps=9", "mesh.data=1", "mesh.fsdp=8")
    assert "skipped a step that was not finite: step 1" in text
    assert "4 steps in a row were not finite" in text and "train.jsonl:" in text


def test_32_a_name_that_is_taken(project, says):
    (project / "runs/x").mkdir(parents=True)
    (project / "runs/x/thesis.txt").write_text("mine")
    assert "runs/x" in says(2)
    assert (project / "runs/x/thesis.txt").read_text() == "mine"


def test_the_project_itself_is_good(project, says):
    assert "nothing was trained" in says(0, "check", "--config", "configs/x.py")
