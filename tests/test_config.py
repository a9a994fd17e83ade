"""Configs: what loads, what overrides do, and the very texts that a user sees when something is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from ftjax import registry, schema
from ftjax.config import Optim, Run, Train
from ftjax.configfile import advice, build, config_hash, dump, load, override, parts
from ftjax.errors import ConfigError, nearest
from ftjax.explain import ELSEWHERE, explain, field_paths
from ftjax.folders import configs
from ftjax.schema import Component, Default, Slot

ROOT = Path(__file__).resolve().parent.parent


class Pretrained(Component):
    """Weights from a folder."""

    name: Literal["pretrained"] = "pretrained"
    path: str = Field("base", description="Folder or hub id.")


class LoRA(Component):
    """Low-rank update."""

    name: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0, description="Rank r of the update.")
    alpha: float | None = Field(None, gt=0, description="Scale; none: the rank.")
    targets: tuple[str, ...] = Field(("q", "v"), min_length=1, description="Projections.")
    layers: tuple[int, ...] = ()
    init: Literal["kaiming", "none"] = "kaiming"
    dropout: float = Field(0.0, ge=0, lt=1)

    usual_lr: ClassVar[tuple[float, float]] = (1e-5, 1e-2)


class DoRA(LoRA):
    """Low-rank update of the direction."""

    name: Literal["dora"] = "dora"


class Full(Component):
    """All weights."""

    name: Literal["full"] = "full"


class CausalLM(Component):
    """Next token."""

    name: Literal["causal_lm"] = "causal_lm"


class Distill(Component):
    """A slot inside a slot."""

    name: Literal["distill"] = "distill"
    teacher: Annotated[Any, Slot("model")] = Default("model", "pretrained", path="teacher")
    helpers: tuple[Annotated[Any, Slot("model")], ...] = ()

    def check(self, run: Run) -> Iterator[str]:
        if run.data.name != "texts":
            yield f"objective=distill, data={run.data.name}  distillation needs plain texts. Data that fit: texts"


class Docs(Component):
    """Pairs."""

    name: Literal["stdlib_docs"] = "stdlib_docs"


class Fit(Component):
    """One loop."""

    name: Literal["fit"] = "fit"


TOYS = {
    "model": [Pretrained],
    "peft": [LoRA, DoRA, Full],
    "objective": [CausalLM, Distill],
    "data": [Docs],
    "regime": [Fit],
}


@pytest.fixture
def toys() -> Iterator[None]:
    """A registry that holds the components above and nothing else."""
    with registry.scratch():
        for kind, classes in TOYS.items():
            for cls in classes:
                registry.register(kind)(cls)
        yield


CONFIG = """
from ftjax.config import Optim, Run, Train
from tests.test_config import Distill, DoRA, Full, LoRA

def get_config():
    return Run(name="x", peft=LoRA(rank=16), optim=Optim(lr=3e-4), train=Train(steps=50))
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toys: None) -> Path:
    """`x.py` in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("x.py")
    path.write_text(CONFIG)
    return path


def wrong(path: Path | str, *overrides: str) -> str:
    """The text of the error."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ loading and overrides
def test_python_config_loads(config):
    run = load(config)
    assert run == Run(name="x", peft=LoRA(rank=16), optim=Optim(lr=3e-4), train=Train(steps=50))
    assert hash(run) == hash(load(config))
    assert run.folder == Path("runs/x")


@pytest.mark.parametrize("overrides", [["peft.rank=4", "peft=dora"], ["peft=dora", "peft.rank=4"]])
def test_overrides_in_any_order(config, overrides):
    assert load(config, overrides).peft == DoRA(rank=4)


def test_a_swapped_component_starts_from_its_own_defaults(config):
    assert load(config, ["peft=dora"]).peft == DoRA(rank=8)
    assert load(config, ["peft=full"]).peft == Full()


@pytest.mark.parametrize(
    "text, path, value",
    [
        ("optim.lr=1", ("optim", "lr"), 1.0),
        ("optim.lr=.5", ("optim", "lr"), 0.5),
        ("train.steps=1e4", ("train", "steps"), 10000),
        ("train.steps=1_000", ("train", "steps"), 1000),
        ("checkpoint.keep_best=false", ("checkpoint", "keep_best"), False),
        ("peft.targets=q,k,v", ("peft", "targets"), ("q", "k", "v")),
        ("peft.targets=q", ("peft", "targets"), ("q",)),
        ('peft.targets=["q", "o"]', ("peft", "targets"), ("q", "o")),
        ("peft.targets.1=o", ("peft", "targets"), ("q", "o")),
        ("peft.layers=0,3", ("peft", "layers"), (0, 3)),
        ("peft.layers=", ("peft", "layers"), ()),
        ("peft.alpha=none", ("peft", "alpha"), None),
        ("peft.alpha=32", ("peft", "alpha"), 32.0),
        ("peft.init=none", ("peft", "init"), "none"),
        ("compute.remat=none", ("compute", "remat"), "none"),
        ("model.path=1e5", ("model", "path"), "1e5"),
        ('model.path="1"', ("model", "path"), "1"),
        ("model.path=a=b", ("model", "path"), "a=b"),
        ("out=true", ("out",), "true"),
        ('peft={"name": "dora", "rank": 2}', ("peft", "rank"), 2),
        ('peft={"rank": 2}', ("peft", "name"), "lora"),
    ],
)
def test_values(config, text, path, value):
    found = load(config, [text])
    for key in path:
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_slots_inside_components(config):
    registry.register("data")(
        type("Texts", (Component,), {"__annotations__": {"name": Literal["texts"]}, "name": "texts"})
    )
    run = load(config, ["data=texts", "objective=distill"])
    assert run.objective.teacher == Pretrained(path="teacher")
    run = load(
        config,
        ["data=texts", "objective.teacher.path=t", "objective=distill", "objective.helpers=pretrained,pretrained"],
    )
    assert run.objective.teacher.path == "t" and run.objective.helpers == (Pretrained(), Pretrained())
    run = load(
        config,
        ["data=texts", "objective=distill", "objective.helpers=pretrained,pretrained", "objective.helpers.1.path=b"],
    )
    assert [h.path for h in run.objective.helpers] == ["base", "b"]
    assert [type(p).__name__ for p in parts(run)][:4] == ["Run", "Pretrained", "LoRA", "Distill"]
    assert load_json(run) == run


def load_json(run: Run) -> Run:
    path = Path("round.json")
    path.write_text(dump(run))
    return load(path)


def test_dump_is_canonical_and_loads_to_an_equal_run(config):
    run = load(config, ["peft=dora", "peft.targets=a,b", "optim.lr=1"])
    again = load_json(run)
    assert again == run and hash(again) == hash(run) and dump(again) == dump(run)
    assert json.loads(dump(run))["optim"]["lr"] == 1.0
    assert load(Path("round.json"), ["peft=lora"]).peft == LoRA()


def test_json_may_leave_out_what_is_default(config):
    Path("y.json").write_text('{"peft": {"rank": 3}, "train": {"steps": 7}}')
    assert load("y.json") == Run(peft=LoRA(rank=3), train=Train(steps=7))
    assert load("y.json", ["model.path=z"]).model.path == "z"


def test_hash_ignores_labels_only(config):
    run = load(config)
    assert config_hash(run) == config_hash(override(run, ["name=other", "out=/tmp/o"]))
    assert config_hash(run) != config_hash(override(run, ["seed=1"]))
    assert len(config_hash(run)) == 12


# ------------------------------------------------------------------------------------------------ problems, all at once
def test_all_problems_at_once(config):
    text = wrong(config, "peft.rnak=8", "optim.lr=fast", "peft.dropout=2", "train.steps=-5", "compute.remat=ful")
    assert text.splitlines() == [
        "x.py: 5 problems",
        "  peft.dropout=2     expected a float >= 0 and < 1, got 2",
        "  peft.rnak=8        unknown field of LoRA. Did you mean 'rank'? "
        "Fields: name, rank, alpha, targets, layers, init, dropout",
        "  optim.lr=fast      expected a float > 0, got 'fast'",
        "  train.steps=-5     expected an int > 0, got -5",
        "  compute.remat=ful  expected one of none, dots, full, got 'ful'. Did you mean 'full'?",
    ]


def test_a_python_config_reports_all_problems_too(config):
    config.write_text(CONFIG.replace("rank=16", "rnak=16, dropout=2.0").replace("lr=3e-4", 'lr="fast"'))
    assert wrong(config).splitlines()[0] == "x.py: 3 problems"
    assert "peft.rnak=16      unknown field of LoRA" in wrong(config)


@pytest.mark.parametrize(
    "override, line",
    [
        ("train.steps=ten", "train.steps=ten  expected an int > 0, got 'ten'"),
        ("train.steps=true", "train.steps=true  expected an int > 0, got true (a bool)"),
        ("train.steps=10.5", "train.steps=10.5  expected an int > 0, got 10.5"),
        ('train.steps="10"', "train.steps=10  expected an int > 0, got '10'"),
        ("checkpoint.keep_best=1", "checkpoint.keep_best=1  expected true or false, got 1"),
        ("optim.lr=nan", "optim.lr=NaN  expected a float > 0, got nan"),
        ("optim.lr=inf", "optim.lr=Infinity  expected a float > 0, got inf"),
        ("optim.lr=0", "optim.lr=0  expected a float > 0, got 0"),
        ("optim.lr=none", "optim.lr=none  expected a float > 0, got 'none'"),
        ("peft.alpha=-1", "peft.alpha=-1  expected a float > 0 or none, got -1"),
        ("peft.alpha=big", "peft.alpha=big  expected a float > 0 or none, got 'big'"),
        ("peft.layers=0,x", "peft.layers.1=x  expected an int, got 'x'"),
        ("peft.targets=", "peft.targets  expected a list of strings at least 1 long, got []"),
        ("name=a/b", r"name=a/b  expected a string like ^\w[\w.-]*$, got 'a/b'"),
        ("peft=dorra", "peft=dorra  unknown peft 'dorra'. Did you mean 'dora'? Known: dora, full, lora"),
        ("peft=LORA", "peft=LORA  unknown peft 'LORA'. Did you mean 'lora'? Known: dora, full, lora"),
        ("pfet.rank=3", "pfet.rank=3  unknown field of Run. Did you mean 'peft'? Fields: name, out, seed, model"),
        ("lr=3e-4", "lr=0.0003  unknown field of Run. Did you mean 'optim.lr'?"),
        ("train.learning_rate=1", "train.learning_rate=1  unknown field of Train. Did you mean 'optim.lr'?"),
        ("rank=3", "rank=3  unknown field of Run. Did you mean 'peft.rank'?"),
        ("optim=sgd", "optim=sgd  expected fields of Optim, got 'sgd'"),
        ("objective=[1]", "objective  expected a component of kind objective (causal_lm, distill), got [1]"),
        ("objective.teacher.path=x", "objective.teacher.path=x  unknown field of CausalLM."),
        ("train.steps.x=3", "train.steps.x  train.steps is 50, which has no fields"),
        ("peft.targets.2=o", "peft.targets.2  peft.targets has 2 items; the first is 0"),
        ("optim.lr", "optim.lr  expected an override like optim.lr=3e-4"),
        ("=3", "=3  expected an override like optim.lr=3e-4"),
        ("a..b=3", "a..b=3  expected an override like optim.lr=3e-4"),
    ],
)
def test_one_problem(config, override, line):
    assert wrong(config, override).startswith(f"x.py: 1 problem\n  {line}")


def test_a_field_may_be_called_like_its_component(config):
    class Inner(Component):
        """A group of fields."""

        size: int = 1

    class Prefix(Component):
        """Has a group called `prefix`."""

        name: Literal["prefix"] = "prefix"
        prefix: Inner = Inner()
        length: int = 1

    registry.register("peft")(Prefix)
    assert "\n  peft.length=x  expected an int, got 'x'" in wrong(config, "peft=prefix", "peft.length=x")
    text = "x.py: 1 problem\n  peft.prefix.size=x  expected an int, got 'x'"
    assert wrong(config, "peft=prefix", "peft.prefix.size=x") == text


def test_one_line_for_a_union(config):
    class Scheduled(Component):
        """A number or a word."""

        name: Literal["scheduled"] = "scheduled"
        scale: float | Literal["auto", "none"] | tuple[float, ...] = 1.0

    registry.register("peft")(Scheduled)
    assert load(config, ["peft=scheduled", "peft.scale=none"]).peft.scale == "none"
    assert load(config, ["peft=scheduled", "peft.scale=1,2"]).peft.scale == (1.0, 2.0)
    assert wrong(config, "peft=scheduled", "peft.scale=autp") == (
        "x.py: 1 problem\n  peft.scale=autp  expected a float or one of auto, none or a list of floats, got 'autp'. "
        "Did you mean 'auto'?"
    )
    assert wrong(config, "peft=scheduled", "peft.scale=1,x").splitlines()[1:] == [
        '  peft.scale  expected a float or one of auto, none or a list of floats, got [1, "x"]'
    ]


def test_an_override_given_twice(config):
    assert wrong(config, "optim.lr=1", "optim.lr=2") == "x.py: 1 problem\n  optim.lr  given twice, as 1 and 2"


def test_values_that_json_cannot_say(config):
    config.write_text("import pathlib\n" + CONFIG.replace("rank=16", "rank=len, targets=(pathlib.PurePosixPath('q'),)"))
    text = wrong(config)
    assert text.startswith("x.py: 2 problems\n")
    assert "expected an int > 0, got <built-in function len>" in text
    assert "expected a string, got PurePosixPath('q')" in text


# ------------------------------------------------------------------------------------------------ combinations
def test_combination_problems_come_once_fields_are_valid(config):
    text = wrong(
        config, "optim.warmup=60", "train.batch=8", "train.accumulate=3", "evaluate.patience=2", "objective=distill"
    )
    assert text.splitlines() == [
        "x.py: 4 problems",
        "  objective=distill, data=stdlib_docs    distillation needs plain texts. Data that fit: texts",
        "  optim.warmup=60, train.steps=50        "
        "the warm-up is longer than the run, so the peak rate is never reached; at most 50",
        "  train.batch=8, train.accumulate=3      "
        "a batch must split evenly into micro-batches; accumulate that fit: 1, 2, 4",
        "  evaluate.patience=2, evaluate.every=0  early stopping needs evaluations while training; set evaluate.every",
    ]
    assert "warm-up" not in wrong(config, "optim.warmup=60", "optim.lr=fast")


def test_mesh_arithmetic_that_needs_no_devices(config):
    assert "mesh.data=-1, mesh.fsdp=-1  only one axis can take what is left" in wrong(config, "mesh.fsdp=-1")
    assert "mesh.tensor=0  an axis has at least one device; 1 is off" in wrong(config, "mesh.tensor=0")


def test_advice_on_the_learning_rate(config):
    assert advice(load(config)) == ()
    assert advice(load(config, ["optim.lr=1"])) == (
        "optim.lr=1  outside the usual range for lora with adamw, 1e-05 to 0.01",
    )
    assert advice(load(config, ["optim.lr=1e-2", "optim.name=lion"])) == (
        "optim.lr=0.01  outside the usual range for lora with lion, 2e-06 to 0.002",
    )
    assert advice(load(config, ["optim.lr=1", "optim.name=sgd"])) == ()
    assert advice(load(config, ["optim.lr=1", "peft=full"])) != ()


def test_advice_on_fields_without_effect(config):
    assert advice(load(config, ["optim.decay_share=0.5"])) == (
        "optim.decay_share=0.5  has no effect with schedule=linear",
    )
    assert advice(load(config, ["optim.decay_share=0.5", "optim.schedule=wsd"])) == ()


# ------------------------------------------------------------------------------------------------ files
def test_missing_config_names_the_nearest(config):
    Path("configs").mkdir()
    for name in ("quickstart", "sft_lora"):
        Path(f"configs/{name}.py").write_text(CONFIG)
    assert wrong("configs/quikstart.py") == (
        "no config 'configs/quikstart.py'. Did you mean 'configs/quickstart.py'? "
        "Configs: configs/quickstart.py, configs/sft_lora.py"
    )
    assert "Did you mean 'configs/quickstart.py'?" in wrong("quickstart")


def test_a_folder_or_another_format(config):
    Path("runs/a").mkdir(parents=True)
    assert wrong("runs/a") == "runs/a is a folder, not a config."
    Path("runs/a/config.json").write_text("{}")
    assert wrong("runs/a") == "runs/a is a folder, not a config. Did you mean 'runs/a/config.json'?"
    Path("a.yaml").write_text("lr: 1")
    assert wrong("a.yaml") == "a.yaml: a config is a .py file with get_config() or a .json file, not '.yaml'"
    Path("b.py").write_bytes(b"x = '\xff'")
    assert wrong("b.py") == "b.py: not UTF-8 text: byte 0xff at offset 5"


def test_json_syntax_error_has_a_caret(config):
    Path("a.json").write_text('{\n  "train": {"steps": 3,}\n}')
    head, line, mark = wrong("a.json").splitlines()
    assert head.startswith("a.json:2:") and line == '      "train": {"steps": 3,}'
    assert line[mark.index("^")] == line[4 + int(head.split(":")[2]) - 1]
    Path("a.json").write_text("")
    assert wrong("a.json").startswith("a.json:1:1: Expecting value")
    Path("a.json").write_text("[1]")
    assert wrong("a.json") == "a.json: expected an object {...} with the fields of a run, got [1]"


def test_duplicate_json_keys_show_both_lines(config):
    Path("a.json").write_text('{"train": {"steps": 3,\n "batch": [{"a": 1}, {"a": "}"}],\n "steps": 4}}')
    assert wrong("a.json") == "a.json: 1 problem\n  train.steps  stands twice, in lines 1 and 3; remove one"


def test_json_problems_name_their_line_unless_overridden(config):
    Path("a.json").write_text('{\n "train": {\n  "steps": "ten",\n  "batch": 0}}')
    assert wrong("a.json").splitlines()[1:] == [
        "  train.steps=ten  expected an int > 0, got 'ten' (line 3)",
        "  train.batch=0    expected an int > 0, got 0 (line 4)",
    ]
    assert wrong("a.json", "train.batch=0", "train.steps=1").splitlines()[1:] == [
        "  train.batch=0  expected an int > 0, got 0"
    ]


def test_python_syntax_error_has_a_caret(config):
    config.write_text("def get_config():\n    return Run(lr=)\n")
    head, line, mark = wrong(config).splitlines()
    assert head == "x.py:2:16: expected argument value expression"
    assert line[mark.index("^") :] == "lr=)"


@pytest.mark.parametrize(
    "source, text",
    [
        (
            "def get_confg(): pass\n",
            "x.py: no get_config(). A config defines `def get_config() -> Run:`. Did you mean 'get_confg'?",
        ),
        ("def get_config(): pass\n", "x.py: get_config() returned None, not a Run (ftjax.config.Run)"),
        ("def get_config(): return {}\n", "x.py: get_config() returned a dict, not a Run (ftjax.config.Run)"),
        (
            "x = 1\ndef get_config():\n    return 1 / 0\n",
            "x.py:3: ZeroDivisionError: division by zero\n    return 1 / 0",
        ),
        ("import jsn\n", "x.py:1: ModuleNotFoundError: No module named 'jsn'\n    import jsn"),
        ("from ftjax.config import Rnu\n", "x.py:1: ImportError: cannot import name 'Rnu' from 'ftjax.config'"),
        (
            "value = 1\nprint(vlaue)\n",
            "x.py:2: NameError: name 'vlaue' is not defined. Did you mean: 'value'?\n    print(vlaue)",
        ),
        ("def get_config(n): return n\n", "x.py: TypeError: get_config() missing 1 required positional argument: 'n'"),
    ],
)
def test_errors_inside_a_config(config, source, text):
    config.write_text(source)
    assert wrong(config).startswith(text)
    assert "Traceback" not in wrong(config)


def test_the_line_is_the_one_inside_the_config(config):
    config.write_text("import json\ndef get_config():\n    return json.loads('{')\n")
    assert wrong(config).startswith("x.py:3: json.decoder.JSONDecodeError")


# ------------------------------------------------------------------------------------------------ registry
def test_registering_after_the_schema_was_built(config):
    assert load(config).peft == LoRA(rank=16)

    class Late(Component):
        """Came last."""

        name: Literal["late"] = "late"
        z: int = 1

    registry.register("peft")(Late)
    assert load(config, ["peft=late", "peft.z=2"]).peft == Late(z=2)
    assert Run(peft=Late(z=3)).peft.z == 3

    class Later(Component):
        """A model that slots inside slots must learn about."""

        name: Literal["later"] = "later"

    registry.register("model")(Later)
    text = wrong(config, "objective=distill", "objective.teacher=later")
    assert text.startswith("x.py: 1 problem\n  objective=distill, data=stdlib_docs")
    assert Distill(teacher=Later()).teacher == Later()


OWN_COMPONENT = """
from __future__ import annotations
from typing import Literal
from ftjax.config import Run
from ftjax.registry import register
from ftjax.schema import Component

@register("peft")
class Mine(Component):
    name: Literal["mine"] = "mine"
    sizes: tuple[int, ...] = (1,)

def get_config():
    return Run(peft=Mine(sizes=[2]))
"""


def test_a_component_defined_in_a_config(config):
    config.write_text(OWN_COMPONENT)
    assert load(config).peft.sizes == (2,)
    assert load(config, ["peft.sizes=3,4"]).peft.sizes == (3, 4)  # executed again: no clash of names


def test_nearest_names_ignore_case():
    assert nearest("q_proj", ["K_proj", "Q_Proj"], 1) == ["Q_Proj"]
    assert nearest("QPROJ", ["k_proj", "q_proj"], 1) == ["q_proj"]


def test_names_are_unique(toys):
    with pytest.raises(ValueError, match="peft 'lora' is already"):
        registry.register("peft")(type("Other", (LoRA,), {}))
    with pytest.raises(ValueError, match="needs a field like"):
        registry.register("peft")(type("Nameless", (Component,), {}))
    with pytest.raises(ConfigError, match="unknown peft 'lroa'. Did you mean 'lora'"):
        registry.get("peft", "lroa")


def test_components_are_strict_outside_of_files_too(toys):
    with pytest.raises(ValueError):
        Optim(lr="fast")  # type: ignore[arg-type]
    with schema.collecting():
        Optim(lr="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        build({"train": {"steps": 0}}, title="t")


# ------------------------------------------------------------------------------------------------ explain
def test_explain_a_field(toys):
    assert explain("optim.lr").splitlines() == [
        "optim.lr",
        "  type     a float > 0",
        "  default  0.001",
        "  meaning  " + str(Optim.model_fields["lr"].description),
    ]


def test_explain_through_a_slot(toys):
    assert explain("peft.rank").splitlines()[:3] == ["peft.rank", "  of dora, lora:", "  type     an int > 0"]
    assert "Rank r of the update." in explain("peft.lora")
    assert explain("objective.teacher.path").splitlines()[1:3] == ["  of pretrained:", "  type     a string"]


def test_explain_a_slot_and_a_group(toys):
    lines = explain("peft").splitlines()
    assert "    dora  Low-rank update of the direction." in lines and "    full  All weights." in lines
    assert "  default  lora" in lines
    assert any(
        line.startswith("    steps ") and line.endswith("Optimizer steps.") for line in explain("train").splitlines()
    )
    assert any(line.startswith("    peft ") for line in explain().splitlines())


@pytest.mark.parametrize(
    "path, text",
    [
        ("optim.lrr", "explain optim.lrr: no field 'lrr' in optim. Did you mean 'optim.lr'? Fields: name, lr"),
        ("peft.rnak", "explain peft.rnak: no field 'rnak' in peft. Did you mean 'peft.rank'? Fields: name, rank"),
        ("pfet", "explain pfet: no field 'pfet' in a run. Did you mean 'peft'? Fields: name, out"),
        ("learning_rate", "explain learning_rate: no field 'learning_rate' in a run. Did you mean 'optim.lr'?"),
        ("optim.lr.x", "explain optim.lr.x: no field 'x' in optim.lr."),
    ],
)
def test_explain_unknown(toys, path, text):
    with pytest.raises(ConfigError) as caught:
        explain(path)
    assert str(caught.value).startswith(text)


def test_names_from_elsewhere_exist_here(toys):
    assert set(ELSEWHERE.values()) <= set(field_paths())


# ------------------------------------------------------------------------------------------------ shipped configs
@pytest.mark.parametrize("path", configs(ROOT / "configs"), ids=lambda p: p.stem)
def test_golden_config(path: Path):
    """The resolved config, default values included, so that a changed default is seen in review."""
    run = load(path)
    golden = ROOT / "tests/golden/configs" / f"{path.stem}.json"
    if os.environ.get("FTJAX_UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(dump(run))
    assert golden.exists(), f"no golden dump of {path.name}: run once with FTJAX_UPDATE_GOLDEN=1"
    assert dump(run) == golden.read_text(), "if you meant this change, run once with FTJAX_UPDATE_GOLDEN=1"
    assert load(golden) == run
    assert advice(run) == ()


def test_no_golden_dump_without_config():
    stems = {p.stem for p in configs(ROOT / "configs")}
    assert {p.stem for p in (ROOT / "tests/golden/configs").glob("*.json")} <= stems


def test_a_package_that_fails_to_import_is_not_half_known(tmp_path, monkeypatch):
    (tmp_path / "broken_kind").mkdir()
    (tmp_path / "broken_kind/__init__.py").touch()
    (tmp_path / "broken_kind/a.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.PACKAGES, "eval", "broken_kind")
    with registry.scratch():
        registry._discovered.discard("eval")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                registry.known("eval")


def test_a_config_may_build_on_another(config):
    Path("base_config.py").write_text(CONFIG)
    config.write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom base_config import get_config as base\n"
        "from ftjax.config import Optim\nsys.path.remove('.')\n"
        "def get_config():\n    return base().model_copy(update={'optim': Optim(lr=2)})\n"
    )
    assert load(config) == Run(name="x", peft=LoRA(rank=16), optim=Optim(lr=2.0), train=Train(steps=50))
