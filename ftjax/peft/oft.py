"""OFT: the inputs of a weight rotated block by block (Qiu et al. 2023, arXiv:2306.07280; by series: arXiv:2506.19847).

y = (x R) W + b,   R = diag(R_1 ... R_k),   R_i = I + 2 Q + 2 Q^2 + ... + Q^n,   Q skew-symmetric, 0 at the start

    peft=OFT(block_size=32, targets=("q_proj", "v_proj"))

The series is that of (I + Q)(I - Q)^-1, cut after the power n = terms - 1, whose weight is 1 as in PEFT. With ``exact=True``
R_i is (I - Q)(I + Q)^-1, which turns the other way: PEFT's files mean either by the same numbers. GPT-2's weights take
rotations as any others; PEFT 0.21 has none for its Conv1D, so that such a file is opened here only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from ftjax.errors import ConfigError
from ftjax.ops import dense
from ftjax.params import ParamSpec, Table, spec_of, unranged
from ftjax.peft.interop import Tensors
from ftjax.peft.modules import Module, Targets
from ftjax.peft.weights import PlainCodec, WeightMethod, lead, wrong_number
from ftjax.registry import register


@struct.dataclass
class OFTDelta:
    """The rotations of one weight's inputs (the array leads with [layers] when stacked).

    Attributes:
      g: [blocks, size (size - 1) / 2] float32, the upper triangles of Q by rows; one block stands for all where they share.
      terms: of the series; 0 for the exact inverse.
    """

    g: jax.Array
    terms: int = struct.field(pytree_node=False)

    def turn(self) -> jax.Array:
        """R - I of each block [..., blocks, size, size], float32; just 0 where Q is."""
        size = (1 + math.isqrt(1 + 8 * self.g.shape[-1])) // 2
        upper = jnp.zeros((*self.g.shape[:-1], size, size), self.g.dtype).at[..., *np.triu_indices(size, 1)].set(self.g)
        q = upper - upper.swapaxes(-1, -2)
        if not self.terms:
            return jnp.linalg.solve(jnp.eye(size, dtype=q.dtype) + q, -2 * q)
        power, total = q, 2 * q
        last = max(self.terms - 1, 3) if self.terms > 2 else 1  # PEFT's third term brings the cube with it
        for i in range(2, last + 1):
            power = power @ q
            total = total + (power if i == last else 2 * power)
        return total

    def dot(self, x: jax.Array, base: Any, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]; what the rotation adds to x is computed, so that none adds nothing."""
        turn = self.turn().astype(x.dtype)
        size = turn.shape[-1]
        parts = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
        turn = jnp.broadcast_to(turn, (parts.shape[-2], size, size))
        return dense(x + jnp.einsum("...ki,kij->...kj", parts, turn).reshape(x.shape), base, bias)

    def axes(self, spec: ParamSpec) -> dict[str, tuple[str | None, ...]]:
        """Small: not split."""
        return {"g": (*spec.axes[:-2], None, None)}

    def merge(self, base: jax.Array) -> jax.Array:
        """R W, float32 (leading dimensions allowed)."""
        turn = self.turn()
        *first, inner, outer = base.shape
        size = turn.shape[-1]
        parts = base.reshape(*first, inner // size, size, outer)
        turn = jnp.broadcast_to(turn, (*first, inner // size, size, size))
        return base + jnp.einsum("...kij,...kjo->...kio", turn, parts).reshape(base.shape)


def divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to a wanted one, the lower of two, as PEFT finds it."""
    if wanted >= n:
        return n
    lower = next(m for m in range(wanted, 0, -1) if n % m == 0)
    higher = next(m for m in range(wanted, n + 1) if n % m == 0)
    return lower if wanted - lower <= higher - wanted else higher


def block_of(inner: int, size: int, blocks: int) -> int:
    """The block size on `inner` features: by the number of blocks where that is given, else by their size."""
    return inner // divisor(inner, blocks) if blocks else divisor(inner, size)


class OFTCodec(PlainCodec):
    """OFT in PEFT's format since 0.14: ``oft_R.weight`` [blocks, size (size - 1) / 2]."""

    peft_type = "OFT"
    READ = (
        "r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "eps", "init_weights",
    )  # fmt: skip
    NEUTRAL: ClassVar = {"bias": ("none",), "module_dropout": (0.0,)}

    def refuse(self, config: Mapping[str, Any]) -> list[str]:
        """See `Codec`."""
        lines = super().refuse(config)
        r, size = config.get("r", 0), config.get("oft_block_size")
        if type(r) is not int or type(size) is not int or min(r, size) != 0 or max(r, size) < 1:
            lines.append(
                f"r={r!r}, oft_block_size={size!r}  expected one of them as a whole number above 0, the other as 0"
            )
        if not config.get("use_cayley_neumann", True):
            return lines
        terms = config.get("num_cayley_neumann_terms", 5)
        if terms == 1:
            lines.append("num_cayley_neumann_terms=1  rotates nothing")
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
        if version is None or tuple(map(int, version.groups())) < (0, 18):
            lines.append(
                f"peft_version={config.get('peft_version')!r}  PEFT before 0.18 means another series by these numbers"
            )
        return lines + wrong_number({"num_cayley_neumann_terms": terms}, "num_cayley_neumann_terms", whole=True)

    def shapes(self, config: Mapping[str, Any], module: Module) -> dict[str, tuple[int, ...]]:
        """See `ModuleCodec`."""
        inner = module.spec.shape[0]
        size = block_of(inner, config["oft_block_size"], config.get("r", 0))
        return {"oft_R.weight": (1 if config.get("block_share") else inner // size, size * (size - 1) // 2)}

    def arrays(self, entry: OFTDelta) -> Tensors:
        """See `ModuleCodec`."""
        return {"oft_R.weight": np.asarray(entry.g)}

    def entry(self, config: Mapping[str, Any], module: Module, arrays: Tensors) -> OFTDelta:
        """See `ModuleCodec`."""
        series = config.get("use_cayley_neumann", True)
        return OFTDelta(jnp.asarray(arrays["oft_R.weight"]), config.get("num_cayley_neumann_terms", 5) if series else 0)

    def settings(self, method: OFT, entries: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModuleCodec`; by the version PEFT tells which series is meant."""
        return {"r": method.blocks, "oft_block_size": 0 if method.blocks else method.block_size, "coft": False,
                "block_share": method.share, "use_cayley_neumann": not method.exact, "peft_version": "0.18.0",
                "num_cayley_neumann_terms": method.terms, "module_dropout": 0.0, "bias": "none",
                "init_weights": True}  # fmt: skip

    def method(self, config: Mapping[str, Any], targets: Targets) -> OFT:
        """See `ModuleCodec`."""
        exact = not config.get("use_cayley_neumann", True)
        by_size = {"block_size": config["oft_block_size"]} if config["oft_block_size"] else {"blocks": config["r"]}
        series = {"exact": True} if exact else {"terms": config.get("num_cayley_neumann_terms", 5)}
        share = bool(config.get("block_share"))
        return OFT(**by_size, **series, share=share, targets=targets.unnumbered, layers=targets.layers)


@register("peft")
class OFT(WeightMethod):
    """Rotations of a weight's inputs, block by block."""

    hf_type: ClassVar[str | None] = "OFT"
    trained: ClassVar[Mapping[str, str]] = {"g": "oft"}
    hf_codec: ClassVar[OFTCodec] = OFTCodec()

    name: Literal["oft"] = "oft"
    block_size: int = Field(
        32, gt=1, description="Features turned together; where it does not divide the inputs, the nearest."
    )
    blocks: int = Field(0, ge=0, description="Number of blocks per weight, instead of their size; 0: by size.")
    share: bool = Field(False, description="Whether all blocks of a weight turn alike.")
    terms: int = Field(5, gt=1, description="Terms of the series that stands for the inverse.")
    exact: bool = Field(
        False, description="Solve for the inverse instead of the series: dearer, orthogonal to rounding."
    )

    def keys(self, table: Table) -> list[str]:
        """Store keys that get rotations.

        Raises:
          ConfigError: blocks of one feature, which cannot turn.
        """
        keys = super().keys(table)
        for key in keys:
            inner = spec_of(table, key).shape[-2]
            if block_of(inner, self.block_size, self.blocks) < 2:
                how = f"blocks={self.blocks}" if self.blocks else f"block_size={self.block_size}"
                raise ConfigError(f"peft.{how}: the {inner} inputs of {unranged(key)} fall into blocks of one feature")
        return keys

    def delta(self, key: jax.Array, path: str, spec: ParamSpec, base: Any) -> OFTDelta:
        """Q = 0."""
        inner = spec.shape[-2]
        size = block_of(inner, self.block_size, self.blocks)
        shape = (*lead(spec), 1 if self.share else inner // size, size * (size - 1) // 2)
        return OFTDelta(jnp.zeros(shape, jnp.float32), 0 if self.exact else self.terms)
