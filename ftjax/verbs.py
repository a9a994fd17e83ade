"""The command line: `python run.py [verb] --config X [a.b=c ...]`.

    python run.py --config configs/quickstart.py optim.lr=1e-3      # the verb is `train` unless said otherwise
    python run.py explain peft.rank

Each verb is one entry of `VERBS`: its help with an example, its options and its body. What a body needs of JAX is
imported inside of it, so that `--help`, `ls` and mistyped commands answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ftjax import options
from ftjax.errors import ConfigError, DeviceError, FtjaxError, did_you_mean
from ftjax.folders import configs, find_config, listed, title_of
from ftjax.parallel import xla_flags

if TYPE_CHECKING:
    from ftjax.config import Run

DEFAULT = "train"


@dataclass(frozen=True)
class Verb:
    """One verb: a line of help, an example, its options and its body (which returns the exit code)."""

    help: str
    example: str
    declare: Callable[[argparse.ArgumentParser], None]
    body: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises the complaint with the usage below it."""
        dashed = re.findall(r"--([a-z_]+(?:\.\w+)*=\S+)", message)
        hint = f". Overrides have no dashes: {' '.join(dashed)}" if dashed else ""
        raise ConfigError(f"{self.prog}: {message}{hint}\n{self.format_usage().rstrip()}")


# ------------------------------------------------------------------------------------------------ entry
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process.

    0 done, 1 a fault of ours (with its traceback), 2 wrong input, 3 wrong data or checkpoint, 4 devices or memory,
    130 Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _plain_warning
            return dispatch(argv)
    except FtjaxError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if not out_of_memory(e):
            traceback.print_exc()
            return 1
        first = str(e).splitlines()[0]
        print(f"{OUT_OF_MEMORY}\n  {first}", file=sys.stderr)
        return DeviceError.exit_code


def _plain_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Warnings as a user reads them, without the line of ours that gave them."""
    print(f"warning: {message}", file=sys.stderr)


OUT_OF_MEMORY = (
    "out of device memory. What helps, in this order: train.accumulate=2 or more (same result, smaller micro-batches), "
    "compute.remat=full, a smaller train.batch or loader.max_length, compute.dtype=bfloat16, mesh.fsdp=-1 mesh.data=1 "
    "on several devices. `python run.py check --config ...` shows the memory before a run."
)


def out_of_memory(error: BaseException) -> bool:
    """Whether XLA ran out of memory, at compile or run time; by name, because jax may not be imported."""
    return type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def dispatch(argv: list[str]) -> int:
    """Parses a command and runs its verb.

    Raises:
      ConfigError: the verb does not exist.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in VERBS:
        name, rest = argv[0], argv[1:]
    elif argv[0].startswith("-") or "=" in argv[0]:
        name, rest = DEFAULT, argv
    else:
        raise ConfigError(f"no verb {argv[0]!r}.{did_you_mean(argv[0], VERBS)} Verbs: {', '.join(VERBS)}")
    verb = VERBS[name]
    parser = Parser(
        prog=f"run.py {name}",
        description=verb.help,
        epilog=f"example:\n  python run.py {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.declare(parser)
    return verb.body(parser.parse_intermixed_args(rest))


def overview() -> str:
    """The text of `run.py --help`."""
    lines = [f"  {name:<9} {verb.help.splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: python run.py [verb] --config X [a.b=c ...]",
            "",
            f"verbs ({DEFAULT} unless said otherwise; `python run.py VERB --help` for its options):",
            *lines,
            "",
            "example:",
            "  python run.py --config configs/quickstart.py optim.lr=1e-3 peft.rank=8",
        ]
    )


# ------------------------------------------------------------------------------------------------ bodies
def _entry() -> Any:
    """The module of bodies that train; imported late because it imports JAX."""
    return importlib.import_module("ftjax.entry")


def _load(args: argparse.Namespace) -> Run:
    if not args.config:
        raise ConfigError(f"--config is missing. Configs: {listed()}")
    from ftjax.configfile import advice, load

    run = load(args.config, [*args.overrides, *([f"out={args.out}"] if args.out else [])])
    for text in advice(run):
        print(f"warning: {text}", file=sys.stderr)
    if run.compute.onednn:
        xla_flags.apply()  # XLA reads them when its first device is asked for
    return run


def _train(args: argparse.Namespace) -> int:
    run = _load(args)  # before JAX is imported: a mistyped path is answered at once
    return _entry().train(run, tuple(args.allow_change))


def _check(args: argparse.Namespace) -> int:
    run = _load(args)  # before JAX is imported: a mistyped path is answered at once
    return _entry().check(run)


def _eval(args: argparse.Namespace) -> int:
    if model := options.evaluated_model(args):
        return _entry().evaluate_model(model, tuple(args.overrides))
    if several := options.evaluated_folders(args):
        if args.task:
            raise ConfigError(f"run.py eval: --task {args.task} is of one run; give --run DIR")
        return _entry().ensemble(several, tuple(args.overrides))
    folder = options.evaluated_folder(args)
    return _entry().evaluate(folder, tuple(args.overrides), args.task)


def _generate(args: argparse.Namespace) -> int:
    request = options.generate_args(args)
    return _entry().generate(request)


def _merge(args: argparse.Namespace) -> int:
    request = options.folder_args(args)
    return _entry().merge(request)


def _export(args: argparse.Namespace) -> int:
    request = options.folder_args(args)
    return _entry().export_run(request)


def _soup(args: argparse.Namespace) -> int:
    request = options.soup_args(args)
    return _entry().soup(request)


def _ls(args: argparse.Namespace) -> int:
    rows = [(str(path), title_of(path)) for path in configs()]
    if not rows:
        raise ConfigError("there are no configs: neither ./configs nor one beside the package")
    width = max(len(path) for path, _ in rows)
    print("\n".join(f"{path:<{width}}  {line}" for path, line in rows))
    return 0


def _env(args: argparse.Namespace) -> int:
    from ftjax.envinfo import report

    print(report())
    return 0


def _explain(args: argparse.Namespace) -> int:
    from ftjax.explain import explain

    print(explain(args.path))
    return 0


def _cp(args: argparse.Namespace) -> int:
    source = find_config(args.source)
    target = args.target / source.name if args.target.is_dir() else args.target
    if target.exists():
        raise ConfigError(f"{target} exists already; it is not overwritten")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {str(target.parent)!r}")
    shutil.copyfile(source, target)
    print(f"{target}: a copy of {source}. Next: python run.py check --config {target}")
    return 0


VERBS: dict[str, Verb] = {
    "train": Verb(
        "Train; run the same command again to resume.",
        "--config configs/quickstart.py optim.lr=1e-3",
        options.training,
        _train,
    ),
    "check": Verb(
        "Dry run: resolved config, examples with masks, parameters, memory; then stop.",
        "check --config configs/quickstart.py",
        options.configuring,
        _check,
    ),
    "eval": Verb(
        "Evaluate the best checkpoint of a run, or ensembles of several runs.",
        "eval --run runs/quickstart evaluate.examples=0",
        options.evaluating,
        _eval,
    ),
    "generate": Verb(
        "Answer a prompt, or standard input, with a run or a model.",
        'generate --run runs/quickstart --prompt "def add(a, b):"',
        options.generating,
        _generate,
    ),
    "merge": Verb(
        "Write a plain HF model folder with the adapter merged in.",
        "merge --run runs/quickstart --to merged",
        options.writing,
        _merge,
    ),
    "export": Verb(
        "Write the adapter of a run as a HF PEFT folder.",
        "export --run runs/quickstart --to adapter",
        options.writing,
        _export,
    ),
    "soup": Verb(
        "Average the weights of several runs of one base.",
        "soup --runs runs/a runs/b runs/c --how greedy --out soups/abc",
        options.souping,
        _soup,
    ),
    "ls": Verb("List the configs.", "ls", options.nothing, _ls),
    "env": Verb("Show versions, devices and known bad pairs, to paste into an issue.", "env", options.nothing, _env),
    "explain": Verb(
        "Show what a field of a config may hold and means.", "explain optim.lr", options.explaining, _explain
    ),
    "cp": Verb("Copy a config to start from.", "cp quickstart my.py", options.copying, _cp),
}
