"""The options of each verb of the command line, and the plain objects that they become.

    parser = argparse.ArgumentParser()
    generating(parser)
    generate_args(parser.parse_args(["--run", "runs/x", "--prompt", "Hello"])).temperature == 0.0

Nothing here imports JAX.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftjax.errors import ConfigError
from ftjax.folders import run_folder


@dataclass(frozen=True)
class GenerateArgs:
    """What `generate` was asked for. Exactly one of `run` and `model` is set."""

    prompt: str
    run: Path | None = None
    model: str | None = None
    adapter: Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    task: str = ""


@dataclass(frozen=True)
class ModelArgs:
    """What `eval --model` was asked for: a model, an adapter over it, and the file for the numbers."""

    model: str
    adapter: Path | None = None
    to: Path | None = None


@dataclass(frozen=True)
class FolderArgs:
    """What `merge` and `export` were asked for: from a run folder to a new one; of several tasks only `task` if it is set."""

    run: Path
    to: Path
    task: str = ""


@dataclass(frozen=True)
class SoupArgs:
    """What `soup` was asked for: from run folders to a new folder; how members are chosen and LoRAs averaged."""

    runs: tuple[Path, ...]
    to: Path
    how: str = "uniform"
    lora: str = "cat"


def configuring(parser: argparse.ArgumentParser) -> None:
    """--config, overrides, --out."""
    parser.add_argument("--config", metavar="X", help="a .py file with get_config(), or the config.json of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields to change; see `run.py explain a.b`")
    parser.add_argument("--out", metavar="DIR", help="run folder (the same as out=DIR)")


def training(parser: argparse.ArgumentParser) -> None:
    """Those of `configuring`, and --allow-change."""
    configuring(parser)
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="resume although this field differs from the run's config; repeatable",
    )


def _run_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--run", metavar="DIR", type=Path, required=required, help="run folder, e.g. runs/quickstart")


def _task_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--task", metavar="NAME", default="", help=f"of a run of several tasks: {help}")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="HF model folder or hub id, instead of a run")
    parser.add_argument("--adapter", metavar="DIR", type=Path, help="HF PEFT folder laid over --model")


def evaluating(parser: argparse.ArgumentParser) -> None:
    """--run and overrides, or the fields of another evaluation."""
    _run_option(parser, required=False)
    parser.add_argument("--config", metavar="X", type=Path, help="the config.json of a run, instead of --run")
    parser.add_argument(
        "--runs",
        metavar="DIR",
        nargs="+",
        help="several runs over one data set, instead of --run: ensembles",
    )
    _task_option(parser, "the one that evals=NAME measures (default: the only one that answers)")
    _model_options(parser)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="of evals=NAME over --model: new JSON file for the numbers"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c",
        help="fields to change, e.g. evaluate.examples=0; or evals=NAME and its fields, e.g. evals=lm_eval tasks=arc_easy",
    )  # fmt: skip


def generating(parser: argparse.ArgumentParser) -> None:
    """What to answer with, the prompt, and how to sample."""
    _run_option(parser, required=False)
    _task_option(parser, "the one that answers (default: the only one that can)")
    _model_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt; without it standard input is read")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default 128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="sample from the K likeliest; 0 (default): all"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="sample from the likeliest share P of mass"
    )
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end at this text; repeatable")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the sampling")


def writing(parser: argparse.ArgumentParser) -> None:
    """From a run folder to a new folder."""
    _run_option(parser)
    _task_option(parser, "only this one, in the new folder itself (default: a folder in it for each)")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="new folder")


def souping(parser: argparse.ArgumentParser) -> None:
    """From run folders to a new folder."""
    parser.add_argument("--runs", metavar="DIR", type=Path, nargs="+", required=True, help="run folders, two or more")
    parser.add_argument(
        "--how", choices=("uniform", "greedy"), default="uniform",
        help="uniform (default): all runs; greedy: in order of held-out loss, those that do not raise it",
    )  # fmt: skip
    parser.add_argument(
        "--lora", choices=("cat", "svd", "factors"), default="cat",
        help="LoRAs: cat (default), the exact mean of the updates at the sum of the ranks; svd, the nearest of the same rank; "
        "factors, the mean of A and that of B",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder")


def explaining(parser: argparse.ArgumentParser) -> None:
    """A dotted path."""
    parser.add_argument("path", nargs="?", default="", help="dotted path, e.g. optim.lr, peft, peft.rank")


def copying(parser: argparse.ArgumentParser) -> None:
    """From a config to a new file."""
    parser.add_argument("source", help="a config, by path or name")
    parser.add_argument("target", type=Path, help="new file")


def nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


def evaluated_model(args: argparse.Namespace) -> ModelArgs | None:
    """The bare model that `eval` was asked for; None where it was asked for runs.

    Raises:
      ConfigError: a run is given too, or no evaluation is chosen: held-out data belong to a run.
    """
    if not args.model:
        for option, value in (("--adapter", args.adapter), ("--out", args.out)):
            if value:
                raise ConfigError(f"run.py eval: {option} {value}  needs --model")
        return None
    if args.run or args.config or args.runs or args.task:
        raise ConfigError("run.py eval: --model is instead of a run; leave --run, --runs, --config and --task out")
    if not any(word.startswith("evals=") for word in args.overrides):
        raise ConfigError(
            "run.py eval: --model has no held-out data; choose an evaluation, e.g. evals=lm_eval tasks=arc_easy"
        )
    if args.out and args.out.exists():
        raise ConfigError(f"--out {args.out}: it exists already; nothing is overwritten")
    return ModelArgs(args.model, args.adapter, args.out)


def evaluated_folders(args: argparse.Namespace) -> tuple[Path, ...]:
    """The run folders whose ensemble `eval` was asked for; none where it was asked for one run. Overrides among them are moved.

    Raises:
      ConfigError: another run is given too, or they are not two or more run folders.
    """
    if not args.runs:
        return ()
    if args.run or args.config:
        raise ConfigError("run.py eval: give either --runs, or one of --run DIR and --config DIR/config.json")
    words = [word for word in args.runs if "=" in word]  # argparse gives --runs all that follows
    args.overrides = [*args.overrides, *words]
    return several_runs("eval", [Path(word) for word in args.runs if word not in words])


def evaluated_folder(args: argparse.Namespace) -> Path:
    """The run folder that `eval` was asked for, by itself or by its config.json.

    Raises:
      ConfigError: neither or both are given, or it is no run folder.
    """
    if bool(args.run) == bool(args.config):
        raise ConfigError("run.py eval: give one of --run DIR and --config DIR/config.json")
    if args.config and args.config.name != "config.json":
        raise ConfigError(f"--config {args.config}: only a run can be evaluated; expected its config.json")
    return run_folder(args.run or args.config.parent)


def generate_args(args: argparse.Namespace) -> GenerateArgs:
    """The checked request; the prompt is read from standard input if it is not given.

    Raises:
      ConfigError: with every option that is wrong.
    """
    problems = list(_generate_problems(args))
    if problems:
        raise ConfigError("generate", problems)
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if not prompt:
        raise ConfigError("generate: the prompt is empty; give --prompt TEXT or pipe text in")
    options = {k: v for k, v in vars(args).items() if k not in ("prompt", "run", "stop")}
    run = run_folder(args.run) if args.run else None
    return GenerateArgs(prompt=prompt, run=run, stop=tuple(args.stop), **options)


def _generate_problems(args: argparse.Namespace) -> Iterator[str]:
    if bool(args.run) == bool(args.model):
        yield "--run, --model  give one of them: a run folder, or a model folder with or without --adapter"
    if args.task and not args.run:
        yield f"--task {args.task}  is of a run; give --run DIR"
    if args.adapter and not args.model:
        yield f"--adapter {args.adapter}  needs --model; a run has its adapter already"
    if args.prompt is None and sys.stdin.isatty():
        yield "--prompt  is missing, and nothing is piped in"
    if args.max_new_tokens < 1:
        yield f"--max-new-tokens {args.max_new_tokens}  expected at least 1"
    if not 0 <= args.temperature < float("inf"):
        yield f"--temperature {args.temperature:g}  expected a number >= 0"
    if args.top_k < 0:
        yield f"--top-k {args.top_k}  expected at least 1, or 0 for all"
    if not 0 < args.top_p <= 1:
        yield f"--top-p {args.top_p:g}  expected a share > 0 and <= 1"
    if not 0 <= args.seed < 2**31:
        yield f"--seed {args.seed}  expected 0 to {2**31 - 1}"


def soup_args(args: argparse.Namespace) -> SoupArgs:
    """The checked request.

    Raises:
      ConfigError: fewer than two runs, one of them twice or no run, or the target is in use.
    """
    runs = several_runs("soup", args.runs)
    _refuse_used("--out", args.out)
    return SoupArgs(runs, args.out, args.how, args.lora)


def several_runs(verb: str, folders: list[Path]) -> tuple[Path, ...]:
    """Two or more different run folders.

    Raises:
      ConfigError: with the run that is not one, or is given twice.
    """
    runs = tuple(run_folder(folder) for folder in folders)
    again = [str(r) for i, r in enumerate(runs) if r.resolve() in {x.resolve() for x in runs[:i]}]
    if again or len(runs) < 2:
        raise ConfigError(
            f"run.py {verb}: --runs takes two or more runs" + (f"; {again[0]} is given twice" if again else "")
        )
    return runs


def _refuse_used(option: str, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{option} {folder}: it exists already and is not an empty folder; name a new one")


def folder_args(args: argparse.Namespace) -> FolderArgs:
    """The checked folders.

    Raises:
      ConfigError: the run is none, or the target is in use.
    """
    _refuse_used("--to", args.to)
    return FolderArgs(run=run_folder(args.run), to=args.to, task=args.task)
