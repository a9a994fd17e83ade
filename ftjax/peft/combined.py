"""Several methods at once: their overlays side by side, each with its own groups and its own folder in the export.

MAM adapter: prefix + parallel adapter (He et al. 2021, arXiv:2110.04366); UniPELT: LoRA + prefix + adapter, each
under a learned gate (Mao et al. 2021, arXiv:2110.07577; `ftjax.peft.gates`).

    peft=Combine(methods=(Prefix(tokens=16), Parallel(reduction=2)))
    peft=Combine(methods=(LoRA(targets=("q", "v")), BitFit()))
    peft=Combine(methods=(LoRA(targets=("q", "v")), Prefix(tokens=10), Pfeiffer()), gates=True)

A weight or a site belongs to one method: what two adapters on one weight would mean depends on their order. Each method begins
as it would alone with the same seed. The folder has one of PEFT's (or AdapterHub's) per method, named after it, and at the
top what belongs to none: the head, the gates, and the weights of methods that train the base and have no file of their own.
Opened alone, a folder's method is without its gates, as if they were 1.
"""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, field_validator

from ftjax import registry
from ftjax.errors import ConfigError, DataError, listing
from ftjax.params import ParamSpec, Store, Table, bounds, cut, in_file, ranged, spec_of, unranged
from ftjax.peft import gates
from ftjax.peft.base import FROZEN, Overlay, cut_for
from ftjax.peft.interop import PREFIX, Codec, Tensors, check_settings, load_adapter, save_adapter
from ftjax.registry import register
from ftjax.schema import Component, Slot
from ftjax.tree import Rules, label, leaves_by_path

Place = tuple[str, int | None]
"""A weight or site of one layer: its path without the range, and the layer (None outside the stacks)."""


@dc.dataclass(frozen=True)
class Part:
    """One method against a model.

    Attributes:
      method: the method.
      overlay: its overlay, shapes only.
      groups: labels of the overlay's leaves by path.
      trained: groups of the base's weights that it trains.
    """

    method: Any
    overlay: Overlay
    groups: dict[str, str]
    trained: dict[Place, str]

    @property
    def claims(self) -> list[Place]:
        """What no other method may have."""
        return [*self.trained, *(place for key in self.overlay for place in places(key))]


def places(key: str) -> list[Place]:
    """A store key, layer by layer."""
    r = ranged(key)
    return [(unranged(key), i) for i in range(r.start, r.stop)] if r else [(key, None)]


def part_of(method: Any, table: Table) -> Part:
    """A method's labels and the shapes of its overlay, from its rules; no array is made."""
    weights = {k: jax.ShapeDtypeStruct(s.shape, jnp.float32) for k, s in table.items() if s.kind != "site"}
    overlay = jax.eval_shape(lambda p: method.init(jax.random.key(0), table, p), weights)
    # One byte per layer stands for a weight: cutting it shows where the method tells layers apart.
    counted = {k: np.zeros(table[k].shape[:1], np.int8) for k in weights if table[k].kind != "stat"}
    store = {"base": cut_for(counted, overlay, method, table), "overlay": overlay}
    labels = label(store, method.labels(table))
    trained = {place: name for key, name in labels["base"].items() if name != FROZEN for place in places(key)}
    return Part(method, overlay, leaves_by_path(labels["overlay"]), trained)


class CombineCodec(Codec):
    """A folder of folders: see the module."""

    peft_type = "COMBINED"
    nested: ClassVar[bool] = True

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        rows = config.get("methods")
        names = [row.get("name") if isinstance(row, dict) else row for row in rows] if isinstance(rows, list) else []
        able = set(registry.known("peft")) - {"combine"}
        if not names or not all(isinstance(name, str) and name in able for name in names):
            return [f"methods={rows!r}  expected a list of methods with their names"]
        if type(gated := config.get("gates", False)) is not bool:
            return [f"gates={gated!r}  expected true or false"]
        return check_settings(config, read=("methods", "gates"), neutral={})

    def save(
        self, folder: Path, overlay: Overlay, table: Table, method: Combine, *, saved: Store, **about: Any
    ) -> tuple[dict[str, Any], Tensors, Store]:
        """See `Codec`; the head goes into every folder, so that each can be opened alone."""
        parts = method.parts(table)
        owned = [{k: v for k, v in saved.items() if places(k)[0] in part.trained} for part in parts]
        head = {k: v for k, v in saved.items() if not any(k in own for own in owned)}
        tensors = gates.to_file(overlay, table)
        overlay = gates.opened(overlay)
        for part, own in zip(parts, owned, strict=True):
            mine = set(part.claims)
            entries = {k: e for k, e in overlay.items() if places(k)[0] in mine}
            if _has_folder(part, table):
                path = folder / part.method.name
                save_adapter(path, entries, table, part.method, saved={**own, **head}, **about)
            else:
                tensors |= dict(_tensors(own, table))
        settings = {"methods": [m.model_dump(mode="json") for m in method.methods]}
        return settings | ({"gates": True} if method.gates else {}), tensors, head

    def load(
        self, folder: Path, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store
    ) -> tuple[Any, Overlay, Store]:
        """See `Codec`."""
        kinds: Mapping[str, Any] = registry.known("peft")
        methods: list[Any] = []
        overlay: Overlay = {}
        saved: Store = {}
        for row in config["methods"]:
            method = kinds[row["name"]].model_validate_json(json.dumps(row))
            part = part_of(method, table)
            if _has_folder(part, table):
                file = load_adapter(folder / method.name, table, params)
                method, overlay, saved = file.method, overlay | file.overlay, saved | file.saved
            else:
                saved |= _take(part, tensors, table, params)
            methods.append(method)
        if gated := config.get("gates", False):
            gates.check(overlay, ", ".join(m.name for m in methods))
            overlay = gates.from_file(overlay, tensors, table)
        if tensors:
            lines = [f"extra      {name} {list(x.shape)}" for name, x in tensors.items()]
            raise DataError(listing("the adapter does not fit the model", lines))
        return Combine(methods=tuple(methods), gates=gated), overlay, saved


def _has_folder(part: Part, table: Table) -> bool:
    """Whether a method has a folder of its own; what it trains of the base is at the top else."""
    codec = getattr(part.method, "hf_codec", None)
    return bool(part.overlay) or (codec is not None and codec.holds_base(table))


def _layers(key: str, table: Table) -> list[tuple[int | None, str, ParamSpec]]:
    """(index in the stack or None, name in the file, spec of one layer) of a key's layers, but for those without it."""
    spec, r = spec_of(table, key), ranged(key)
    found = in_file(key, spec)
    return [(None if r is None or i is None else i - r.start, PREFIX + name, spec.unstacked) for i, name in found]


def _tensors(saved: Store, table: Table) -> Any:
    """Weights of the base by their names in the file, layer by layer."""
    for key, value in saved.items():
        for i, name, spec in _layers(key, table):
            yield name, spec.to_file(np.asarray(value if i is None else value[i], np.float32))


def _take(part: Part, tensors: Tensors, table: Table, params: Store) -> Store:
    """Removes what a method trained of the base from a file's tensors; layers that it left alone keep the base's values.

    Raises:
      DataError: a tensor is missing or misshapen.
    """
    saved: Store = {}
    problems = []
    for key in table:
        wanted = [i for i, place in enumerate(places(key)) if place in part.trained]
        if not wanted:
            continue
        saved[key] = np.array(jax.device_get(params[key]), np.float32)
        for i, name, spec in _layers(key, table):
            if i is not None and i not in wanted:
                continue
            value = tensors.pop(name, None)
            if value is None or value.shape != spec.file_shape:
                found = "missing  " if value is None else f"misshapen {list(value.shape)},"
                problems.append(f"{name}  {found} expected {list(spec.file_shape)}")
            else:
                saved[key][() if i is None else i] = spec.from_file(value)
    if problems:
        raise DataError(listing("the adapter does not fit the model", problems))
    return saved


@register("peft")
class Combine(Component):
    """Several methods at once, on weights and sites of their own."""

    hf_type: ClassVar[str | None] = None
    hf_codec: ClassVar[CombineCodec] = CombineCodec()

    name: Literal["combine"] = "combine"
    methods: tuple[Annotated[Any, Slot("peft")], ...] = Field(
        default_factory=lambda: tuple(registry.get("peft", name)() for name in ("prefix", "parallel")),
        min_length=2,
        description="The methods, each with its own settings; none twice, no weight or site by two of them.",
    )
    gates: bool = Field(False, description="Whether LoRA, prefix and adapters each have a learned gate (UniPELT).")

    @field_validator("methods")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [m.name for m in value]
        for name in names:
            if name == "combine":
                raise ValueError("combine cannot hold combine: list all methods in one")
            if names.count(name) > 1:
                raise ValueError(f"{name} occurs twice: one method covers several targets")
        return value

    @property
    def mergeable(self) -> bool:
        """Whether all methods are; a gate is another for every token."""
        return not self.gates and all(m.mergeable for m in self.methods)

    @property
    def identity_at_init(self) -> bool:
        """Whether no method changes the model at the start."""
        return all(m.identity_at_init for m in self.methods)

    @property
    def usual_lr(self) -> tuple[float, float]:
        """Rates that are usual for every method."""
        low, high = zip(*(m.usual_lr for m in self.methods), strict=True)
        return max(low), min(high)

    @property
    def dropout(self) -> float:
        """The largest rate of a method."""
        return max(getattr(m, "dropout", 0.0) for m in self.methods)

    def around(self, tx: Any, hyper: Mapping[str, Any], step: jax.Array) -> Any:
        """The optimizer with what the methods put around it."""
        for method in self.methods:
            tx = method.around(tx, hyper, step) if hasattr(method, "around") else tx
        return tx

    def parts(self, table: Table) -> list[Part]:
        """The methods against a model.

        Raises:
          ConfigError: two of them claim one weight or site, one does not fit the model, or none has a gate although
            gates are asked for.
        """
        parts = [part_of(method, table) for method in self.methods]
        owner: dict[Place, str] = {}
        problems: dict[str, None] = {}
        for part in parts:
            for place in part.claims:
                other = owner.setdefault(place, part.method.name)
                if other != part.method.name:
                    problems[f"peft.methods: {other} and {part.method.name} both claim {place[0]}"] = None
        if problems:
            raise ConfigError("a weight or site belongs to one method: give them targets or layers apart", [*problems])
        if self.gates:
            overlay = {k: entry for part in parts for k, entry in part.overlay.items()}
            gates.check(overlay, ", ".join(m.name for m in self.methods))
        return parts

    def borders(self, table: Table) -> dict[str, set[int]]:
        """Wherever one of the methods begins or ends."""
        return self._borders(self.parts(table), table)

    def _borders(self, parts: list[Part], table: Table) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for part in parts:
            own = part.method.borders(table) if hasattr(part.method, "borders") else {}
            for stack, at in (*bounds(part.overlay).items(), *own.items()):
                found.setdefault(stack, set()).update(at)
        return found

    def labels(self, table: Table) -> Rules:
        """Every leaf by its whole path, as its own method labels it."""
        parts = self.parts(table)
        rules = [(f"overlay/{path}", group) for part in parts for path, group in self._groups(part).items()]
        trained = {place: group for part in parts for place, group in part.trained.items()}
        weights = {k: np.zeros(s.shape[:1], np.int8) for k, s in table.items() if s.kind not in ("site", "stat")}
        groups = {key: trained.get(places(key)[0], FROZEN) for key in cut(weights, self._borders(parts, table))}
        if len(set(groups.values())) == 1:  # a model's own head may come before: whole paths would find nothing left
            return [*rules, ("base/*", next(iter(groups.values())))]
        return [*rules, *((f"base/{k}", g) for k, g in groups.items() if g != FROZEN), ("base/*", FROZEN)]

    def _groups(self, part: Part) -> dict[str, str]:
        """Labels of a method's leaves by path, and of its gates."""
        gated = {k for k, entry in part.overlay.items() if self.gates and gates.kind_of(entry)}
        groups = {f"{k}/gate/{leaf}": "gate" for k in gated for leaf in "wc"}
        for path, group in part.groups.items():
            key = next((k for k in gated if path.startswith(f"{k}/")), None)
            groups[path if key is None else f"{key}/inner{path.removeprefix(key)}"] = group
        return groups

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """The methods' overlays together."""
        self.parts(table)
        overlay = {k: entry for method in self.methods for k, entry in method.init(key, table, params).items()}
        return gates.closed(key, overlay, table) if self.gates else overlay
