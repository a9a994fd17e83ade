"""The plan of the house: imports point one way, rooms stay small, and nothing unsafe or foreign is imported.

The order: errors, registry, schema, config, tree, ops, params <- parallel, kernels <- models, peft, objectives, data,
generate, evals <- regimes, train, report <- the command line and the public face. Imports inside of functions count;
those under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted([*(ROOT / "ftjax").rglob("*.py"), ROOT / "run.py"])

LAYERS = (
    "errors folders jsontext registry safefiles schema words config explain overrides problems configfile "
    "tree ops params rows headspec",
    "parallel kernels quant",
    "models peft objectives data generate evals",
    "regimes train report",
    "api entry verbs options envinfo run ftjax",
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
# Beyond the levels: who may not know of whom.
STRANGERS = {"objectives": {"peft", "models"}, "peft": {"models"}}
# Test oracles, unsafe loaders and libraries that drag in tensorflow.
FOREIGN = {"torch", "trl", "peft", "accelerate", "pickle", "dill", "cloudpickle", "clu", "tensorflow", "yaml"}


@dataclass(frozen=True)
class Import:
    """One imported module and its line."""

    module: str
    line: int


def type_checking(node: ast.AST) -> bool:
    """Whether the node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, package: str) -> Iterator[Import]:
    """Every module that the code imports when it runs, with relative names resolved against `package`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            # `from ftjax import tree` imports a module, `from ftjax.tree import f` a name: both are `ftjax.tree`.
            yield from (
                Import(f"{module}.{a.name}" if module == "ftjax" else module, child.lineno) for a in child.names
            )
        elif type_checking(child):
            yield from (found for branch in child.orelse for found in imports(ast.Module([branch], []), package))
        else:
            yield from imports(child, package)


def room(module: str) -> str:
    """`peft` of `ftjax.peft.lora`; `ftjax` of the package itself."""
    return (module.split(".") + ["", ""])[1] or "ftjax"


def wrong_imports(source: str, *, package: str, here: str) -> list[str]:
    """Texts on the imports of one module that point the wrong way."""
    out = []
    for found in imports(ast.parse(source), package):
        top = found.module.split(".")[0]
        there = room(found.module)
        if top in FOREIGN:
            out.append(f"line {found.line}: {found.module} is not for run time")
        if top != "ftjax" or there == here:
            continue
        if there not in LEVEL:
            there = "ftjax"  # a name of the public face, e.g. `from ftjax import __version__`
        if LEVEL[there] > LEVEL[here]:
            out.append(f"line {found.line}: {here} imports {found.module}, which stands above it")
        if there in STRANGERS.get(here, ()):
            out.append(f"line {found.line}: {here} may not know of {found.module}")
    return out


def place(path: Path) -> tuple[str, str]:
    """The package that relative imports start from, and the room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return ".".join(parts[:-1]), "run" if name == "run" else room(name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    package, here = place(path)
    assert here in LEVEL, f"{here} has no level: enter it in LAYERS"
    assert wrong_imports(path.read_text(), package=package, here=here) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small(path: Path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_the_median_room_is_small():
    assert statistics.median(len(p.read_text().splitlines()) for p in MODULES) <= 150


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path):
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize(
    "source, here, count",
    [
        ("import ftjax.regimes.fit", "peft", 1),
        ("def f():\n    from ftjax.train import loop", "models", 1),
        ("from ftjax import train", "data", 1),
        ("from ..models import llama", "peft", 1),
        ("from ..models import llama", "objectives", 1),
        ("from . import base\nfrom .base import Delta\nfrom ..tree import split", "peft", 0),
        ("if TYPE_CHECKING:\n    from ftjax.regimes import fit\nelse:\n    from ftjax.train import loop", "peft", 1),
        ("import torch.nn\nfrom peft import LoraConfig\nimport pickle", "peft", 3),
        ("from ftjax import __version__", "train", 1),
        ("from ftjax.peft.lora import LoRA", "train", 0),
    ],
)
def test_the_checks_can_fail(source: str, here: str, count: int):
    assert len(wrong_imports(source, package=f"ftjax.{here}", here=here)) == count
