"""Hugging Face model folders: read `config.json` and safetensors into a store, and write them.

    model, params = load("my/llama", dtype="float32")
    save(model, params, "out")

Tensors are read one at a time and placed where the table says; a stack of layers is filled in place, so that the host
holds little beyond the parameters themselves. Names, shapes and completeness are checked against the table; nothing is
loaded in part.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ftjax import registry
from ftjax.errors import ConfigError, DataError, did_you_mean
from ftjax.models.base import Model, Numerics
from ftjax.ops import Weight
from ftjax.params import ParamSpec, Store, Table, join, ranged
from ftjax.safefiles import open_tensors, read_json

SHARD_BYTES = 4 * 1024**3
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                    "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


def resolve(path_or_id: str) -> Path:
    """A local folder as it is; a hub id (``owner/name``) is downloaded, safetensors and JSON only.

    Raises:
      DataError: neither a folder nor a reachable hub id.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{path_or_id} is a file; a model is a folder with config.json and model.safetensors")
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise DataError(f"no model folder at {path_or_id}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"no folder {path_or_id!r}, and the hub does not give it either: {reason}") from None


def model_of(config: dict[str, Any], numerics: Numerics) -> Model:
    """The model that a `config.json` describes.

    Raises:
      DataError: the ``model_type`` is not one of ours, or a setting is missing or unsupported.
    """
    kind = config.get("model_type")
    families = registry.known("family")
    if not isinstance(kind, str) or kind not in families:
        hint = did_you_mean(str(kind), families)
        raise DataError(f"config.json: model_type {kind!r} is not supported.{hint} Supported: {', '.join(families)}")
    family = families[kind]
    return family(family.Config.from_hf(config), numerics)


# Files -----------------------------------------------------------------------------------------------------------------


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards that the index names.

    Raises:
      DataError: there are none; a named shard is absent or lies outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if single.exists():
            return [single]
        pickles = [n for n in _PICKLES if (folder / n).exists()]
        also = f" ({pickles[0]} is a pickle, which ftjax does not open; convert it to safetensors)" if pickles else ""
        raise DataError(f"{folder} has no model.safetensors{also}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DataError(f"{index} has no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or any(c in name for c in "/\\:"):
            raise DataError(f"{index}: shard {name!r} points outside the folder")
        if not (folder / name).exists():
            raise DataError(f"{index} names {name}, which is not there")
    return [folder / name for name in names]


# Loading ---------------------------------------------------------------------------------------------------------------


def file_names(table: Table) -> dict[str, tuple[str, int | None]]:
    """Names in the file -> (store key, layer or None)."""
    names: dict[str, tuple[str, int | None]] = {}
    for key, spec in table.items():
        if spec.kind == "site":
            continue
        r = ranged(key)
        for layer in range(r.start, r.stop) if r else (None,):
            names[spec.hf.format(layer)] = (key, layer)
    return names


Place = Callable[[str, np.ndarray], Any]


def load_table(
    table: Table, files: list[Path], *, dtype: Any, ignore: Callable[[str], bool], place: Place | None = None
) -> Store:
    """Fills every parameter of a table from safetensors files.

    Args:
      table: what must be there.
      files: safetensors files.
      dtype: of the parameters.
      ignore: extra names in the files that carry no parameter (old buffers).
      place: makes the device array from (store key, host array); by default on the default device.

    Raises:
      DataError: missing, extra, misshapen or non-finite tensors, all in one table.
    """
    names = file_names(table)
    place = place or (lambda _, x: jnp.asarray(x))
    host: dict[str, np.ndarray] = {}
    left = {key: sum(1 for k, _ in names.values() if k == key) for key in {k for k, _ in names.values()}}
    store: Store = {}
    problems: list[str] = []
    for name, tensor in _stream(files):
        if name not in names:
            if not ignore(name):
                problems.append(f"extra      {name} {list(tensor().shape)}")
            continue
        key, layer = names.pop(name)
        value, problem = _checked(name, tensor(), table[key])
        if problem:
            problems.append(problem)
            continue
        if layer is None:
            store[key] = place(key, value.astype(dtype))
            continue
        if key not in host:
            host[key] = np.empty(table[key].shape, dtype)
        host[key][layer] = value
        left[key] -= 1
        if left[key] == 0:
            store[key] = place(key, host.pop(key))
    problems += [f"missing    {name}" for name in names]
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise DataError(
            "\n".join([f"{files[0].parent}: weights do not fit the model", *("  " + p for p in problems[:20] + more)])
        )
    return {k: store[k] for k in table if k in store}


def _stream(files: list[Path]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    for path in files:
        with open_tensors(path) as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                yield name, lambda f=f, name=name: f.get_tensor(name)


def _checked(name: str, value: np.ndarray, spec: ParamSpec) -> tuple[np.ndarray, str | None]:
    """The tensor in our layout, or the line that says why not."""
    want = spec.unstacked.shape
    file_shape = want[::-1] if spec.transposed else want
    if value.shape != file_shape:
        return value, f"misshapen  {name} {list(value.shape)}, the model has {list(file_shape)}"
    if not np.isfinite(value.astype(np.float32) if value.dtype.itemsize < 4 else value).all():
        return value, f"non-finite {name} holds NaN or infinity"
    return (value.T if spec.transposed else value), None


def load(
    path_or_id: str,
    *,
    dtype: str = "float32",
    numerics: Numerics | None = None,
    place: Callable[[Model], Place] | None = None,
) -> tuple[Model, Store]:
    """A model folder or hub id as (model, params).

    Args:
      path_or_id: local folder in Hugging Face layout, or a hub id.
      dtype: of the parameters.
      numerics: how to compute; by default in `dtype`.
      place: given the model, makes device arrays (see `load_table`).

    Raises:
      DataError: see `model_of`, `tensor_files` and `load_table`.
    """
    folder = resolve(path_or_id)
    model = model_of(read_json(folder / "config.json"), numerics or Numerics(dtype=dtype))
    tied = getattr(model.config, "tie_word_embeddings", False)
    embed, head = getattr(model, "embed_hf", ""), getattr(model, "head_hf", "")

    def ignore(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == head)

    files = tensor_files(folder)
    if tied:
        _check_tied(files, embed, head)
    put = place(model) if place else None
    return model, load_table(model.table, files, dtype=jnp.dtype(dtype), ignore=ignore, place=put)


def _check_tied(files: list[Path], embed: str, head: str) -> None:
    """A tied head may stand in the files as a copy. Where the values differ transformers unties it; we refuse that."""
    copies = {name for name, _ in _stream(files)} >= {embed, head}
    found = {name: tensor() for name, tensor in _stream(files) if copies and name in (embed, head)}
    if copies and not np.array_equal(found[embed], found[head]):
        raise DataError(
            f"config.json: tie_word_embeddings is true, but {head} differs from {embed} in the files. "
            "Set it to false to use the head as it is"
        )


# Saving ----------------------------------------------------------------------------------------------------------------


def to_file_tensors(table: Table, params: Store) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters under their names and in the layout of the file, one at a time.

    Raises:
      ConfigError: the store holds adapters or taps, which a plain model folder cannot express.
    """
    params = join(params)
    foreign = [k for k, v in params.items() if k not in table or isinstance(v, Weight)]
    if foreign:
        raise ConfigError(
            f"the parameters hold adapters ({foreign[0]} ...): call ftjax.merge first, or save the adapter"
        )
    for key, value in params.items():
        spec, r = table[key], ranged(key)
        value = np.asarray(jax.device_get(value))
        for layer in range(r.start, r.stop) if r else (None,):
            one = value if layer is None else value[layer]
            yield spec.hf.format(layer), np.ascontiguousarray(one.T if spec.transposed else one)


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
    config = {**model.config.to_hf(), "torch_dtype": str(dtype), "dtype": str(dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, value in to_file_tensors(model.table, params):
        if size and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
        total += value.nbytes
    _write_shards(folder, shards, total)
    if tokenizer_from:
        for name in _TOKENIZER_FILES:
            source = Path(tokenizer_from) / name
            if source.exists() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
    return folder


def _write_shards(folder: Path, shards: list[dict[str, np.ndarray]], total: int) -> None:
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    width = max(5, int(math.log10(len(shards))) + 1)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:0{width}d}-of-{len(shards):0{width}d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
