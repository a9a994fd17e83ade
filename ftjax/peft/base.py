"""What a PEFT method is, and `bind`: the one way in which an overlay meets a base.

An overlay is a flat dict like the base's store. An entry at a parameter's path is a `Delta` and wraps that weight; an entry
at a site's path is a tap and is put there. Which arrays are trained is a matter of labels, not of structure:

    rules = method.labels(table)                     # patterns over "base/..." and "overlay/..." -> frozen | const | group
    overlay = method.init(key, table, params)        # {"layers[0:4]/q/w": LoRADelta(...)}
    params = bind(base, overlay, rng)                # what model.apply takes; rng only while training (dropout)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax

from ftjax.errors import ConfigError, nearest
from ftjax.ops import Adapted, Weight
from ftjax.params import ParamSpec, Ranged, Store, Table, bounds, cut, layer_keys, ranged, unranged
from ftjax.tree import Rules, matches

FROZEN, CONST = "frozen", "const"
"""Labels that are no optimizer groups: weights of the base left alone; numbers of an overlay that are not trained."""

Overlay = dict[str, Any]


class Peft(Protocol):
    """A method: a frozen config object registered under "peft"."""

    mergeable: ClassVar[bool]
    """Whether the overlay can be folded into the base."""
    identity_at_init: ClassVar[bool]
    """Whether the adapted model equals the base bit for bit before the first step."""
    hf_type: ClassVar[str | None]
    """``peft_type`` in the ecosystem's adapter_config.json; None where that format has no such method."""

    def labels(self, table: Table) -> Rules:
        """Rules for every leaf under "base/" and "overlay/"; the first match holds."""
        ...

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """The overlay at step 0; `params` may be abstract where only shapes matter."""
        ...


def with_head(rules: Rules, patterns: Sequence[str]) -> Rules:
    """A method's rules, and the keys trained beside any method (`Model.always_trained`) as a group of their own."""
    return [*((f"base/{p}", "head") for p in patterns), *rules]


def cut_for(base: Store, overlay: Overlay, method: Any, table: Table) -> Store:
    """The base cut where its overlay is cut and where the method tells layers apart (outside jit, once)."""
    base = {k: v.settled() if hasattr(v, "settled") else v for k, v in base.items()}
    at = bounds(overlay)
    for stack, borders in (method.borders(table) if hasattr(method, "borders") else {}).items():
        at.setdefault(stack, set()).update(borders)
    return cut(base, at)


def bind(base: Mapping[str, Any], overlay: Mapping[str, Any], rng: jax.Array | None = None) -> Store:
    """The parameters a model sees: the base with its overlay in place.

    Stacks are cut wherever either is cut. Under a training rng every wrapped weight gets a dropout key that depends on its
    path and absolute layer only.

    Args:
      base: store of weights.
      overlay: deltas at parameter paths, taps at site paths. One with a method ``spread(overlay)`` shares numbers with
        others, or over its layers, and returns itself with them in place.
      rng: the step's key while training, None otherwise.
    """
    overlay = {k: e.spread(overlay) if hasattr(e, "spread") else e for k, e in overlay.items()}
    at = bounds(base, overlay)
    out = cut(base, at)
    for key, entry in cut(overlay, at).items():
        if key not in out:
            out[key] = entry
            continue
        out[key] = Adapted(out[key], entry, None if rng is None else layer_keys(rng, key))
    return out


def unbind(params: Mapping[str, Any], table: Table) -> tuple[Store, Overlay]:
    """The inverse of `bind`: (base, overlay)."""
    base: Store = {}
    overlay: Overlay = {}
    sites = {unranged(k) for k, s in table.items() if s.kind == "site"}
    for key, value in params.items():
        if isinstance(value, Adapted):
            base[key], overlay[key] = value.base, value.delta
        elif unranged(key) in sites:
            overlay[key] = value
        else:
            base[key] = value
    return base, overlay


def check_overlay(overlay: Mapping[str, Any], table: Table) -> None:
    """Refuses an entry that is neither a parameter nor a site: it would be ignored in silence.

    Raises:
      ConfigError: with the nearest paths.
    """
    known = {unranged(k) for k in table}
    lost = [k for k in overlay if unranged(k) not in known]
    if lost:
        lines = [
            f"{k} is neither a parameter nor a site. Nearest: {', '.join(nearest(unranged(k), known, 5))}" for k in lost
        ]
        raise ConfigError("the overlay does not fit the model", lines)


def merge(params: Mapping[str, Any], table: Table) -> Store:
    """Folds every adapter into its weight, in float32, and returns plain arrays in the base's dtype.

    A quantized weight is dequantized first, so the result is a plain model that is not quantized.

    Raises:
      ConfigError: a tap (prefix, bottleneck, intervention) has no weight to be folded into.
    """
    base, overlay = unbind(params, table)
    if is_tied(table) and hasattr(overlay.get("embed/w"), "embed"):
        raise ConfigError(
            "embed/w is the output head too, and its adapter is of the lookup alone: merged, it would change the head. "
            "Give the head a weight of its own before (ftjax.models.vocab.untie), or keep the adapter"
        )
    taps = [k for k in overlay if k not in base]
    if taps:
        raise ConfigError(f"{taps[0]} changes values, not a weight: this adapter cannot be merged")
    from ftjax.params import join

    folded = {
        key: jax.jit(lambda v: v.materialize())(value).astype(_dtype(getattr(value, "base", value)))
        if isinstance(value, Weight)
        else value
        for key, value in params.items()
    }
    for key, value in params.items():
        bias = key.removesuffix("/w") + "/b"
        if isinstance(value, Adapted) and hasattr(value.delta, "merge_bias") and bias in folded:
            folded[bias] = value.delta.merge_bias(folded[bias].astype("float32")).astype(folded[bias].dtype)
    return join(folded)


def is_tied(table: Table) -> bool:
    """Whether the table of tokens is the output head too."""
    return "embed/w" in table and "head/w" not in table


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or jax.tree.leaves(leaf)[-1].dtype


# Targets ---------------------------------------------------------------------------------------------------------------


def select(table: Table, targets: Sequence[str], *, where: str, kinds: Sequence[str] = ("kernel",)) -> list[str]:
    """Store keys of the weights of these kinds that `targets` name.

    A target is a module's name as the checkpoint has it (``q_proj``) or as the table has it (``q``), a pattern over either
    (``*.mlp.*``, ``layers[0:4]/q/w``), or ``all-linear``: every kernel but the output head; where there is no other, every
    convolution.

    Raises:
      ConfigError: a target matches nothing; with the nearest names.
    """
    kernels = {k: s for k, s in table.items() if s.kind in kinds and is_module(s)}
    chosen: set[str] = set()
    problems = []
    stacks = any(ranged(k) for k in kernels)
    for target in targets:
        hit = {k for k in kernels if _is_target(k, kernels[k].hf, target, stacks)}
        if target == "all-linear":
            plain = {k for k in hit if kernels[k].kind == "kernel"}
            hit = plain or {k for k in hit if kernels[k].kind == "conv"}
        if not hit:
            problems.append(_no_target(where, target, kernels))
        chosen |= hit
    if problems:
        raise ConfigError("targets that match no weight", problems)
    return [k for k in table if k in chosen]


def is_module(spec: ParamSpec) -> bool:
    """Whether a weight belongs to a module of the file that one could put an adapter on.

    The table of an embedding has rows that are looked up, unlike ViT's class token. T5's ``shared`` is no such module: its
    encoder and decoder have lookups of their own, which torch ties to it and PEFT adapts one by one.
    """
    return spec.kind != "embed" or (len(spec.unstacked.shape) == 2 and spec.hf != "shared.weight")


def _module_names(key: str, hf: str) -> tuple[str, str]:
    """(our path without the leaf's name, the checkpoint's dotted module name)."""
    return unranged(key).rsplit("/", 1)[0], hf.removesuffix(".weight").removesuffix(".bias")


def _is_target(key: str, hf: str, target: str, stacks: bool) -> bool:
    ours, theirs = _module_names(key, hf)
    if target == "all-linear":
        return ranged(key) is not None if stacks else not key.startswith(("head/", "heads/"))
    if any(c in target for c in "*?/["):
        return any(matches(name, target) for name in (ours, theirs, key, unranged(key)))
    return ours.rsplit("/", 1)[-1] == target or theirs == target or theirs.endswith("." + target)


def _no_target(where: str, target: str, kernels: Table) -> str:
    names = sorted({n for k, s in kernels.items() for n in (unranged(k).split("/")[-2], s.hf.split(".")[-2])})
    near = nearest(target, names, 5)
    return f"{where}={target!r} matches no weight. " + (
        f"Nearest: {', '.join(near)}" if near else f"Names: {', '.join(names)}"
    )


def check_layers(layers: Sequence[int], keys: Iterable[str]) -> None:
    """Refuses layers that none of `keys` has.

    Raises:
      ConfigError: with the first of them.
    """
    count = max((r.stop for k in keys if (r := ranged(k))), default=0)
    beyond = [i for i in layers if not 0 <= i < count]
    if beyond:
        raise ConfigError(f"peft.layers={beyond[0]}: the model has no such layer; it has {count}")


def subset(key: str, layers: tuple[int, ...]) -> list[str]:
    """The parts of a stacked key that cover just `layers` (all of it when empty), as runs of adjoining layers."""
    r = ranged(key)
    if r is None or not layers:
        return [key]
    inside = sorted(x for x in set(layers) if r.start <= x < r.stop)
    runs: list[list[int]] = []
    for x in inside:
        if runs and runs[-1][1] == x:
            runs[-1][1] = x + 1
        else:
            runs.append([x, x + 1])
    return [str(Ranged(r.stack, lo, hi, r.rest)) for lo, hi in runs]
