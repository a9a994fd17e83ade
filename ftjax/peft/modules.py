"""Adapters that sit on modules: from entries stacked over layers to each module's arrays in a PEFT folder, and back.

    class LoRACodec(ModuleCodec): ...         # names the arrays of one layer; stacking, targets and checks are here

A file holds ``base_model.model.<module>.<array>``, one module per layer; an overlay holds ``layers[0:4]/q/w``, all its
layers in one entry. Layers that a file leaves out become gaps between ranges.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import DataError, listing, nearest
from ftjax.params import ParamSpec, Ranged, Store, Table, in_file, ranged
from ftjax.peft.base import Overlay, is_module
from ftjax.peft.interop import CONFIG_FILE, PREFIX, Codec, Tensors


@dc.dataclass(frozen=True)
class Module:
    """A place that can carry an adapter: its dotted name in the checkpoint, store key, and layer (None: no stack)."""

    name: str
    key: str
    layer: int | None
    spec: ParamSpec


def modules_of(table: Table, kinds: Sequence[str] = ("kernel",)) -> dict[str, Module]:
    """Every module with a weight of these kinds, by its dotted name."""
    found = {}
    for key, spec in table.items():
        if spec.kind not in kinds or not is_module(spec):
            continue
        for layer, name in in_file(key, spec):
            module = name.removesuffix(".weight")
            found[module] = Module(module, key, layer, spec.unstacked)
    return found


def per_module(overlay: Overlay, table: Table) -> dict[str, tuple[Module, Any]]:
    """Overlay entries taken apart into single layers, on the host, in the table's order."""
    whole = {(r.stack, r.rest): k for k in table if (r := ranged(k))}
    found: dict[tuple[str, int | None], Any] = {}
    for key, entry in overlay.items():
        entry, r = jax.device_get(entry), ranged(key)
        if r is None:
            found[key, None] = entry
            continue
        for layer in range(r.start, r.stop):
            found[whole[r.stack, r.rest], layer] = jax.tree.map(lambda x, i=layer - r.start: x[i], entry)
    modules = modules_of(table, ("kernel", "conv", "embed")).values()
    return {m.name: (m, found[m.key, m.layer]) for m in modules if (m.key, m.layer) in found}


def stacked(entries: Mapping[str, tuple[Module, Any]]) -> Overlay:
    """The inverse of `per_module`: adjoining layers whose arrays have equal shapes become one entry."""
    runs: list[tuple[str, int | None, list[Any]]] = []

    def shapes(x: Any) -> Any:
        return jax.tree.structure(x), [np.shape(leaf) for leaf in jax.tree.leaves(x)]

    for module, entry in sorted(entries.values(), key=lambda e: (e[0].key, -1 if e[0].layer is None else e[0].layer)):
        last = runs[-1] if runs else None
        same_key = last is not None and last[0] == module.key and last[1] is not None
        if last and same_key and module.layer == (last[1] or 0) + len(last[2]) and shapes(last[2][-1]) == shapes(entry):
            last[2].append(entry)
        else:
            runs.append((module.key, module.layer, [entry]))
    out: Overlay = {}
    for key, start, items in runs:
        r = ranged(key)
        if r is None or start is None:
            out[key] = jax.tree.map(jnp.asarray, items[0])
        else:
            name = str(Ranged(r.stack, start, start + len(items), r.rest))
            out[name] = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *items)
    return out


@dc.dataclass(frozen=True)
class Targets:
    """Which modules an adapter sits on, in PEFT's terms: suffixes of module names, and layers (empty: all)."""

    names: tuple[str, ...]
    layers: tuple[int, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The fields of adapter_config.json."""
        layers = list(self.layers) or None
        return {"target_modules": list(self.names), "layers_to_transform": layers, "layers_pattern": None}

    @property
    def unnumbered(self) -> tuple[str, ...]:
        """The names without layer numbers, as our own targets are written."""
        return tuple(dict.fromkeys(re.sub(r"^(.*\.)?\d+\.", "", name) for name in self.names))


def targets_of(chosen: Mapping[str, Module], everything: Mapping[str, Module]) -> Targets:
    """The shortest suffixes that select exactly `chosen`, of all layers or of some; full names at the longest."""
    layers = tuple(sorted({m.layer for m in chosen.values() if m.layer is not None}))
    for length in range(1, max(name.count(".") for name in chosen) + 1):
        names = tuple(dict.fromkeys(".".join(name.split(".")[-length:]) for name in chosen))
        for form in (Targets(names), Targets(names, layers)):
            if set(selected(form.config, everything)) == set(chosen):
                return form
    return Targets(tuple(chosen))


def selected(config: Mapping[str, Any], everything: Mapping[str, Module]) -> list[str]:
    """Modules that a configuration targets, by PEFT's rules (`check_target_module_exists`).

    Raises:
      DataError: the targets are absent, of the wrong type, or no regular expression.
    """
    targets, left_out = config.get("target_modules"), config.get("exclude_modules") or []
    if not targets:
        raise DataError(f"{CONFIG_FILE}: target_modules is missing")
    try:
        names = [n for n in everything if _hit(targets, n, everything) and not _hit(left_out, n, everything)]
    except (re.error, TypeError) as error:
        raise DataError(f"{CONFIG_FILE}: target_modules={targets!r} is neither a list nor a pattern: {error}") from None
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or layers in (None, []):
        return names
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    try:
        if not all(type(i) is int for i in layers):
            raise TypeError("layers are whole numbers")
        return [name for name in names if _layer(name, patterns) in layers]
    except (re.error, TypeError) as error:
        fields = ", ".join(f"{k}={config.get(k)!r}" for k in ("layers_to_transform", "layers_pattern"))
        raise DataError(f"{CONFIG_FILE}: {fields} cannot be read: {error}") from None


def _hit(targets: str | list[str], name: str, everything: Mapping[str, Module]) -> bool:
    if not isinstance(targets, str):
        return any(name == t or name.endswith("." + t) for t in targets)
    if targets.lower() == "all-linear":
        return everything[name].layer is not None and everything[name].spec.kind == "kernel"
    return re.fullmatch(targets, name) is not None


def _layer(name: str, patterns: list[str]) -> int | None:
    """The layer number in a dotted name: the first numbered part, as PEFT finds it."""
    for pattern in [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]:
        if match := re.match(pattern, name):
            return int(match[1])
    return None


def for_module(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """A setting that ``rank_pattern`` or ``alpha_pattern`` may override for some modules; the first match counts.

    Raises:
      DataError: a key is no regular expression.
    """
    for key, value in (patterns or {}).items():
        try:
            match = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise DataError(f"{CONFIG_FILE}: {key!r} is no regular expression: {error}") from None
        if match:
            return value
    return default


class ModuleCodec(Codec):
    """A method that stores a few arrays per adapted module. Subclasses say which, one layer at a time."""

    kinds: ClassVar[tuple[str, ...]] = ("kernel",)
    """Of weights that the method can sit on."""

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """Names below the module (``lora_A.weight``) and the shapes they have in the file."""
        raise NotImplementedError

    def arrays(self, entry: Any) -> Tensors:
        """One layer's entry as the arrays of the file."""
        raise NotImplementedError

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> Any:
        """The inverse of `arrays`."""
        raise NotImplementedError

    def settings(self, method: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The method's fields of adapter_config.json but for the targets."""
        raise NotImplementedError

    def method(self, config: Mapping[str, Any], targets: Targets) -> Any:
        """The inverse of `settings`."""
        raise NotImplementedError

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`."""
        everything, entries = modules_of(table, self.kinds), per_module(overlay, table)
        targets = targets_of({name: module for name, (module, _) in entries.items()}, everything)
        tensors = {f"{PREFIX}{name}.{k}": v for name, (_, x) in entries.items() for k, v in self.arrays(x).items()}
        settings = self.settings(method, {name: entry for name, (_, entry) in entries.items()})
        # GPT-2's Conv1D holds [in, out] as we do; PEFT wants to be told.
        linear = [module for module, _ in entries.values() if module.spec.kind == "kernel"]
        straight = bool(linear) and all(not module.spec.transposed for module in linear)
        return {**settings, **targets.config, "fan_in_fan_out": straight}, tensors

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        everything = modules_of(table, self.kinds)
        chosen = selected(config, everything)
        want = {
            f"{PREFIX}{name}.{part}": shape
            for name in chosen
            for part, shape in self.shapes(config, everything[name]).items()
        }
        problems = list(_misfits(tensors, want, table, params, everything))
        if not chosen:
            problems.insert(0, f"target_modules={config['target_modules']!r}  no module of the model is called so")
        if problems:
            raise DataError(listing("the adapter does not fit the model", problems))
        entries = {}
        for name in chosen:
            module = everything[name]
            arrays = {part: tensors[f"{PREFIX}{name}.{part}"] for part in self.shapes(config, module)}
            entries[name] = module, self.entry(config, module, arrays)
        return self.method(config, targets_of({n: everything[n] for n in chosen}, everything)), stacked(entries)


def _misfits(
    tensors: Tensors,
    want: Mapping[str, tuple[int, ...]],
    table: Table,
    params: Store,
    everything: Mapping[str, Module],
) -> Iterator[str]:
    """One line per tensor that is missing, extra or misshapen; a module that the model lacks comes with near names."""
    for name, shape in want.items():
        if name not in tensors:
            yield f"missing    {name} {list(shape)}"
        elif tensors[name].shape != shape:
            yield f"misshapen  {name} {list(tensors[name].shape)}, expected {list(shape)}"
    others = {spec.hf.removesuffix(".weight") for spec in table.values() if spec.kind in ("embed", "norm")}
    for name in sorted(set(tensors) - set(want)):
        own = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        place = own.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[0]
        hint = ""
        if (copy := _copied(own, table)) is not None:
            if _equals_base(tensors[name], copy, table, params):
                continue
            hint = "  a weight of the base, with other values than here: a resized vocabulary or trained module"
        elif place not in everything and re.sub(r"\.\d+\.", ".{}.", place) in others:
            hint = "  adapters of this kind on embeddings and norms are not supported"
        elif place not in everything:
            hint = f"  the model has no such module. Nearest: {', '.join(nearest(place, everything)) or 'none'}"
        yield f"extra      {name} {list(tensors[name].shape)}{hint}"


def _copied(name: str, table: Table) -> str | None:
    """The store key of a weight outside the stacks with this name in the checkpoint.

    PEFT writes such copies of the head or the embedding when they are among the targets.
    """
    return next((key for key, spec in table.items() if spec.hf == name and ranged(key) is None), None)


def _equals_base(tensor: np.ndarray, key: str, table: Table, params: Store) -> bool:
    held = np.asarray(jax.device_get(params[key]))
    given = tensor.T if table[key].transposed else tensor
    return given.shape == held.shape and bool((given.astype(held.dtype) == held).all())
