"""AdapterHub's adapter folders: adapter_config.json with the method's settings nested in it, and adapter.safetensors.

    {"config": {"mh_adapter": false, "output_adapter": true, "reduction_factor": 16, ...}, "name": "default", ...}
    bert.encoder.layer.0.output.adapters.default.adapter_down.0.weight   [m, D]

Names and settings are those of `adapters` 1.x. A method whose tap stands at a site writes a `HubCodec` beside it. Heads, which
AdapterHub keeps in files of their own, are written into the same file under PEFT's names, where it passes them by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import DataError, listing
from ftjax.params import Store, Table, ranged, unranged
from ftjax.peft.base import Overlay
from ftjax.peft.interop import HUB, HUB_WEIGHTS_FILE, Codec, Tensors

Arrays = dict[str, Any]
"""One site's tensors by their names below the adapter's, layers leading."""

_NAME = "default"
_OUTER = {"config_id", "hidden_size", "model_class", "model_name", "model_type", "name", "version", "peft_type"}
_OUTER |= {"base_model_name_or_path", "task_type", "revision", "auto_mapping", "inference_mode", "modules_to_save"}
_PLACES = (
    ("attention.output.LayerNorm.weight", {"attn_out": "attention.output.adapters", "mlp_out": "output.adapters"}),
    ("layernorm_before.weight", {"attn_out": "attention_adapters.adapters", "mlp_out": "output.output_adapters.adapters"}),
    ("", {"attn_out": "attention_adapters.adapters", "mlp_out": "output_adapters.adapters"}),
)  # fmt: skip
"""Where a layer keeps adapters: by the first name that one of its weights ends with (BERT's kin, ViT, all others)."""


class HubCodec(Codec):
    """A method whose numbers are a few tensors per layer and site.

    Attributes:
      settings: AdapterHub's settings with the values of this method; any other value is refused.
      read: settings that `method_of` reads, and those that do not change what a trained adapter computes.
    """

    peft_type = HUB
    weights_file = HUB_WEIGHTS_FILE
    settings: Mapping[str, Any]
    read: frozenset[str]

    def config_of(self, method: Any, overlay: Overlay, table: Table) -> dict[str, Any]:
        """The settings that `method_of` reads."""
        raise NotImplementedError

    def method_of(self, config: Mapping[str, Any], table: Table) -> Any:
        """The method with a file's settings."""
        raise NotImplementedError

    def arrays(self, tap: Any) -> Arrays:
        """A site's tensors in the file's orientation, [L, ...] each."""
        raise NotImplementedError

    def tap_of(self, arrays: Arrays, like: Any) -> Any:
        """The inverse of `arrays`; `like` is such a tap at step 0, with the settings in place."""
        raise NotImplementedError

    def module(self, table: Table, key: str) -> str:
        """The name of the module that holds a site's adapters, ``{}`` for the layer."""
        names = layer_names(table, key)
        places = next(p for end, p in _PLACES if any(n.endswith(end) for n in names))
        return f"{names[0].split('{}')[0]}{{}}.{places[key.rsplit('/', 1)[-1]]}"

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = []
        for name, value in self.settings.items():
            if name not in self.read and config.get(name, value) != value:
                lines.append(f"{name}={config[name]!r}  is not supported; supported: {value!r}")
        for name in sorted(set(config) - set(self.settings) - self.read - _OUTER):
            if config[name] not in (None, False, [], {}):
                lines.append(f"{name}={config[name]!r}  is not supported")
        return lines

    def wrap(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Codec`."""
        inner = {k: v for k, v in config.items() if k in self.settings or k in self.read}
        outer = {k: v for k, v in config.items() if k not in inner and k not in ("peft_type", "modules_to_save")}
        kept = {"modules_to_save": config["modules_to_save"]} if "modules_to_save" in config else {}
        base = config["base_model_name_or_path"]
        return {**outer, **kept, "config": inner, "model_name": base, "name": _NAME, "version": "adapters.1.1.0"}

    def encode(self, overlay: Overlay, table: Table, method: Any) -> tuple[dict[str, Any], Tensors]:
        """See `Codec`."""
        tensors: Tensors = {}
        for key, tap in jax.device_get(overlay).items():
            for name, path, at in self.files(table, key, self.arrays(tap), _NAME):
                tensors[path] = np.asarray(self.arrays(tap)[name][at], np.float32)
        return {**self.settings, **self.config_of(method, overlay, table)}, tensors

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        method, name = self.method_of(config, table), hub_name(config)
        overlay: Overlay = {}
        problems, seen = [], set()
        for key, like in jax.device_get(method.init(jax.random.key(0), table, params)).items():
            arrays = {part: np.array(x) for part, x in self.arrays(like).items()}
            for part, path, at in self.files(table, key, arrays, name):
                want, found = arrays[part].shape[1:], tensors.get(path)
                seen.add(path)
                if found is None or found.shape != want:
                    problem = "missing   " if found is None else f"misshapen {list(found.shape)}, expected"
                    problems.append(f"{path}  {problem} {list(want)}")
                else:
                    arrays[part][at] = found
            overlay[key] = self.tap_of(arrays, like)
        problems += [f"{path}  is not of this adapter" for path in sorted(set(tensors) - seen)]
        if problems:
            raise DataError(listing("the adapter does not fit the model", problems))
        return method, jax.tree.map(jnp.asarray, overlay)

    def files(self, table: Table, key: str, arrays: Arrays, name: str) -> Iterator[tuple[str, str, int]]:
        """Every tensor of a site: (its name below the adapter's, its full name, its layer's index)."""
        r = ranged(key)
        assert r is not None, key
        module = self.module(table, key)
        for i in range(r.stop - r.start):
            yield from ((part, f"{module.format(r.start + i)}.{name}.{part}", i) for part in arrays)


def layer_names(table: Table, key: str) -> list[str]:
    """Names in the checkpoint of the weights of a site's layer, ``{}`` for its number."""
    stack = unranged(key).split("/", 1)[0] + "/"
    return [s.hf for k, s in table.items() if unranged(k).startswith(stack) and "{}" in s.hf]


def hub_name(config: Mapping[str, Any]) -> str:
    """The adapter's name, which is a part of its tensors' names."""
    return str(config.get("name", _NAME))


def only_layers(left_out: Any, table: Table) -> tuple[int, ...]:
    """Our `layers` for AdapterHub's ``leave_out``."""
    if not left_out:
        return ()
    return tuple(i for i in range(layer_count(table)) if i not in left_out)


def leave_out(layers: tuple[int, ...], table: Table) -> list[int]:
    """AdapterHub's ``leave_out`` for our `layers`."""
    return [i for i in range(layer_count(table)) if i not in layers] if layers else []


def layer_count(table: Table) -> int:
    """How many layers the model has."""
    return max(r.stop for k in table if (r := ranged(k)))
