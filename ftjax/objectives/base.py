"""What an objective is: a pure function of a policy and a batch, giving sums and the weights to divide them by.

    loss = sum_k coef_k * sums_k / weights_k,   both added up over all micro-batches first

Because sums and weights are kept apart, any split of a batch into micro-batches gives the loss and gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.headspec import HeadSpec

Policy = Callable[..., Any]


@struct.dataclass
class LossOutput:
    """Result of an objective on one micro-batch; every field is required, so that none is forgotten.

    Attributes:
      sums: unnormalised loss terms, differentiated.
      mutable: running state of the model (BatchNorm statistics), passed on.
      metrics: further sums for the log, each as (sum, weight).
      rows: what `summary` needs of each row of a held-out batch ([B, ...] leaves); not used while training.
    """

    sums: dict[str, jax.Array]
    mutable: Any
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    rows: dict[str, jax.Array] = struct.field(default_factory=dict)


def token_inputs(batch: Any) -> dict[str, jax.Array]:
    """What a policy is called with for a batch of token rows: tokens, where they stand and, if there are any, their types."""
    found = {"input_ids": batch.tokens, "positions": batch.positions, "segments": batch.segments}
    return found | ({"token_type_ids": batch.types} if hasattr(batch, "types") else {})


def token_count(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The metric "num_tokens": tokens that are not padding, float32 scalars."""
    return (segments >= 0).sum().astype(jnp.float32), jnp.float32(1)


class Objective(Protocol):
    """Knows nothing of adapters, meshes or model families."""

    needs_reference: ClassVar[bool]
    """Whether a frozen snapshot of the policy is passed in."""
    batch: ClassVar[type]
    """The kind of batch it takes."""
    heads: ClassVar[tuple[str, ...]]
    """Kinds of head that it can train, best first (see `ftjax.headspec`)."""

    def head(self, labels: tuple[str, ...], problem: str) -> HeadSpec:
        """The head that the model must have, given the data's label names and kind of problem (empty for language data)."""
        ...

    def inputs(self, batch: Any) -> dict[str, jax.Array]:
        """What the policy is called with for a batch."""
        ...

    def coefficients(self) -> dict[str, float]:
        """Factor of each loss term; they enter the step as arrays."""
        ...

    def weights(self, batch: Any) -> dict[str, jax.Array]:
        """Denominator of each loss term, from the batch alone."""
        ...

    def __call__(
        self, policy: Policy, batch: Any, *, reference: Policy | None, mutable: Any, hyper: dict
    ) -> LossOutput:
        """The loss of one micro-batch."""
        ...

    def summary(self, rows: dict[str, Any]) -> dict[str, float]:
        """Metrics of the whole held-out set from its rows (numpy arrays, padding rows included); most have none."""
        ...
