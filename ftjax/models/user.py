"""Your own Flax module, Linen or NNX, as a model: its parameters get a table, its code stays as it is.

    model=FlaxModule(target="my.package:CNN", settings=("features=16",), trained=("Dense_1/*",))

The adapted weights are materialised inside the step (W + s A B, say) and handed to the module, so every method that
changes weights works; what needs a place inside the network (prefixes, bottlenecks, interventions, quantized weights)
cannot, and says so. The module is called with the named inputs of a batch and must return logits.
"""

from __future__ import annotations

import dataclasses as dc
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen, struct
from pydantic import Field

from ftjax.errors import ConfigError, did_you_mean
from ftjax.headspec import HeadSpec
from ftjax.models.base import Model, Numerics, Output
from ftjax.ops import materialize
from ftjax.params import Kind, ParamSpec, Store, Table, key_of
from ftjax.registry import register
from ftjax.schema import Component

_KINDS: dict[str, Kind] = {"bias": "bias", "scale": "norm", "embedding": "embed"}
_ANY_HEAD = (
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "image_classification",
    "value",
)


@struct.dataclass
class Ready:
    """The head of a model that gives logits itself."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x as it is."""
        return x


@dc.dataclass(frozen=True)
class UserConfig:
    """What a user's module is called with and made of.

    Attributes:
      target: ``package.module:Class``.
      settings: keyword arguments of the class.
      inputs: keys of a batch, given to the module in this order.
      example: shape of each input but for the batch, and its dtype.
      trained: patterns of parameters that are trained beside any method.
      kinds: ``(pattern, kind)`` where the parameter's name does not tell it.
    """

    target: str
    settings: tuple[tuple[str, Any], ...]
    inputs: tuple[str, ...]
    example: tuple[tuple[tuple[int, ...], str], ...]
    trained: tuple[str, ...]
    kinds: tuple[tuple[str, Kind], ...]

    tie_word_embeddings: ClassVar[bool] = False


@dc.dataclass(frozen=True)
class UserModel(Model):
    """A user's module behind the interface of a family."""

    family: ClassVar[str] = "flax_module"
    heads: ClassVar[dict[str, str]] = dict.fromkeys(_ANY_HEAD, "")

    @property
    def always_trained(self) -> tuple[str, ...]:
        """As the user says."""
        return self.config.trained

    @cached_property
    def network(self) -> Any:
        """The module: a Linen module, or (graph definition, state) of an NNX one."""
        return _Linen(self.config) if issubclass(_target(self.config.target), linen.Module) else _Nnx(self.config)

    @cached_property
    def table(self) -> Table:
        """Every parameter by its path in the module."""
        return {key: self.spec(key, x.shape, stat) for key, (x, stat) in self.network.shapes().items()}

    def spec(self, key: str, shape: tuple[int, ...], stat: bool) -> ParamSpec:
        """What is known of a parameter from its name and shape."""
        from ftjax.tree import matches

        name = key.rsplit("/", 1)[-1]
        named = next((kind for pattern, kind in self.config.kinds if matches(key, pattern)), None)
        shaped: dict[int, Kind] = {2: "kernel", 4: "conv"}
        kind: Kind = named or ("stat" if stat else _KINDS.get(name, shaped.get(len(shape), "norm")))
        return ParamSpec(shape, (None,) * len(shape), kind, hf=key.replace("/", "."))

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True, train: bool = False
    ) -> Output:
        """The module's logits. A `train` argument of its call is given when it has one."""
        taps = sorted(set(params) - set(self.table))
        if taps:
            raise ConfigError(
                f"{taps[0]}: a user's own module has no sites; only methods that change weights work on it"
            )
        plain = {k: materialize(v).astype(self.dtype) if hasattr(v, "materialize") else v for k, v in params.items()}
        missing = [k for k in self.config.inputs if k not in inputs]
        if missing:
            raise ConfigError(f"model.inputs: the batch has no {missing[0]!r}.{did_you_mean(missing[0], inputs)}")
        logits, mutable = self.network(plain, [inputs[k] for k in self.config.inputs], train)
        return Output(logits, Ready(), mutable=mutable, chunk=self.numerics.loss_chunk)  # type: ignore[arg-type]


def _target(path: str) -> type:
    """The class that ``package.module:Class`` names.

    Raises:
      ConfigError: there is no such module or class.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.target={path!r}: {error}; expected package.module:Class") from None
    if not inspect.isclass(found):
        raise ConfigError(f"model.target={path!r} is no class")
    return found


def _flat(tree: Any) -> dict[str, Any]:
    def name(k: Any) -> str:
        return str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))

    return {"/".join(map(name, path)): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _examples(config: UserConfig, rows: int = 1) -> list[Any]:
    return [jnp.zeros((rows, *shape), dtype) for shape, dtype in config.example]


class _Linen:
    """A Linen module: parameters under their paths, other collections as running statistics ``batch_stats/...``."""

    def __init__(self, config: UserConfig):
        self.config = config
        self.module = _target(config.target)(**dict(config.settings))
        self.flag = "train" in inspect.signature(type(self.module).__call__).parameters

    def init(self, key: jax.Array) -> Any:
        """All collections."""
        return self.module.init(key, *_examples(self.config), **({"train": False} if self.flag else {}))

    def shapes(self) -> dict[str, tuple[Any, bool]]:
        """(shape, whether it is running state) of every leaf."""
        made = jax.eval_shape(self.init, jax.random.key(0))
        stats = {k: v for k, v in made.items() if k != "params"}
        return {k: (x, False) for k, x in _flat(made["params"]).items()} | {
            k: (x, True) for k, x in _flat(stats).items()
        }

    def values(self, key: jax.Array) -> Store:
        """Initial values as the module draws them."""
        made = self.init(key)
        return _flat(made["params"]) | _flat({k: v for k, v in made.items() if k != "params"})

    def __call__(self, params: Store, inputs: list[Any], train: bool) -> tuple[jax.Array, Store]:
        shapes = self.shapes()
        weights = _nested({k: v for k, v in params.items() if not shapes[k][1]})
        stats = _nested({k: v for k, v in params.items() if shapes[k][1]})
        flags = {"train": train} if self.flag else {}
        if not (train and stats):
            return self.module.apply({"params": weights, **stats}, *inputs, **flags), {}
        logits, changed = self.module.apply({"params": weights, **stats}, *inputs, **flags, mutable=list(stats))
        return logits, _flat(changed)


class _Nnx:
    """An NNX module: its `Param` state by path; `BatchStat` state as running statistics."""

    def __init__(self, config: UserConfig):
        from flax import nnx

        self.nnx, self.config = nnx, config
        self.build = lambda key: _target(config.target)(**dict(config.settings), rngs=nnx.Rngs(params=key, dropout=key))
        self.graph, _, _ = nnx.split(nnx.eval_shape(lambda: self.build(jax.random.key(0))), nnx.Param, ...)

    def _state(self, key: jax.Array) -> tuple[Any, Any]:
        _, weights, rest = self.nnx.split(self.build(key), self.nnx.Param, self.nnx.BatchStat, ...)[:3]
        return self.nnx.to_pure_dict(weights), self.nnx.to_pure_dict(rest)

    def shapes(self) -> dict[str, tuple[Any, bool]]:
        """(shape, whether it is running state) of every leaf."""
        weights, stats = jax.eval_shape(self._state, jax.random.key(0))
        return {k: (x, False) for k, x in _flat(weights).items()} | {k: (x, True) for k, x in _flat(stats).items()}

    def values(self, key: jax.Array) -> Store:
        """Initial values as the module draws them."""
        weights, stats = self._state(key)
        return _flat(weights) | _flat(stats)

    def __call__(self, params: Store, inputs: list[Any], train: bool) -> tuple[jax.Array, Store]:
        module = self.build(jax.random.key(0))
        state = self.nnx.state(module)
        flat = {tuple(map(str, k)): k for k in self.nnx.to_flat_state(state).paths}
        pure = dict(self.nnx.to_flat_state(state))
        for key, value in params.items():
            path = flat[tuple(key.split("/"))]
            pure[path] = pure[path].replace(value)
        self.nnx.update(module, self.nnx.from_flat_state(pure))
        if hasattr(module, "train") and hasattr(module, "eval"):
            (module.train if train else module.eval)()
        logits = module(*inputs)
        changed = self.nnx.to_pure_dict(self.nnx.state(module, self.nnx.BatchStat)) if train else {}
        return logits, _flat(changed)


def _nested(flat: Store) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in flat.items():
        node = out
        *heads, last = key.split("/")
        for head in heads:
            node = node.setdefault(head, {})
        node[last] = value
    return out


@register("model")
class FlaxModule(Component):
    """Your own Flax module, with new weights."""

    name: Literal["flax_module"] = "flax_module"
    target: str = Field(min_length=3, description="The class, as package.module:Class.")
    settings: tuple[str, ...] = Field((), description="Keyword arguments of the class as name=value (JSON values).")
    inputs: tuple[str, ...] = Field(
        ("pixel_values",), min_length=1, description="Inputs of a batch, in the order of the module's call."
    )
    shapes: tuple[tuple[int, ...], ...] = Field((), description="Shape of each input but for the batch dimension.")
    dtypes: tuple[Literal["float32", "int32"], ...] = Field((), description="Dtype of each input; empty: float32.")
    trained: tuple[str, ...] = Field(
        (), description="Patterns of parameters trained beside any method, e.g. Dense_1/*."
    )
    kinds: tuple[str, ...] = Field((), description="pattern=kind for parameters whose name does not tell it.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the weights.")

    @property
    def tokenizer(self) -> Path | None:
        """None: a module of one's own has none."""
        return None

    @property
    def label(self) -> str:
        """The class."""
        return self.target

    def check(self, run: Any) -> Iterable[str]:
        """What materialised weights cannot do, said before anything is built."""
        if getattr(run.peft, "dropout", 0.0):
            yield (
                f"peft.dropout={run.peft.dropout}, model=flax_module  adapted weights are handed over whole, so there is "
                "no input of A to drop; use 0"
            )
        if len(self.shapes) != len(self.inputs):
            yield f"model.shapes={self.shapes}, model.inputs={self.inputs}  one shape per input is needed"

    def model(self, numerics: Numerics, head: HeadSpec | None = None) -> UserModel:
        """The model without weights."""
        dtypes = self.dtypes or ("float32",) * len(self.shapes)
        pairs = tuple(tuple(x.partition("=")[::2]) for x in self.kinds)
        config = UserConfig(
            self.target, tuple(_setting(x) for x in self.settings), self.inputs,
            tuple(zip(self.shapes, dtypes, strict=True)), self.trained, pairs,  # type: ignore[arg-type]
        )  # fmt: skip
        return UserModel(config, numerics, head or HeadSpec())

    def load(
        self, numerics: Numerics, *, seed: int, vocab: int, head: HeadSpec | None = None,
        say: Callable[[str], None] = warnings.warn, place: Any = None,
    ) -> tuple[Model, Store]:  # fmt: skip
        """(model, parameters as the module draws them from the seed)."""
        model = self.model(numerics, head)
        values = model.network.values(key_of(jax.random.key(seed), "model"))
        put = place(model) if place else (lambda _, x: x)
        return model, {k: put(k, values[k]) for k in model.table}


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
