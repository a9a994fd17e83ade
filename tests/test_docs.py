"""Generated pages are up to date, and every file that the docs link to is there. FTJAX_UPDATE_GOLDEN=1 rewrites the pages."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from ftjax import registry
from ftjax.config import Run
from ftjax.explain import first_line
from ftjax.schema import slot_kind
from ftjax.words import describe
from tests.test_matrix import QUANTIZED, Cell, all_cells, covering, impossible

ROOT = Path(__file__).resolve().parent.parent


def field_rows(cls) -> list[str]:
    from ftjax.schema import field_arms

    rows = []
    for name, info in cls.model_fields.items():
        if name == "name" and slot_kind(info) is None and cls is not Run and not info.description:
            continue
        default = info.get_default(call_default_factory=False)
        shown = (
            ""
            if info.is_required()
            else f"`{default}`"
            if isinstance(default, str | int | float | bool | tuple)
            else ""
        )
        rows.append(
            f"| `{name}` | {describe(field_arms(info))} | {shown} | {info.description or ''} |".replace("||", "|")
        )
    return rows


def parts_of(classes) -> list[type]:
    """Components that are fields of others, without a slot."""
    fields = [info for cls in classes for info in getattr(cls, "model_fields", {}).values() if slot_kind(info) is None]
    return [info.annotation for info in fields if hasattr(info.annotation, "model_fields")]


def config_page() -> str:
    out = [
        "# Every field of a run",
        "",
        "Generated from the code; `python run.py explain optim.lr` shows one. Write them in a",
    ]
    out[-1] += " config file, or as `a.b=c` on the command line."
    head = ["", "| field | takes | default | meaning |", "|---|---|---|---|"]
    plain = [
        n for n, f in Run.model_fields.items() if slot_kind(f) is None and not hasattr(f.annotation, "model_fields")
    ]
    out += ["", "## run", *head, *[r for r in field_rows(Run) if r.split("`")[1] in plain]]
    for name, info in Run.model_fields.items():
        kind = slot_kind(info)
        if kind is None and hasattr(info.annotation, "model_fields"):
            out += ["", f"## {name}", "", first_line(info.annotation), *head, *field_rows(info.annotation)]
        classes = registry.known(kind) if kind else {}
        inner = {f"{name}.{n}": slot_kind(f) for cls in classes.values() for n, f in cls.model_fields.items()}
        places = {name: classes, **{path: registry.known(k) for path, k in inner.items() if k}}
        for path, key, cls in ((p, key, cls) for p, found in places.items() for key, cls in found.items()):
            out += ["", f"## {path}={key}", "", first_line(cls)]
            rows = [r for r in field_rows(cls) if r.split("`")[1] != "name"]
            out += [*head, *rows] if rows else []
    for cls in dict.fromkeys(cls for kind in registry.PACKAGES for cls in parts_of(registry.known(kind).values())):
        out += ["", f"## fields of {cls.__name__}", "", first_line(cls), *head, *field_rows(cls)]
    return "\n".join(out) + "\n"


def matrix_page() -> str:
    cells = all_cells()
    able = [c for c in cells if not impossible(c)]
    plain = [c for c in able if c.quant == "none"]
    out = [
        "# Which combinations run",
        "",
        f"Generated from the registries: {len(able)} cells of objective x method x family, and some of them over a base in 4 "
        "bits (`model.quantize=nf4`): every objective with lora, every method over four families. A plain "
        f"`pytest` runs a covering set of {len(covering(able))} of them, `pytest tests/test_matrix.py --matrix=full` all.",
        "",
        "| objective | method | families |",
        "|---|---|---|",
    ]
    for pair in dict.fromkeys((c.objective, c.peft) for c in plain):
        out.append(f"| {' | '.join(pair)} | {', '.join(c.family for c in plain if (c.objective, c.peft) == pair)} |")
    out += over_nf4(cells)
    reasons = sorted({why for c in cells if c.quant == "none" and (why := impossible(c))})
    out += ["", "## What cannot be", "", *(f"- {why}" for why in reasons or ["nothing so far"])]
    return "\n".join(out) + "\n"


def over_nf4(cells: list[Cell]) -> list[str]:
    """Methods over a quantized base by family: a number where the cell cannot be, with the reason below."""
    reasons: dict[str, int] = {}

    def entry(objective: str, peft: str, family: str) -> str:
        why = impossible(Cell(objective, peft, family, "nf4"))
        return f"({reasons.setdefault(why, len(reasons) + 1)})" if why else "runs"

    methods = registry.known("peft")
    rows = [f"| {m} | {' | '.join(entry(o, m, f) for f, o in QUANTIZED.items())} |" for m in methods]
    lora: dict[str, list[str]] = {}
    for c in cells:
        if c.quant == "nf4" and c.peft == "lora" and not impossible(c):
            lora.setdefault(c.objective, []).append(c.family)
    return [
        "",
        "## Over a base in 4 bits",
        "",
        f"With lora: {', '.join(f'{o} ({", ".join(f)})' for o, f in lora.items())}.",
        "",
        f"| method | {' | '.join(f'{f}, {o}' for f, o in QUANTIZED.items())} |",
        "|---" * (1 + len(QUANTIZED)) + "|",
        *rows,
        "",
        *(f"({n}) {why}" + ("" if n == len(reasons) else "  ") for why, n in reasons.items()),
    ]


def models_page() -> str:
    """Families, the heads they have, and the tests that compare them with transformers or torch."""
    oracles = {path.stem: path.read_text() for path in sorted((ROOT / "tests" / "oracle").glob("test_*.py"))}
    out = [
        "# Models",
        "",
        "Generated from the registry. A folder's `model_type` decides the family, its class the head; "
        "`HeadSpec` asks for another. *compared in* names the oracle tests that mention the family.",
        "",
        "| model_type | what it is | heads | compared in |",
        "|---|---|---|---|",
    ]
    for name, family in registry.known("family").items():
        about = (importlib.import_module(family.__module__).__doc__ or "").splitlines()[0].rstrip(".")
        words = {
            name,
            *(c for c in family.heads.values() if c),
            *(c.split("For")[0] for c in family.heads.values() if c),
        }
        found = [stem for stem, text in oracles.items() if any(re.search(rf"\b{re.escape(w)}\b", text) for w in words)]
        out.append(f"| `{name}` | {about} | {', '.join(family.heads)} | {', '.join(found)} |")
    return "\n".join(out) + "\n"


PAGES = {"config": config_page, "matrix": matrix_page, "models": models_page}


@pytest.mark.parametrize("name, page", PAGES.items(), ids=list(PAGES))
def test_generated_page(name, page):
    path = ROOT / "docs" / f"{name}.md"
    if os.environ.get("FTJAX_UPDATE_GOLDEN"):
        path.write_text(page())
    assert path.read_text() == page(), f"FTJAX_UPDATE_GOLDEN=1 pytest tests/test_docs.py rewrites {path.name}"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
