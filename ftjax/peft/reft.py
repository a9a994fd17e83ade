"""ReFT: edits of the hidden values behind a layer, at a prompt's ends or at every token (Wu et al. 2024, arXiv:2404.03592).

LoReFT  h + R^T (W h + b - R h), R R^T = I;   NoReFT the same with a free R;   DiReFT  h + R^T (W h + b), R free

    peft=LoReFT(rank=4, positions="f7+l7", layers=(8, 16))
    peft=LoReFT(rank=4, positions="all")

Of a prompt shorter than both ends together each gets half, as in pyreft. Answers are not edited then, so that decoding costs
nothing. With "all" one edit is made at every real token, of answers and of texts without prompts too, and while decoding; of
an encoder and a decoder, in both. R is the orthonormal factor of the trained matrix, taken anew in every step: its rows stay
orthonormal whatever the optimizer does.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError, DataError
from ftjax.params import ParamSpec, Store, Table, layer_keys, spec_of, unranged
from ftjax.peft.adapterhub import Arrays, HubCodec, hub_name, layer_names
from ftjax.peft.base import FROZEN, Overlay, check_layers, subset
from ftjax.peft.interop import Tensors
from ftjax.registry import known, register
from ftjax.rows import places
from ftjax.schema import Component
from ftjax.tree import Rules


def orthonormal(a: jax.Array) -> jax.Array:
    """Rows of a [..., r, D] made orthonormal, each kept in the span of itself and those before it (Gram-Schmidt).

    By Cholesky factors of a a^T, twice: rounding in the first leaves an error of the order of the squared condition number,
    which the second removes.
    """
    for _ in range(2):
        gram = jnp.einsum("...rD,...sD->...rs", a, a, precision=jax.lax.Precision.HIGHEST)
        a = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(gram), a, lower=True)
    return a


@struct.dataclass
class ReFTTap:
    """The edits of one layer, [L, ...] stacked: one for all places, or one for the first and one for the last (U = 1 or 2).

    Attributes:
      r: what becomes R [U, r, D].
      w: W [U, r, D].
      b: [U, r].
      first: places edited at the prompt's beginning.
      last: places edited at its end.
      orthogonal: whether R has orthonormal rows.
      subtract: whether R h is taken away.
      everywhere: whether every real token is edited, whatever `first` and `last` are.
    """

    r: jax.Array
    w: jax.Array
    b: jax.Array
    first: int = struct.field(pytree_node=False)
    last: int = struct.field(pytree_node=False)
    orthogonal: bool = struct.field(pytree_node=False)
    subtract: bool = struct.field(pytree_node=False)
    everywhere: bool = struct.field(pytree_node=False, default=False)

    @property
    def rotation(self) -> jax.Array:
        """R [..., U, r, D]."""
        return orthonormal(self.r) if self.orthogonal else self.r

    def __call__(self, h: jax.Array, seq: Any) -> jax.Array:
        """h [B, T, D], edited; of edits at a prompt's ends what continues a sequence passes by."""
        if not (seq.first or self.everywhere):
            return h
        R_UrD, w_UrD, b_Ur = (x.astype(h.dtype) for x in (self.rotation, self.w, self.b))
        edit_BTUr = jnp.einsum("BTD,UrD->BTUr", h, w_UrD - R_UrD if self.subtract else w_UrD) + b_Ur
        here_BTU = self.where(seq).astype(h.dtype)
        return h + jnp.einsum("BTUr,UrD->BTD", edit_BTUr * here_BTU[..., None], R_UrD)

    def where(self, seq: Any) -> jax.Array:
        """Which places each edit is for, bool [B, T, U]."""
        real = seq.segments >= 0
        if self.everywhere:
            return real[..., None]
        at, n = places(seq.segments)[0], seq.prompt_len
        begins = real & (at < jnp.minimum(self.first, n // 2))
        ends = real & (at < n) & (at >= n - jnp.minimum(self.last, n // 2))
        return jnp.stack([begins | ends] if self.b.shape[-2] == 1 else [begins, ends], axis=-1)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Split as the hidden values."""
        lead = spec.axes[:-1]
        return {"r": (*lead, None, None, "embed"), "w": (*lead, None, None, "embed"), "b": (*lead, None, None)}


class ReFTCodec(HubCodec):
    """ReFT in AdapterHub's format.

    Of LoReFT it holds the parametrisation of R: a D x D matrix for each edit. That is read, but R alone is written, with the
    settings where AdapterHub does not find them, since it would pass over such an R in silence. A file that does not say
    ``subtract_projection`` means true, as it does there. It has no setting for every position (so many that no text is longer
    would leave its texts when padded on the left): ``all_positions`` is ours, and written where it does not look either.
    """

    read = frozenset({
        "layers", "prefix_positions", "suffix_positions", "all_positions", "r", "tied_weights", "dropout", "dtype",
    })  # fmt: skip

    def __init__(self, method: str, *, orthogonal: bool, subtract: bool):
        self.method = method
        self.settings = {
            "architecture": "reft", "orthogonality": orthogonal, "subtract_projection": subtract,
            "output_reft": True, "non_linearity": None,
        }  # fmt: skip

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = super().refuse({"architecture": None, "subtract_projection": True, **config})
        ends = bool(config.get("prefix_positions") or config.get("suffix_positions"))
        if type(everywhere := config.get("all_positions", False)) is not bool:
            return [*lines, f"all_positions={everywhere!r}  expected true or false"]
        if ends == everywhere:
            ways = [f"{k}={config.get(k)!r}" for k in ("prefix_positions", "suffix_positions")]
            lines.append(
                f"{', '.join(ways)}  " + ("and all_positions=True exclude each other" if ends else "edit nothing")
            )
        return lines

    def wrap(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Codec`."""
        unseen = config["orthogonality"] or config.get("all_positions")
        return {**config, "name": hub_name({})} if unseen else super().wrap(config)

    def config_of(self, method: ReFT, overlay: Overlay, table: Table) -> dict[str, Any]:
        """See `HubCodec`."""
        first, last = parse_positions(method.positions)
        more = {"all_positions": True} if method.everywhere else {}
        return more | {
            "layers": list(method.layers) or "all", "prefix_positions": first, "suffix_positions": last,
            "r": method.rank, "tied_weights": method.tied or not (first and last),
        }  # fmt: skip

    def method_of(self, config: Mapping[str, Any], table: Table) -> ReFT:
        """See `HubCodec`."""
        ends = {"f": config.get("prefix_positions"), "l": config.get("suffix_positions")}
        layers = config.get("layers", "all")
        positions = EVERYWHERE if config.get("all_positions") else "+".join(f"{k}{n}" for k, n in ends.items() if n)
        return known("peft")[self.method](
            rank=int(config["r"]), positions=positions,
            tied=bool(config.get("tied_weights")) and all(ends.values()),
            layers=() if layers == "all" else tuple(sorted(layers)),
        )  # fmt: skip

    def module(self, table: Table, key: str) -> str:
        """See `HubCodec`."""
        return layer_names(table, key)[0].split("{}")[0] + "{}.reft_layer.refts"

    def arrays(self, tap: ReFTTap) -> Arrays:
        """See `HubCodec`."""
        R, units = np.asarray(tap.rotation), range(tap.b.shape[-2])
        return (
            {f"units.{u}.learned_source.weight": tap.w[..., u, :, :] for u in units}
            | {f"units.{u}.learned_source.bias": tap.b[..., u, :] for u in units}
            | {f"units.{u}.projection.weight": R[..., u, :, :] for u in units}
        )

    def tap_of(self, arrays: Arrays, like: ReFTTap) -> ReFTTap:
        """See `HubCodec`."""
        units = range(like.b.shape[-2])
        w, r = (
            np.stack([arrays[f"units.{u}.{k}.weight"] for u in units], -3) for k in ("learned_source", "projection")
        )
        b = np.stack([arrays[f"units.{u}.learned_source.bias"] for u in units], -2)
        return dc.replace(like, r=r, w=w, b=b)

    def decode(self, config: Mapping[str, Any], tensors: Tensors, table: Table, params: Store) -> tuple[Any, Overlay]:
        """See `Codec`."""
        if not config.get("tied_weights"):  # AdapterHub has both edits even where one end alone is edited
            for here, there in (("prefix", ".units.0."), ("suffix", ".units.1.")):
                if not config.get(f"{here}_positions"):
                    tensors = {k.replace(".units.1.", ".units.0."): v for k, v in tensors.items() if there not in k}
        method, overlay = super().decode(config, unparametrised(tensors), table, params)
        for key, tap in overlay.items():
            gram = tap.r @ tap.r.swapaxes(-1, -2)
            if method.orthogonal and float(abs(gram - jnp.eye(method.rank, dtype=gram.dtype)).max()) > 1e-3:
                raise DataError(f"{key}: the rows of a projection are not orthonormal, as orthogonality=true says")
        return method, overlay


def unparametrised(tensors: Tensors) -> Tensors:
    """The same tensors with R in the place of what torch's orthogonal parametrisation keeps for it.

    R^T = B H_1 ... H_r [:, :r] S, H_i Householder reflections from the columns of `original`^T, S the signs of its diagonal.
    """
    out: Tensors = {}
    for name, value in tensors.items():
        stem, found, last = name.partition(".parametrizations.weight.")
        if not found:
            out[name] = value
        elif last == "original":
            base = tensors.get(f"{stem}.parametrizations.weight.0.base")
            a_Dr = np.tril(value.T, -1)
            Q_Dr = np.eye(*a_Dr.shape, dtype=np.float32)
            for i in reversed(range(a_Dr.shape[1])):
                v_D = a_Dr[:, i] + np.eye(len(a_Dr), dtype=np.float32)[i]
                Q_Dr -= np.outer(v_D, 2 / (v_D @ v_D) * (v_D @ Q_Dr))
            Q_Dr *= np.trunc(np.diagonal(value))
            out[f"{stem}.weight"] = (Q_Dr if base is None else base @ Q_Dr).T
    return out


EVERYWHERE = "all"
"""The spelling of every real token."""
_POSITIONS = rf"f[1-9]\d*|l[1-9]\d*|f[1-9]\d*\+l[1-9]\d*|{EVERYWHERE}"


def parse_positions(positions: str) -> tuple[int, int]:
    """(first, last) of pyreft's spelling: "f7+l7", "f1", "l3"; (0, 0) of `EVERYWHERE`."""
    found = dict(re.findall(r"([fl])(\d+)", positions))
    return int(found.get("f", 0)), int(found.get("l", 0))


class ReFT(Component):
    """What the three have in common."""

    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    hf_type: ClassVar[str | None] = None
    usual_lr: ClassVar[tuple[float, float]] = (1e-4, 2e-2)
    orthogonal: ClassVar[bool]
    subtract: ClassVar[bool]

    name: str
    rank: int = Field(4, gt=0, description="Rank r of the edit.")
    positions: str = Field(
        "f7+l7",
        pattern=f"^({_POSITIONS})$",
        description="Prompt tokens edited: first and last so many, as in pyreft; all: every token, of answers too.",
    )
    tied: bool = Field(False, description="Whether first and last tokens share one edit.")
    layers: tuple[int, ...] = Field((), description="Only behind these layers, counted from 0; empty: all.")

    @property
    def everywhere(self) -> bool:
        """Whether every real token is edited."""
        return self.positions == EVERYWHERE

    @property
    def edits_prompts(self) -> bool:
        """Whether only prompts are changed, so that data without prompts teach it nothing."""
        return not self.everywhere

    def keys(self, table: Table) -> list[str]:
        """Sites of the edits."""
        sites = [k for k, s in table.items() if s.kind == "site" and k.endswith("/residual")]
        if not sites or "embed/w" not in table:
            raise ConfigError(
                f"peft={self.name}: the model has no prompt of tokens whose hidden values could be edited"
            )
        reader = unranged(sites[0])  # of an encoder and a decoder, the one that reads the prompt
        sites = [k for k in sites if self.everywhere or unranged(k) == reader]
        check_layers(self.layers, sites)
        if self.rank > (width := table[sites[0]].shape[-1]):
            raise ConfigError(f"peft.rank={self.rank} exceeds {width}, the width of the hidden values")
        return [part for key in sites for part in subset(key, self.layers)]

    def labels(self, table: Table) -> Rules:
        """All of it."""
        self.keys(table)
        return [("overlay/*/residual/*", "reft"), ("base/*", FROZEN)]

    def init(self, key: jax.Array, table: Table, params: Store) -> Overlay:
        """Initial values as in pyreft: R orthonormal (else as W), W and b as torch draws a linear layer's."""
        return {k: self.tap(layer_keys(key, k), spec_of(table, k)) for k in self.keys(table)}

    def tap(self, keys: jax.Array, spec: ParamSpec) -> ReFTTap:
        """The edits at one site at step 0; `keys` [L] if it is stacked."""
        first, last = parse_positions(self.positions)
        U, D, bound = 1 if self.tied or not (first and last) else 2, spec.shape[-1], spec.shape[-1] ** -0.5

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            r, w, b = jax.random.split(key, 3)
            shape = (U, self.rank, D)
            uniform = lambda k, s: jax.random.uniform(k, s, jnp.float32, -bound, bound)  # noqa: E731
            R = orthonormal(jax.random.normal(r, shape, jnp.float32)) if self.orthogonal else uniform(r, shape)
            return R, uniform(w, shape), uniform(b, shape[:2])

        drawn = jax.vmap(draw)(keys) if spec.stacked else draw(keys)
        how: Any = dict(orthogonal=self.orthogonal, subtract=self.subtract, everywhere=self.everywhere)
        return ReFTTap(*drawn, first=first, last=last, **how)


@register("peft")
class LoReFT(ReFT):
    """h + R^T (W h + b - R h), R with orthonormal rows."""

    orthogonal: ClassVar[bool] = True
    subtract: ClassVar[bool] = True
    hf_codec: ClassVar[ReFTCodec] = ReFTCodec("loreft", orthogonal=True, subtract=True)
    name: Literal["loreft"] = "loreft"


@register("peft")
class NoReFT(ReFT):
    """h + R^T (W h + b - R h), R free."""

    orthogonal: ClassVar[bool] = False
    subtract: ClassVar[bool] = True
    hf_codec: ClassVar[ReFTCodec] = ReFTCodec("noreft", orthogonal=False, subtract=True)
    name: Literal["noreft"] = "noreft"


@register("peft")
class DiReFT(ReFT):
    """h + R^T (W h + b), R free: an update of the residual stream like LoRA's of a weight."""

    orthogonal: ClassVar[bool] = False
    subtract: ClassVar[bool] = False
    hf_codec: ClassVar[ReFTCodec] = ReFTCodec("direft", orthogonal=False, subtract=False)
    name: Literal["direft"] = "direft"
