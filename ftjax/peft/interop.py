"""Adapter folders as Hugging Face PEFT reads and writes them: adapter_config.json + adapter_model.safetensors.

    save_adapter("out", overlay, model.table, LoRA(rank=8), base_path="my/llama")
    file = load_adapter("out", model.table, params)          # file.method, file.overlay

A method that has such a format carries a `Codec` as its class attribute ``hf_codec``; that is all this module knows of
methods, so that a new one is one file. Most store a few small arrays per adapted module: those subclass
`ftjax.peft.modules.ModuleCodec`. Key names and shapes are those of PEFT 0.21. Methods that PEFT does not have are kept in
AdapterHub's folders: `ftjax.peft.adapterhub`.
"""

from __future__ import annotations

import dataclasses as dc
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from ftjax.errors import ConfigError, DataError, did_you_mean, listing
from ftjax.headspec import HeadSpec, label_names
from ftjax.params import Store, Table
from ftjax.peft.base import Overlay
from ftjax.registry import known
from ftjax.safefiles import open_tensors, read_json

PREFIX = "base_model.model."
TASK_TYPES = {
    "causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS",
}  # fmt: skip
"""PEFT's name of a task, which decides the class that it opens a base with; other heads have none."""
_OUTPUTS = ("classifier.weight", "score.weight", "out_proj.weight", "qa_outputs.weight")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HUB, HUB_WEIGHTS_FILE = "ADAPTERHUB", "adapter.safetensors"
"""AdapterHub's folders (see `ftjax.peft.adapterhub`) have no peft_type; here they have this one."""
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip

Tensors = dict[str, np.ndarray]


@dc.dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds.

    Attributes:
      method: the method with the file's settings; `overlay` is the truth where they cannot say all (per-module ranks).
      overlay: float32 entries keyed as the table, stacked over adjoining layers.
      saved: weights of the base that were trained beside the adapter (a task head), by store key.
      base_path: the model that the file says it belongs to; a name for people, never opened.
    """

    method: Any
    overlay: Overlay
    base_path: str
    saved: Store = dc.field(default_factory=dict)


class Codec:
    """How one method stands in an adapter folder. Methods may share a ``peft_type`` and differ in what they refuse."""

    peft_type: ClassVar[str]
    weights_file: ClassVar[str] = WEIGHTS_FILE

    def wrap(self, config: dict[str, Any]) -> dict[str, Any]:
        """The whole adapter_config.json as the format has it; PEFT's is flat."""
        return config

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """Why this method cannot honour a configuration, one line each; empty: it can."""
        raise NotImplementedError

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """(the method's part of adapter_config.json, tensors by their full names in the file)."""
        raise NotImplementedError

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """(method, overlay); `params` for methods that need the base's values, not only its shapes.

        Raises:
          DataError: the tensors are not exactly those that the configuration and the table call for.
        """
        raise NotImplementedError

    # Of a method that holds others, each with a folder inside its own.

    nested: ClassVar[bool] = False
    """Whether `save` and `load` take the place of the rest."""

    def save(
        self, folder: Path, overlay: Overlay, table: Table, method: Any, *, saved: Store, **about: Any
    ) -> tuple[dict[str, Any], Tensors, Store]:
        """Writes the inner folders; (settings, tensors and the weights for ``modules_to_save`` of the outer one)."""
        raise NotImplementedError

    def load(
        self, folder: Path, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store
    ) -> tuple[Any, Overlay, Store]:
        """(method, overlay, trained weights of the base); what it reads of the outer tensors it removes."""
        raise NotImplementedError

    # Of a method that trains weights of the base themselves and whose file has them; most have no such thing.

    def holds_base(self, table: Table) -> bool:
        """Whether a file can hold what is trained although there is no overlay."""
        return False

    def encode_base(self, saved: Store, table: Table) -> tuple[dict[str, Any], Tensors, Store]:
        """(settings, tensors, the weights that remain for ``modules_to_save``) of trained weights of the base."""
        return {}, {}, saved

    def take_base(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> Store:
        """Removes weights of the base from the tensors of a file and returns them by store key.

        Raises:
          DataError: they are not those that the configuration and the table call for.
        """
        return {}


# Folders -------------------------------------------------------------------------------------------------------------


def codecs() -> dict[str, list[Codec]]:
    """The codecs of all registered methods, by peft_type."""
    found: dict[str, list[Codec]] = {}
    for cls in known("peft").values():
        codec = getattr(cls, "hf_codec", None)
        if codec is not None:
            found.setdefault(codec.peft_type, []).append(codec)
    return found


def save_adapter(
    folder: str | Path,
    overlay: Overlay,
    table: Table,
    method: Any,
    *,
    base_path: str,
    task_type: str | None = "CAUSAL_LM",
    saved: Store | None = None,
    card: str = "",
) -> Path:
    """Writes an adapter folder that PEFT opens.

    Args:
      folder: created if absent.
      overlay: the trained entries.
      table: of the model they belong to.
      method: the method that made them.
      base_path: folder or hub id of the base model.
      task_type: PEFT's name of the task, which decides the class that it opens the base with.
      saved: weights of the base trained beside the adapter, as `modules_to_save` (a task head).
      card: text of README.md; none is written when empty.

    Raises:
      ConfigError: the method has no such format.
    """
    codec = getattr(method, "hf_codec", None)
    if codec is None:
        able = ", ".join(name for name, cls in known("peft").items() if getattr(cls, "hf_codec", None))
        raise ConfigError(f"peft={method.name} has no form in Hugging Face PEFT's format. Methods that have: {able}")
    if codec.nested:
        settings, tensors, saved = codec.save(
            Path(folder), overlay, table, method, base_path=base_path, task_type=task_type, saved=saved or {}
        )
    else:
        settings, tensors = codec.encode(overlay, table, method)
        more, own, saved = codec.encode_base(saved or {}, table)
        tensors, settings = tensors | own, settings | more
    if saved:
        copies, modules = saved_modules(saved, table)
        tensors, settings = tensors | copies, settings | {"modules_to_save": modules}
    config = {
        "peft_type": codec.peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base_path,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        **settings,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    solid = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(solid, folder / codec.weights_file, metadata={"format": "pt"})
    text = json.dumps(codec.wrap(config), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def load_adapter(folder: str | Path, table: Table, params: Store, *, base_path: str | None = None) -> AdapterFile:
    """Reads an adapter folder against the model it is to be laid over; strict, nothing is loaded in part.

    Args:
      folder: in PEFT's format.
      table: of the base model.
      params: the base's parameters.
      base_path: where the base came from; a warning is given when the file names another one.

    Raises:
      DataError: files are missing, damaged or a pickle; the type or a setting is not supported; tensors are missing,
        extra, misshapen or not finite; a module is not in the model.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"no adapter folder at {folder}" + (" (a file is)" if folder.exists() else ""))
    config = flat(read_json(folder / CONFIG_FILE))
    try:
        tensors = read_tensors(folder, weights_name(config))
        saved = take_saved(config.pop("modules_to_save", None) or [], tensors, table)
        codec = codec_for(config)
        if codec.nested:
            method, overlay, more = codec.load(folder, config, tensors, table, params)
        else:
            more = codec.take_base(config, tensors, table, params)
            method, overlay = codec.decode(config, tensors, table, params)
        saved |= more
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    named = str(config.get("base_model_name_or_path") or "")
    if base_path and named and _last(named) != _last(base_path):
        warnings.warn(f"{folder} was made for {named!r}; it is laid over {base_path!r}", stacklevel=2)
    return AdapterFile(method, overlay, named, saved)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with all settings at the top, where AdapterHub nests the method's."""
    inner = config.get("config")
    if "peft_type" in config or not isinstance(inner, dict):
        return config
    named = config.get("base_model_name_or_path") or config.get("model_name")
    outer = {k: v for k, v in config.items() if k != "config"}
    return {**outer, **inner, "peft_type": HUB, "base_model_name_or_path": named}


def weights_name(config: Mapping[str, Any]) -> str:
    """The file with an adapter folder's tensors, for its (flat) configuration."""
    return HUB_WEIGHTS_FILE if config.get("peft_type") == HUB else WEIGHTS_FILE


def head_of(folder: str | Path) -> HeadSpec | None:
    """The head that an adapter folder brings along, its labels unnamed; None when it brings none.

    Raises:
      DataError: see `read_tensors`.
    """
    folder = Path(folder).expanduser()
    config = flat(read_json(folder / CONFIG_FILE))
    kind = next((k for k, task in TASK_TYPES.items() if task == config.get("task_type")), "")
    modules = tuple(config.get("modules_to_save") or ())
    if not modules or not kind or HeadSpec(kind).is_vocabulary:
        return None
    with open_tensors(folder / weights_name(config)) as f:
        outputs = [
            f.get_slice(name).get_shape()[0]
            for name in f.keys()  # noqa: SIM118 (not a dict)
            if name.removeprefix(PREFIX).startswith(modules) and name.endswith(_OUTPUTS)
        ]
    return HeadSpec(kind, label_names(outputs[0])) if outputs else None


def saved_modules(saved: Store, table: Table) -> tuple[Tensors, list[str]]:
    """Whole weights as PEFT keeps them: (tensors by name in the file, modules)."""
    tensors = {f"{PREFIX}{table[k].hf}": table[k].to_file(np.asarray(v, np.float32)) for k, v in saved.items()}
    return tensors, sorted({table[k].hf.split(".")[0] for k in saved})


def take_saved(modules: list[str], tensors: Tensors, table: Table) -> Store:
    """Removes the tensors of `modules_to_save` from those of a file and returns them by store key.

    Raises:
      DataError: the model has no such module (load the base with the head that the adapter was trained with), or a
        tensor is missing or misshapen.
    """
    saved: Store = {}
    problems = []
    for module in modules:
        inside = {k: s for k, s in table.items() if s.hf == module or s.hf.startswith(f"{module}.")}
        if not inside:
            problems.append(
                f"modules_to_save={module!r}  the model has no such module: load it with the adapter's head"
            )
        for key, spec in inside.items():
            value = tensors.pop(f"{PREFIX}{spec.hf}", None)
            if value is None or value.shape != spec.file_shape:
                found = "missing" if value is None else f"misshapen {list(value.shape)}"
                problems.append(f"{PREFIX}{spec.hf}  {found}, expected {list(spec.file_shape)}")
            else:
                saved[key] = spec.from_file(value)
    if problems:
        raise DataError(listing("the adapter's own modules do not fit the model", problems))
    return saved


def _last(path: str) -> str:
    """The last part of a path or hub id, whichever system wrote it: folders move, their names rarely change."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].lower()


def codec_for(config: Mapping[str, Any]) -> Codec:
    """The codec of the method that can honour an adapter_config.json.

    Raises:
      DataError: no such type, or settings that change what the adapter computes in a way that is not supported.
    """
    kind, table = str(config.get("peft_type")), codecs()
    if kind not in table:
        hint = did_you_mean(kind, table)
        raise DataError(f"{CONFIG_FILE}: peft_type {kind!r} is not supported.{hint} Supported: {', '.join(table)}")
    refused = []
    for codec in table[kind]:
        reasons = codec.refuse(config)
        if not reasons:
            return codec
        refused.append(reasons)
    raise DataError(listing(f"{CONFIG_FILE} has settings that cannot be honoured", min(refused, key=len)))


def read_tensors(folder: Path, name: str = WEIGHTS_FILE) -> Tensors:
    """All tensors of an adapter folder, in float32.

    Raises:
      DataError: there is no safetensors file, it is damaged, or a value is not finite.
    """
    path = folder / name
    if not path.exists():
        names = ("adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin")
        pickled = [n for n in names if (folder / n).exists()]
        also = f"; {pickled[0]} is a pickle, which can run code when opened: convert it" if pickled else ""
        raise DataError(f"no {name}{also}")
    with open_tensors(path) as f:
        raw = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    tensors = {name: x.astype(np.float32) if x.dtype.kind not in "iub" else x for name, x in raw.items()}
    bad = [name for name, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"{name} holds NaN or infinity: {', '.join(bad[:5])}{more}")
    return tensors


def check_settings(
    config: Mapping[str, Any], *, read: Iterable[str], neutral: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    """Lines for the settings of a configuration that would be ignored although they change something.

    Args:
      config: of the file.
      read: names that the codec honours.
      neutral: names of which only these values are harmless; of any other name only null, false and empty are.
    """
    lines = []
    for name in sorted(set(config) - _DESCRIPTIVE - set(read)):
        value, allowed = config[name], neutral.get(name, ())
        if value in (None, False, [], {}) or any(type(value) is type(x) and value == x for x in allowed):
            continue
        expected = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
        lines.append(f"{name}={value!r}  is not supported{expected}")
    return lines
