"""Hugging Face model folders: read `config.json` and safetensors into a store, and write them.

    model, params = load("my/llama", dtype="float32")
    save(model, params, "out")

`ftjax.models.tensors` reads and gives the tensors themselves; here is what a folder says of its model and its head.
"""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ftjax import registry
from ftjax.errors import DataError, did_you_mean
from ftjax.headspec import HeadSpec, label_names
from ftjax.models.base import Model, Numerics
from ftjax.models.folder import resolve, stream, tensor_files
from ftjax.models.tensors import Place, load_table, to_file_tensors
from ftjax.params import Store, init_leaf, key_of
from ftjax.quant.base import Storage
from ftjax.safefiles import read_json

SHARD_BYTES = 4 * 1024**3
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                    "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model",
                    "preprocessor_config.json")  # fmt: skip


def model_of(config: dict[str, Any], numerics: Numerics, head: HeadSpec | None = None) -> Model:
    """The model that a `config.json` describes.

    Args:
      config: as read.
      numerics: how to compute.
      head: what stands on top; by default what the file's class has (see `head_of`).

    Raises:
      DataError: the ``model_type`` is not one of ours, or a setting is missing or unsupported.
      ConfigError: the family has no such head.
    """
    kind = config.get("model_type")
    families = registry.known("family")
    if not isinstance(kind, str) or kind not in families:
        hint = did_you_mean(str(kind), families)
        raise DataError(f"config.json: model_type {kind!r} is not supported.{hint} Supported: {', '.join(families)}")
    family = families[kind]
    return family(family.Config.from_hf(config), numerics, head or head_of(family, config))


def head_of(family: type[Model], config: dict[str, Any]) -> HeadSpec:
    """The head that a `config.json` names: by its class, with labels from ``id2label`` (two where absent, as there)."""
    names = config.get("architectures") or []
    kinds = {name: kind for kind, name in reversed(family.heads.items())}
    kind = next((kinds[n] for n in names if n in kinds), next(iter(family.heads)))
    if HeadSpec(kind).is_vocabulary:
        return HeadSpec(kind)
    if kind == "question_answering":
        return HeadSpec(kind, ("start", "end"))
    named = config.get("id2label") or {}
    labels = tuple(str(named[k]) for k in sorted(named, key=int)) or label_names(config.get("num_labels") or 2)
    return HeadSpec(kind, labels, config.get("problem_type") or "")


def head_config(model: Model) -> dict[str, Any]:
    """The inverse of `head_of`: fields of `config.json`."""
    head: dict[str, Any] = {"architectures": [model.heads[model.head.kind]]}
    if model.head.labels and model.head.kind != "question_answering":
        head["id2label"] = {str(i): name for i, name in enumerate(model.head.labels)}
        head["label2id"] = {name: i for i, name in enumerate(model.head.labels)}
        if model.head.problem:
            head["problem_type"] = model.head.problem
    return head


# Loading ---------------------------------------------------------------------------------------------------------------


def load(
    path_or_id: str,
    *,
    dtype: str = "float32",
    numerics: Numerics | None = None,
    head: HeadSpec | None = None,
    seed: int = 0,
    place: Callable[[Model], Place] | None = None,
    say: Callable[[str], None] = warnings.warn,
    storage: Storage | None = None,
) -> tuple[Model, Store]:
    """A model folder or hub id as (model, params).

    Args:
      path_or_id: local folder in Hugging Face layout, or a hub id.
      dtype: of the parameters.
      numerics: how to compute; by default in `dtype`.
      head: what stands on top; by default what the folder's config names.
      seed: of a head that the files do not have.
      place: given the model, makes device arrays (see `load_table`).
      say: told of a new head, and of one in the files that is left out.
      storage: how the blocks' kernels are held; None: as plain arrays.

    Raises:
      DataError: see `model_of`, `tensor_files` and `load_table`.
    """
    folder = resolve(path_or_id)
    config = read_json(folder / "config.json")
    files = tensor_files(folder)
    names = frozenset(name for name, _ in stream(files))
    model = _untied(model_of(config, numerics or Numerics(dtype=dtype), head), config, files, names)
    loading = _Loading(model, head_of(type(model), config), names, seed)
    params = load_table(
        model.table, files, dtype=jnp.dtype(dtype), rename=loading.rename, ignore=loading.ignore,
        absent=loading.absent, place=place(model) if place else None, storage=storage,
    )  # fmt: skip
    for line in loading.notes():
        say(f"{folder}: {line}")
    return model, params


@dc.dataclass
class _Loading:
    """How the names in a folder stand to a model's table.

    Attributes:
      model: what is loaded.
      written: the head that the folder was saved with.
      names: in the files.
      seed: of new heads.
    """

    model: Model
    written: HeadSpec
    names: frozenset[str]
    seed: int
    made: list[str] = dc.field(default_factory=list)
    left_out: list[str] = dc.field(default_factory=list)

    @property
    def other_head(self) -> bool:
        """Whether the folder was saved with another head."""
        return self.model.head != self.written

    @cached_property
    def replaced(self) -> frozenset[str]:
        """Names of head tensors that mean something else in the files: another kind of head, or other labels."""
        now, then = self.model.head, self.written
        unnamed = then.labels == label_names(len(now.labels))  # labels that nobody has named stand for any
        same = now.labels == then.labels or unnamed or (now.kind != then.kind and len(now.labels) == len(then.labels))
        if same and self.model.heads[now.kind] == self.model.heads[then.kind]:
            return frozenset()
        names = (s.hf for k, s in self.model.table.items() if k.startswith("head/"))
        return frozenset(n for n in names if not any(fnmatchcase(n, p) for p in self.model.shared_head))

    @property
    def tied(self) -> tuple[str, str] | None:
        """Names of the embedding and of the output head where these are one tensor."""
        return tied_names(self.model)

    @cached_property
    def bare(self) -> bool:
        """Whether the folder holds a base alone, whose names lack the prefix."""
        prefix = self.model.prefix
        return bool(prefix) and not any(self.model.canonical(n).startswith(prefix) for n in self.names)

    def rename(self, name: str) -> str:
        """To the table's name; empty for a tensor whose place a new head takes."""
        name = self.model.canonical(name)
        name = self.model.prefix + name if self.bare else name
        if name in self.replaced:
            self.left_out.append(name)
            return ""
        return name

    def ignore(self, name: str) -> bool:
        """Buffers; a tied head's copy; the tensors of a head that this model does not have."""
        if not name or any(fnmatchcase(name, pattern) for pattern in self.model.buffers):
            return True
        if self.model.unused(name):
            return True
        if self.tied and name == self.tied[1]:
            return True
        other = self.other_head and bool(self.model.prefix) and not self._of_base(name)
        if other:
            self.left_out.append(name)
        return other

    def _of_base(self, name: str) -> bool:
        return name.startswith(self.model.prefix) and ".pooler." not in name

    def absent(self, key: str) -> Any:
        """A new task head's values, from the seed; None for everything else: a head of the vocabulary is never made up."""
        if self.model.head.is_vocabulary:
            return None
        if not (self.other_head or self.bare) or key.split("/")[0] not in ("head", "pooler"):
            return None
        self.made.append(key)
        return init_leaf(key_of(jax.random.key(self.seed), "model"), key, self.model.table[key], jnp.float32)

    def notes(self) -> Iterator[str]:
        """What a user must know."""
        if self.made:
            yield f"no weights for {', '.join(self.made)}: drawn from seed {self.seed}; train them"
        if self.left_out:
            yield f"left out, of another head: {', '.join(self.left_out[:5])}" + " ..." * (len(self.left_out) > 5)


def tied_names(model: Model) -> tuple[str, str] | None:
    """Names of the embedding and of the output head where these are one tensor."""
    names = getattr(model, "embed_hf", ""), getattr(model, "head_hf", "")
    return names if getattr(model.config, "tie_word_embeddings", False) and all(names) else None


def _untied(model: Model, config: dict[str, Any], files: list[Path], names: frozenset[str]) -> Model:
    """The model as its files have it. A tied head may stand there as a copy; where its values are others it is not tied.

    Raises:
      DataError: so it is, in a family of which the config file should say it.
    """
    tied = tied_names(model)
    if tied is None or not names.issuperset(tied):
        return model
    found = {name: tensor() for name, tensor in stream(files) if name in tied}
    embed, head = (found[name] for name in tied)
    if np.array_equal(embed, head):
        return model
    if not model.unties:
        raise DataError(
            f"config.json: tie_word_embeddings is true, but {tied[1]} differs from {tied[0]} in the files. "
            "Set it to false to use the head as it is"
        )
    return model_of({**config, "tie_word_embeddings": False}, model.numerics, model.head)


# Saving ----------------------------------------------------------------------------------------------------------------


def save(model: Model, params: Store, folder: str | Path, *, tokenizer_from: str | Path | None = None) -> Path:
    """Writes a model folder that transformers opens: config.json, safetensors (in shards above 4 GiB), tokenizer files.

    Args:
      model: describes the parameters.
      params: plain arrays; merge adapters first.
      folder: created if absent.
      tokenizer_from: folder whose tokenizer files are copied along.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(jax.tree.leaves(params))).dtype
    config = {**model.config.to_hf(), **head_config(model), "torch_dtype": str(dtype), "dtype": str(dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = itertools.chain(to_file_tensors(model.table, params), model.constants().items())
    _write_shards(folder, tensors)
    if tokenizer_from:
        for name in _TOKENIZER_FILES:
            source = Path(tokenizer_from) / name
            if source.exists() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
    return folder


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """One file, or several with an index; no more than one is held at a time, so their number is known at the end only."""
    parts: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors):
        total += sum(x.nbytes for x in shard.values())
        parts.append((folder / f"part-{len(parts)}.safetensors.tmp", list(shard)))
        save_file(shard, parts[-1][0], metadata={"format": "pt"})
    if len(parts) == 1:
        parts[0][0].replace(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        path.replace(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Tensors in portions of up to `SHARD_BYTES`, but never less than one."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard
