"""The frozen second model of a distillation: loaded as its folder says, and refused unless it speaks the student's language.

    teacher, weights = load_teacher(run, student, tokenizer, numerics, say=notes.append)

A teacher's outputs must mean the same as the student's: the same tokens under the same ids, or the same labels in the same
order; of several, the mean is one teacher. The weights go to `ftjax.train.state.Frozen`, which no checkpoint and no export
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import ConfigError, DataError
from ftjax.headspec import HeadSpec, label_names
from ftjax.models import hf
from ftjax.models.base import Model, Numerics
from ftjax.models.ensemble import together
from ftjax.params import Store
from ftjax.safefiles import read_json

PLACE = "objective.teacher"


def load_teacher(
    run: Any, student: Model, tokenizer: Any, numerics: Numerics, *, say: Callable[[str], None]
) -> tuple[Any, Store | None]:
    """The teacher, or the mean of the teachers, that the run's objective names; (None, None) where it names none.

    Args:
      run: the config.
      student: the model that is trained, with the head of the data.
      tokenizer: the run's; None for images.
      numerics: how to compute.
      say: told what could not be compared.

    Raises:
      ConfigError: tokens, labels or kind of head differ from the student's, or the teacher's folder has no such head.
    """
    source = getattr(run.objective, "teacher", None)
    if source is None:
        return None, None
    sources = {PLACE: source} | {f"{PLACE}s.{i}": s for i, s in enumerate(run.objective.teachers)}
    found = [_load(at, s, run, student, tokenizer, numerics, say) for at, s in sources.items()]
    return found[0] if len(found) == 1 else together(found, run.objective.mean)


def _load(
    place: str, source: Any, run: Any, student: Model, tokenizer: Any, numerics: Numerics, say: Callable[[str], None]
) -> tuple[Model, Store]:
    """One teacher; `place` is where the config names it."""
    folder = source.folder
    config = read_json(folder / "config.json")
    written = hf.head_of(type(hf.model_of(config, numerics)), config)
    head = _head(place, student.head, written, folder, say)
    notes: list[str] = []
    model, weights = source.load(numerics, seed=run.seed, vocab=0, head=head, say=notes.append)
    if drawn := [n for n in notes if "no weights for" in n]:
        raise ConfigError(f"{place}.path={source.path}: the folder has no trained {head.kind} head. {drawn[0]}")
    if problems := [*_problems(place, student, model, tokenizer, folder, say)]:
        raise ConfigError(f"{place}.path={source.path}", problems)
    return model, weights


def _head(place: str, student: HeadSpec, teacher: HeadSpec, folder: Any, say: Callable[[str], None]) -> HeadSpec:
    """The head that the teacher is loaded with; its labels are those in its folder."""
    if student.is_vocabulary:
        return HeadSpec(student.kind)
    if teacher.kind != student.kind:
        raise ConfigError(f"{place}={folder} has a head {teacher.kind!r}; a teacher needs {student.kind!r}")
    if len(teacher.labels) != len(student.labels):
        raise ConfigError(
            f"{place}={folder} knows {len(teacher.labels)} labels ({_some(teacher.labels)}), the data "
            f"{len(student.labels)} ({_some(student.labels)})"
        )
    if teacher.problem and student.problem and teacher.problem != student.problem:
        raise ConfigError(f"{place}={folder} was trained for {teacher.problem}, the data is {student.problem}")
    if teacher.labels == label_names(len(teacher.labels)) != student.labels:
        say(f"{place}={folder} does not name its labels: taken to be {_some(student.labels)}, in this order")
    elif teacher.labels != student.labels:
        i = next(i for i, (a, b) in enumerate(zip(teacher.labels, student.labels, strict=True)) if a != b)
        raise ConfigError(
            f"{place}={folder}: its label {i} is {teacher.labels[i]!r}, the data's is {student.labels[i]!r}; "
            "names and order must be the same"
        )
    return teacher


def _problems(
    place: str, student: Model, teacher: Model, tokenizer: Any, folder: Any, say: Callable[[str], None]
) -> Iterator[str]:
    """What of the vocabularies does not agree."""
    mine, theirs = student.config.vocab_size, teacher.config.vocab_size
    if student.head.is_vocabulary and mine != theirs:
        yield f"vocab_size={theirs}  the student's is {mine}: a distribution over tokens needs one vocabulary"
    if tokenizer is None:
        return
    vocab = tokenizer.get_vocab()
    if (largest := max(vocab.values())) >= theirs:
        yield f"vocab_size={theirs}  the run's tokenizer has ids up to {largest}"
    try:
        known = load_tokenizer(folder).get_vocab()
    except DataError:
        say(f"{place}={folder} has no tokenizer: taken to have been trained with the run's")
        return
    if known != vocab:
        differ = sorted((i, t) for t, i in vocab.items() if known.get(t) != i) or sorted(
            (i, t) for t, i in known.items() if t not in vocab
        )
        i, token = differ[0]
        other = next((t for t, j in known.items() if j == i), None)
        yield f"tokenizer  {len(differ)} tokens differ from the run's; the first: id {i} is {token!r}, there {other!r}"


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:4]) + ", ..." * (len(labels) > 4)
