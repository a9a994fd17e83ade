"""Norm tuning: every norm's weight and bias, and nothing else (Zhao et al. 2023, arXiv:2312.11420).

y = norm(x) * w + b,   w and b trained

    peft=Norms()

Hugging Face PEFT calls it LN_TUNING. Its file holds whole weights that take the place of the base's; so there is no overlay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from ftjax.errors import DataError, listing
from ftjax.params import Store, Table, in_file, ranged
from ftjax.peft.base import Overlay
from ftjax.peft.interop import PREFIX, Codec, Tensors, check_settings, saved_modules
from ftjax.peft.modules import Module, selected, targets_of
from ftjax.peft.selective import Selective, spelled
from ftjax.registry import register

_PART = ".ln_tuning_layers."


def norm_keys(table: Table) -> list[str]:
    """Leaves of kind "norm", and the biases beside them."""
    beside = {k.rsplit("/", 1)[0] for k, s in table.items() if s.kind == "norm"}
    return [k for k, s in table.items() if s.kind == "norm" or (s.kind == "bias" and k.rsplit("/", 1)[0] in beside)]


def _modules(table: Table) -> dict[str, list[Module]]:
    """Weights and biases of each norm, by the norm's dotted name."""
    found: dict[str, list[Module]] = {}
    for key in norm_keys(table):
        spec = table[key]
        for layer, name in in_file(key, spec):
            found.setdefault(name.rsplit(".", 1)[0], []).append(Module(name, key, layer, spec.unstacked))
    return found


class NormsCodec(Codec):
    """LN_TUNING in PEFT's format: ``ln_tuning_layers.weight`` and ``.bias`` per norm."""

    peft_type = "LN_TUNING"

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        return check_settings(config, read=("target_modules", "exclude_modules"), neutral={})

    def holds_base(self, table: Table) -> bool:
        """See `Codec`; a norm with running statistics would need them in the file, which are no part of what is trained."""
        named = all(table[k].hf.endswith((".weight", ".bias")) for k in norm_keys(table))
        return named and not any(s.kind == "stat" for s in table.values())

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`; what the file holds are weights of the base."""
        return {}, {}

    def encode_base(self, saved: Store, table: Table) -> tuple[dict[str, Any], Tensors, Store]:
        """See `Codec`; the norms of a head that is saved as a whole stay with it."""
        norms = set(norm_keys(table))
        whole = set(saved_modules({k: v for k, v in saved.items() if k not in norms}, table)[1])
        own = {k: np.asarray(v, np.float32) for k, v in saved.items() if k in norms}
        own = {k: v for k, v in own.items() if table[k].hf.split(".")[0] not in whole}
        everything, tensors, chosen = _modules(table), {}, {}
        for name, leaves in everything.items():
            for m in leaves:
                if m.key not in own:
                    continue
                r = ranged(m.key)
                value = own[m.key] if r is None or m.layer is None else own[m.key][m.layer - r.start]
                tensors[PREFIX + name + _PART + m.name.rsplit(".", 1)[1]] = m.spec.to_file(value)
                chosen[name] = m
        targets = targets_of(chosen, {name: leaves[0] for name, leaves in everything.items()})
        # The type knows no layer subsets; a short name would also mean a layer that lacks the norm (ModernBERT's first).
        partial = targets.layers or any(m.spec.since for m in chosen.values())
        names = list(chosen) if partial else list(targets.names)
        rest = {k: v for k, v in saved.items() if k not in own}
        return {"target_modules": names, "exclude_modules": None, "modules_to_save": None}, tensors, rest

    def take_base(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> Store:
        """See `Codec`; norms that the file leaves out keep the base's values."""
        everything = _modules(table)
        chosen = selected(config, {name: leaves[0] for name, leaves in everything.items()})
        saved: Store = {}
        problems = [] if chosen else [f"target_modules={config['target_modules']!r}  no norm of the model is called so"]
        for name in chosen:
            for m in everything[name]:
                full = PREFIX + name + _PART + m.name.rsplit(".", 1)[1]
                value = tensors.pop(full, None)
                if value is None or value.shape != m.spec.file_shape:
                    found = "missing  " if value is None else f"misshapen {list(value.shape)},"
                    problems.append(f"{full}  {found} expected {list(m.spec.file_shape)}")
                    continue
                r, value = ranged(m.key), m.spec.from_file(value)
                if r is None or m.layer is None:
                    saved[m.key] = value
                    continue
                if m.key not in saved:
                    saved[m.key] = np.array(jax.device_get(params[m.key]), np.float32)
                saved[m.key][m.layer - r.start] = value
        problems += [f"extra      {name} {list(x.shape)}  no norm of the model" for name, x in tensors.items()]
        if problems:
            raise DataError(listing("the adapter does not fit the model", problems))
        return saved

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        return Norms(), {}


@register("peft")
class Norms(Selective):
    """Every norm of the model, weights and biases (arXiv:2312.11420)."""

    hf_type: ClassVar[str | None] = "LN_TUNING"
    hf_codec: ClassVar[NormsCodec] = NormsCodec()

    name: Literal["norms"] = "norms"

    def chosen(self, table: Table) -> list[str]:
        """Leaves of kind "norm", and the biases beside them."""
        return spelled(norm_keys(table), table, ("norm",), "norms")
