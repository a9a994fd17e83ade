"""Soups of runs: means in numpy, LoRAs by product and by factor, a planted bad member, refusals, what is written."""

from __future__ import annotations

import dataclasses as dc
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import ftjax
from ftjax.configfile import dump
from ftjax.peft.base import merge
from ftjax.peft.full import Full
from ftjax.peft.lora import LoRA
from ftjax.regimes.soup import greedy, uniform
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.setup import prepare
from ftjax.verbs import main
from tests.test_average import config_of, small_project
from tests.tiny import largest

LORA, FULL = LoRA(rank=2, alpha=4.0), Full()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Run folders as training leaves them: around one point lora/a and lora/b, far off lora/bad; likewise full."""
    root = tmp_path_factory.mktemp("soup")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("FTJAX_CACHE", "")
        small_project(root)
        for name, peft in {"lora": LORA, "full": FULL}.items():
            run = config_of(f"{name}/a").model_copy(update={"peft": peft})
            setup = prepare(run, say=lambda _: None)
            step, state = jax.jit(setup.program.train), setup.state
            for _ in range(6 if peft is LORA else 0):
                state, _ = step(state, setup.frozen, next(setup.batches))
            setup.batches.close()
            for member, size in {"a": 1.0, "b": -1.0, "bad": 10.0}.items():
                plant(root / name / member, run, moved(state, size), step=len(member))
        yield root


def moved(state, size):
    """The state a step along a fixed random direction; of LoRAs in B alone, in which the update is linear."""

    def one(path, x):
        name = jax.tree_util.keystr(path)
        still = ".a" in name.rsplit("]", 1)[-1] or "norm" in name
        noise = np.random.default_rng(len(name) + x.size).normal(size=x.shape).astype(np.float32)
        return x if still else x + 0.2 * size * noise

    return dc.replace(state, trainable=jax.tree_util.tree_map_with_path(one, state.trainable))


def plant(folder: Path, run, state, *, step=1):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(dump(run.model_copy(update={"out": str(folder)})))
    (folder / "metrics.jsonl").write_text(json.dumps({"event": "eval", "step": 0, "loss": 5.5}) + "\n")
    with Checkpoints(folder / "checkpoints", message=print) as checkpoints:
        checkpoints.save(step, state, extra={"data": {}, "progress": {}, "fingerprint": {}})
        checkpoints.wait()


def opened(folder):
    """The plain weights that an exported adapter over the base amounts to."""
    model, bound = ftjax.load_pretrained("base", adapter=folder)
    return merge(bound, model.table)


def exported(name):
    if not Path("out", name).exists():
        assert main(["export", "--run", name, "--to", f"out/{name}"]) == 0
    return Path("out", name)


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setenv("FTJAX_CACHE", "")
    return project


def test_a_greedy_soup_of_loras_drops_the_bad_member(here, capsys):
    assert main(["soup", "--runs", "lora/bad", "lora/a", "lora/b", "--how", "greedy", "--out", "greedy"]) == 0
    rows = [x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("  lora/")]
    assert [(r[0], r[-1]) for r in rows][2] == ("lora/bad", "no") and [r[-1] for r in rows] == ["yes", "yes", "no"]
    best, together = float(rows[0][1]), float(rows[1][2])
    assert together < best < float(rows[2][1])
    settings = json.loads((here / "greedy/adapter/adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 4
    a, b, got = (opened(x) for x in (exported("lora/a") / "adapter", exported("lora/b") / "adapter", "greedy/adapter"))
    assert largest(got, {k: (np.float64(a[k]) + np.float64(b[k])) / 2 for k in a}) < 1e-6
    assert largest(got, a) > 1e-3
    card = (here / "greedy/adapter/README.md").read_text()
    assert "A soup (greedy) of 2 of 3 runs: lora/" in card and "exactly, at the sum of the ranks" in card


def test_loras_by_nearest_product_and_by_factor(here):
    for lora in ("svd", "factors"):
        assert main(f"soup --runs lora/a lora/b --lora {lora} --out {lora}".split()) == 0
        assert json.loads((here / lora / "adapter/adapter_config.json").read_text())["r"] == 2
    a, b, got = (
        load_file(x / "adapter/adapter_model.safetensors")
        for x in (exported("lora/a"), exported("lora/b"), here / "factors")
    )
    assert a.keys() == got.keys()
    assert all(np.abs(got[k] - (np.float64(a[k]) + b[k]) / 2).max() < 1e-6 for k in a)
    # These two differ in B alone, so their mean has their rank, and all three ways agree.
    assert largest(opened(here / "svd/adapter"), opened(here / "factors/adapter")) < 1e-5


def test_a_uniform_soup_of_models_is_the_mean(here, capsys):
    assert main(["soup", "--runs", "full/a", "full/b", "full/bad", "--out", "uniform"]) == 0
    assert capsys.readouterr().out.count("  yes") == 3
    parts = [load_file(exported(f"full/{x}") / "model/model.safetensors") for x in ("a", "b", "bad")]
    got = load_file(here / "uniform/model/model.safetensors")
    assert got.keys() == parts[0].keys()
    for k, x in got.items():
        assert np.abs(x - np.mean([np.float64(p[k]) for p in parts], 0)).max() < 1e-6
    assert (here / "uniform/model/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"peft": LoRA(rank=3)}, "peft.rank=3, but lora/a has 2"),
        ({"peft": FULL}, "peft=full, but lora/a has lora"),
        (
            {"model": {"path": "other"}},
            "began from pretrained path=other, but lora/a from pretrained path=base: another base",
        ),
    ],
    ids=["rank", "method", "base"],
)
def test_members_that_do_not_fit(here, capsys, change, text, tmp_path):
    run = config_of("x")
    if "model" in change:
        change = {"model": run.model.model_copy(update=change["model"])}
    (tmp_path / "config.json").write_text(dump(run.model_copy(update={**change, "out": str(tmp_path)})))
    assert main(["soup", "--runs", "lora/a", str(tmp_path), "--out", str(tmp_path / "soup")]) == 2
    assert text in capsys.readouterr().err


def test_commands_that_do_not_fit(here, capsys):
    assert main(["soup", "--runs", "lora/a", "--out", "x"]) == 2
    assert main(["soup", "--runs", "lora/a", "lora/../lora/a", "--out", "x"]) == 2
    assert main(["soup", "--runs", "lora/a", "lora/b", "--out", "base"]) == 2
    said = capsys.readouterr().err
    assert (
        "--runs takes two or more runs\n" in said
        and "is given twice" in said
        and "--out base: it exists already" in said
    )


def test_factors_of_other_scales_are_refused(here, capsys):
    run = config_of("lora/scaled").model_copy(update={"peft": LoRA(rank=2, alpha=8.0)})
    setup = prepare(run, say=lambda _: None)
    plant(here / "lora/scaled", run, setup.state)
    assert main(["soup", "--runs", "lora/a", "lora/scaled", "--lora", "factors", "--out", "y"]) == 2
    assert "is not trained and differs from that of lora/a" in capsys.readouterr().err


def test_choosing():
    values = {(0,): 3.0, (1,): 1.0, (2,): math.nan, (3,): 2.0, (1, 3): 1.0, (0, 1, 3): 1.5, (1, 2, 3): math.nan}
    found = greedy(4, lambda chosen: values[tuple(sorted(chosen))])
    assert [(c.member, c.kept) for c in found] == [(1, True), (3, True), (0, False), (2, False)]  # equal: it stays
    assert [c.kept for c in uniform(2, lambda _: 1.0)] == [True, True]
    with pytest.raises(ftjax.errors.ConfigError, match="no held-out examples"):
        greedy(2, lambda _: math.nan)
