"""Where configs and runs lie, and the nearest of them to a name that was mistyped.

    configs() == [Path("configs/forkme.py"), Path("configs/quickstart.py")]

Nothing here imports JAX or executes a config.
"""

from __future__ import annotations

import ast
from pathlib import Path

from ftjax.errors import ConfigError, nearest


def configs(folder: Path | None = None) -> list[Path]:
    """The configs of a folder: by default `configs` in the working directory, else the one beside the package."""
    beside = Path(__file__).resolve().parent.parent / "configs"
    folder = folder or (Path("configs") if Path("configs").is_dir() else beside)
    return sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))


def listed() -> str:
    """The configs in one line, for errors."""
    return ", ".join(map(str, configs())) or "none here"


def find_config(name: str) -> Path:
    """A config by its path or its name.

    Raises:
      ConfigError: there is none; the text names the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {str(p): p.stem for p in [*configs(), *configs(path.parent)]}
    same = [p for p, stem in known.items() if name in (stem, f"{stem}.py")]
    if same:
        return Path(same[0])
    raise ConfigError(missing_config(path))


def missing_config(path: Path) -> str:
    """The text on a config that does not exist."""
    known = {str(p): p.stem for p in [*configs(), *configs(path.parent)]}
    best = nearest(path.stem, known.values(), 1)
    guess = next((name for name, stem in known.items() if best and stem == best[0]), None)
    text = f" Did you mean {guess!r}?" if guess else ""
    return f"no config {str(path)!r}.{text}" + (f" Configs: {', '.join(sorted(known))}" if known else "")


def title_of(path: Path) -> str:
    """The first line of a config's docstring, without executing it."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except SyntaxError as e:
        return f"(does not parse: line {e.lineno})"
    return (text.splitlines() or [""])[0]


def run_folder(path: Path) -> Path:
    """`path` if it is a run folder.

    Raises:
      ConfigError: it is not; the text names the nearest run folders.
    """
    if (path / "config.json").is_file():
        return path
    runs = sorted(str(p.parent) for root in {path.parent, Path("runs")} for p in root.glob("*/config.json"))
    near = nearest(str(path), runs) or runs[:3]
    why = "has no config.json, so it is not a run folder" if path.exists() else "does not exist"
    raise ConfigError(
        f"run {str(path)!r} {why}." + (f" Runs: {', '.join(near)}" if near else " There are no runs yet.")
    )
