"""Several data sets in one step: a sub-batch of each task, its rows fixed by the mixture.

rows_k = the largest-remainder rounding of p_k * batch, at least 1 each;   the exact p_k is a factor of the task's loss

    data = prepare_tasks(objective.tasks, Tasks(), Loader(), tokenizer, seed=0)
    batches = TaskBatches(data, loader=Loader(), batch=32, accumulate=2, seed=0, ways=8)
    batches.next().parts["intent"]                   # [2, rows, T]

The rows of a task in a step depend on (seed, name, step) alone: not on the other tasks, micro-batches, devices or hosts.
Where a task's rows do not divide over micro-batches and devices, empty rows of weight 0 fill its sub-batch.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import grain
import jax
import numpy as np
from flax import struct

from ftjax.config import Loader
from ftjax.data.encode import EncodeReport
from ftjax.data.layouts import layout_of
from ftjax.data.pipeline import Batches, RowSource, row_length
from ftjax.data.prepare import Prepared, prepare
from ftjax.data.preview import PreviewExample, preview
from ftjax.errors import ConfigError, DataError


@struct.dataclass
class TaskBatch:
    """A sub-batch per task, by name."""

    parts: dict[str, Any]


@dataclass(frozen=True)
class TaskExamples:
    """The examples of several tasks one after another.

    Attributes:
      parts: examples by task.
    """

    parts: dict[str, Any]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.concatenate([np.asarray(p.lengths) for p in self.parts.values()] or [np.zeros(0, np.int64)])

    @property
    def starts(self) -> dict[str, int]:
        """Index of each task's first example."""
        ends = np.cumsum([len(p) for p in self.parts.values()]).tolist()
        return dict(zip(self.parts, [0, *ends], strict=False))

    def origin(self, i: int) -> str:
        """Task and place of example i."""
        name, start = next((n, s) for n, s in reversed(self.starts.items()) if s <= i)
        return f"{name}: {self.parts[name].origin(i - start)}"


@preview.register
def _each(examples: TaskExamples, tokenizer: Any, n: int = 2) -> list[PreviewExample]:
    return [shown for part in examples.parts.values() for shown in preview(part, tokenizer, 1)]


@dataclass(frozen=True)
class TaskReport(EncodeReport):
    """The reports of several tasks; the numbers are their sums."""

    parts: Mapping[str, EncodeReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Each task's lines under its name, then the mixture."""
        return [f"{name}: {line}" for name, r in self.parts.items() for line in r.lines()] + [*self.notes]

    @classmethod
    def of(cls, parts: Mapping[str, EncodeReport], notes: tuple[str, ...] = ()) -> TaskReport:
        """Adds reports up."""
        counts = [f.name for f in fields(EncodeReport) if f.type == "int" and f.name != "longest"]
        sums: dict[str, Any] = {k: sum(getattr(r, k) for r in parts.values()) for k in counts}
        longest = max((r.longest for r in parts.values()), default=0)
        return cls(**sums, longest=longest, parts=parts, notes=notes)


@dataclass(frozen=True)
class PreparedTasks(Prepared):
    """Several data sets, and what part of the mixture each trained one is.

    Attributes:
      parts: prepared data by task; `train` holds the trained tasks only, `eval` all.
      shares: p_k of the trained tasks, which add up to 1.
    """

    parts: Mapping[str, Prepared] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)


def shares_of(mixing: str, counts: Sequence[int], fixed: Sequence[float], temperature: float) -> list[float]:
    """p_k of each task; see `ftjax.data.tasks.tasks`."""
    sizes = {
        "proportional": lambda: [float(n) for n in counts],
        "temperature": lambda: [n ** (1 / temperature) for n in counts],
        "fixed": lambda: [*fixed],
    }[mixing]()
    return [s / sum(sizes) for s in sizes]


def allocate(shares: Sequence[float], rows: int) -> list[int]:
    """Rows of each task in a step: shares times `rows`, rounded by largest remainder, at least 1 each.

    Raises:
      ConfigError: there are more tasks than rows.
    """
    if rows < len(shares):
        raise ConfigError(f"train.batch={rows}  {len(shares)} tasks need at least one row each")
    wanted = np.asarray(shares) * rows
    counts = np.maximum(1, np.floor(wanted + 1e-9)).astype(int)
    while counts.sum() < rows:
        counts[np.argmax(wanted - counts)] += 1
    while counts.sum() > rows:
        counts[np.argmin(np.where(counts > 1, wanted - counts, np.inf))] -= 1
    return counts.tolist()


def loader_for(loader: Loader, objective: Any) -> Loader:
    """The loader, without packing where the kind of batch has none."""
    return loader if layout_of(objective).packs else loader.model_copy(update={"packing": "none"})


def prepare_tasks(tasks: Sequence[Any], mixture: Any, loader: Loader, tokenizer: Any, *, seed: int) -> PreparedTasks:
    """Reads and encodes the data of every task.

    Args:
      tasks: `ftjax.objectives.multi_task.SubTask`s.
      mixture: `ftjax.data.tasks.tasks.Tasks`.
      loader: max_length, truncation and so on, for all.
      tokenizer: as in `prepare`.
      seed: of the data order.

    Raises:
      ConfigError, DataError: see `prepare`; the text names the task. A task that uses another's head has other labels.
    """
    parts: dict[str, Prepared] = {}
    for i, t in enumerate(tasks):
        options = getattr(t.objective, "data_options", dict)()
        layout = layout_of(t.objective)
        try:
            parts[t.name] = prepare(t.data, loader, tokenizer, seed=seed, layout=layout, options=options)
        except (ConfigError, DataError) as error:
            raise type(error)(f"objective.tasks.{i} ({t.name}): {error}") from None
    for i, t in enumerate(tasks):
        if t.head and parts[t.head].labels != parts[t.name].labels:
            theirs, ours = (", ".join(parts[n].labels[:6]) for n in (t.head, t.name))
            raise ConfigError(f"objective.tasks.{i}.head={t.head}  has the labels {theirs}; {t.name} has {ours}")
    trained = {t.name: parts[t.name] for t in tasks if t.train}
    counts = [len(p.train) for p in trained.values()]
    fixed = [t.share for t in tasks if t.train]
    shares = dict(zip(trained, shares_of(mixture.mixing, counts, fixed, mixture.temperature), strict=True))
    notes = ("mixture (" + mixture.mixing + "): " + ", ".join(f"{n} {p:.1%}" for n, p in shares.items()),)
    first = next(iter(parts.values()))
    return PreparedTasks(
        type=first.type,
        train=TaskExamples({n: p.train for n, p in trained.items()}),
        eval=TaskExamples({n: p.eval for n, p in parts.items()}),
        report=TaskReport.of({n: p.report for n, p in parts.items()}, notes),
        eval_report=TaskReport.of({n: p.eval_report for n, p in parts.items()}),
        template="",
        fingerprint={"tasks": {n: p.fingerprint for n, p in parts.items()}, "examples": _identity(trained)},
        warnings=tuple(dict.fromkeys(f"{n}: {w}" for n, p in parts.items() for w in p.warnings)),
        parts=parts,
        shares=shares,
    )


def _identity(parts: Mapping[str, Prepared]) -> dict[str, Any]:
    each = [p.fingerprint["examples"] for p in parts.values()]
    digest = hashlib.sha256("".join(e["sha256"] for e in each).encode()).hexdigest()
    return {"count": sum(e["count"] for e in each), "tokens": sum(e["tokens"] for e in each), "sha256": digest}


class TaskSource:
    """Random access to batches of all tasks; a source for `grain.MapDataset`.

    Attributes:
      examples: of the trained tasks.
      sources: rows of each task in order.
      rows: rows of each task in a step.
      places: rows of each task's sub-batch in a micro-batch over all hosts, empty ones included.
    """

    def __init__(
        self, examples: TaskExamples, sources: dict[str, RowSource], accumulate: int, ways: int, shard: tuple[int, int]
    ):
        self.examples, self.sources, self.accumulate, self.shard = examples, sources, accumulate, shard
        self.rows = {n: s.batch for n, s in sources.items()}
        self.places = {n: math.ceil(math.ceil(r / accumulate) / ways) * ways for n, r in self.rows.items()}

    def __len__(self) -> int:
        return len(next(iter(self.sources.values())))

    def rows_of(self, step: int) -> np.ndarray:
        """Codes of the rows of a step, all tasks together; see `row`."""
        tasks = len(self.sources)
        found = [k + tasks * s.rows_of(step).ravel() for k, s in enumerate(self.sources.values())]
        return np.concatenate(found)

    def row(self, code: int) -> np.ndarray:
        """Indices into `examples` of a row by its code."""
        row, k = divmod(code, len(self.sources))
        name = list(self.sources)[k]
        return self.examples.starts[name] + self.sources[name].row(row)

    def empty(self) -> TaskBatch:
        """One micro-batch over all hosts that is all padding."""
        return TaskBatch({n: s.examples.build([], s.length, count=self.places[n]) for n, s in self.sources.items()})

    def __getitem__(self, index: Any) -> TaskBatch:
        return TaskBatch({name: self._part(name, int(index)) for name in self.sources})

    def _part(self, name: str, step: int) -> Any:
        source, places, M = self.sources[name], self.places[name], self.accumulate
        host, hosts = self.shard
        rows = [source.row(r).tolist() for r in source.rows_of(step).ravel().tolist()]
        key = (source.seed, step)
        # What is drawn anew (masks) is drawn for all real rows at once, so that it does not depend on how they are split.
        real = source.examples.build(rows, source.length, key=key)
        blank = source.examples.build([], source.length, count=M * places, key=key)
        each = math.ceil(len(rows) / M)
        at = np.concatenate([m * places + np.arange(len(rows[m * each : (m + 1) * each])) for m in range(M)])

        def laid(empty: np.ndarray, values: np.ndarray) -> np.ndarray:
            out = np.array(empty)
            out[at] = values
            out = out.reshape(M, hosts, places // hosts, *out.shape[1:])
            return out[:, host]

        return jax.tree.map(laid, blank, real)


class TaskBatches(Batches):
    """An endless, exactly resumable iterator of batches that hold rows of every trained task.

    Args:
      data: the tasks.
      objectives: of the tasks by name.
      loader: as for `Batches`.
      batch: rows per optimizer step, over all tasks.
      accumulate: micro-batches.
      seed: of the order.
      ways: devices over which the rows of a micro-batch are split.
      shard: (index, count) of this host.

    Attributes:
      lengths: T of each task, held-out examples included.
    """

    def __init__(
        self,
        data: PreparedTasks,
        objectives: Mapping[str, Any],
        *,
        loader: Loader,
        batch: int,
        accumulate: int = 1,
        seed: int = 0,
        ways: int = 1,
        shard: tuple[int, int] = (0, 1),
    ):
        loaders = {n: loader_for(loader, o) for n, o in objectives.items()}
        self.lengths = {n: row_length(loaders[n], p.train, p.eval) for n, p in data.parts.items()}
        rows = dict(zip(data.shares, allocate([*data.shares.values()], batch), strict=True))
        sources = {
            n: RowSource(
                data.parts[n].train, loaders[n], length=self.lengths[n], batch=r, accumulate=1,
                seed=seed + zlib.crc32(n.encode()), shard=(0, 1),
            )
            for n, r in rows.items()
        }  # fmt: skip
        self.source: Any = TaskSource(data.train, sources, accumulate, ways, shard)
        self.length, self._batch = max(self.lengths.values()), batch
        self.rows_per_epoch = sum(s.plan.rows for s in sources.values())
        self.fill_share = float(np.mean([s.plan.fill_share for s in sources.values()]))
        order = {"seed": seed, "batch": batch, "packing": loader.packing, "length": self.lengths, "rows": rows}
        self.fingerprint = {**data.fingerprint, "order": order | {"shuffle": loader.shuffle}}
        options = grain.ReadOptions(num_threads=max(loader.workers, 1), prefetch_buffer_size=loader.prefetch)
        self.dataset = grain.MapDataset.source(self.source).to_iter_dataset(options)
        self._iterator = iter(self.dataset)

    def empty(self) -> TaskBatch:
        """One micro-batch over all hosts that is all padding."""
        return self.source.empty()
