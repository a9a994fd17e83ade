"""Components: frozen, strict pydantic objects that are the parts of a run, and slots that take any registered one.

    @register("peft")
    class LoRA(Component):
        name: Literal["lora"] = "lora"
        rank: int = Field(8, gt=0, description="Rank r of the update.")

    class Run(Component):
        peft: Annotated[Any, Slot("peft")] = Default("peft", "lora")

Components hold scalars, strings and tuples only, so that they hash, compare and serve as static arguments of `jax.jit`.
"""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAliasType, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import core_schema

from ftjax import registry

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from ftjax.config import Run

_collecting: contextvars.ContextVar[bool] = contextvars.ContextVar("collecting", default=False)


class Component(BaseModel):
    """A typed, immutable part of a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def __init__(self, **data: Any):
        if not _collecting.get():
            refresh()
            super().__init__(**data)
            return
        # Inside `collecting()` nothing is judged: the whole tree is validated at once afterwards, so that a user
        # sees the problems of every component and not only of the first one built.
        fields = type(self).model_fields
        defaults = {k: f.get_default(call_default_factory=True) for k, f in fields.items() if k not in data}
        object.__setattr__(self, "__dict__", {**defaults, **data})
        object.__setattr__(self, "__pydantic_fields_set__", set(data))
        object.__setattr__(self, "__pydantic_extra__", None)
        object.__setattr__(self, "__pydantic_private__", None)

    # Else pydantic would pass JSON through `__init__` as Python values, where strict tuples refuse lists.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    def check(self, run: Run) -> Iterable[str]:
        """Problems of this component in the company of the others; asked once every field is valid.

        Each is one line, "<place>  <reason>" with two spaces between, e.g.
        ``"objective=dpo, data=gsm8k  DPO needs preference pairs"``.
        """
        return ()

    def advise(self, run: Run) -> Iterable[str]:
        """Warnings in the form of `check`: what is allowed but is probably not meant."""
        return ()


@contextlib.contextmanager
def collecting() -> Iterator[None]:
    """Within this block components are built without validation; see `to_plain`."""
    token = _collecting.set(True)
    try:
        yield
    finally:
        _collecting.reset(token)


def to_plain(value: Any) -> Any:
    """A component tree as JSON-like data: what was set, plus the names that choose between components."""
    if isinstance(value, Component):
        data = vars(value)
        keys = [k for k in data if k in value.model_fields_set or k == "name" or isinstance(data[k], Component)]
        return {k: to_plain(data[k]) for k in keys}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class Slot:
    """Annotation of a field that takes any component registered under `kind`, chosen by its ``name``.

    Args:
      kind: a key of `registry.PACKAGES`.
    """

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices = {name: handler.generate_schema(cls) for name, cls in registry.known(self.kind).items()}
        dump = core_schema.plain_serializer_function_ser_schema(lambda v: v.model_dump(mode="json"))
        return core_schema.tagged_union_schema(choices, discriminator="name", serialization=dump)


def Default(kind: str, name: str, **values: Any) -> Any:  # noqa: N802 (reads as a value)
    """The default of a slot, by name, so that nothing is imported until a config is built."""
    return Field(default_factory=lambda: registry.get(kind, name)(**values))


@dataclass(frozen=True)
class Arm:
    """One alternative of an annotation, e.g. ``float`` with its bounds in ``float | None``."""

    type: Any
    metadata: tuple[Any, ...] = ()

    @property
    def kind(self) -> str | None:
        """The kind of a slot, or None."""
        return next((m.kind for m in (self.type, *self.metadata) if isinstance(m, Slot)), None)

    @property
    def component(self) -> type[Component] | None:
        """The component class, or None."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, Component) else None

    @property
    def items(self) -> tuple[Any, ...]:
        """The annotations of a tuple's items; one followed by `...` if it may have any length; () if not a tuple."""
        return get_args(self.type) if get_origin(self.type) is tuple else ()


def arms(annotation: Any, metadata: Iterable[Any] = ()) -> list[Arm]:
    """The alternatives of an annotation, with unions, aliases and `Annotated` opened."""
    if isinstance(annotation, TypeAliasType):
        return arms(annotation.__value__, metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return arms(inner, (*metadata, *more))
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in arms(part, metadata)]
    return [Arm(annotation, tuple(metadata))]


def field_arms(field: FieldInfo) -> list[Arm]:
    """The alternatives of a field."""
    return arms(field.annotation, field.metadata)


def slot_kind(field: FieldInfo) -> str | None:
    """The kind of a slot field, or None for an ordinary field."""
    return next((arm.kind for arm in field_arms(field) if arm.kind), None)


_stale = False


def _mark_stale() -> None:
    global _stale
    _stale = True


registry.on_change(_mark_stale)


def _subclasses(cls: type[Component]) -> Iterator[type[Component]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _holds_slot(found: list[Arm]) -> bool:
    for arm in found:
        inside = [field_arms(f) for f in arm.component.model_fields.values()] if arm.component else []
        inside += [arms(item) for item in arm.items if item is not ...]
        if arm.kind or any(map(_holds_slot, inside)):
            return True
    return False


def refresh() -> None:
    """Rebuilds the schemas whose slots were built before the latest registration."""
    global _stale
    if not _stale:
        return
    _stale = False
    outdated = [
        cls for cls in dict.fromkeys(_subclasses(Component)) if cls.__pydantic_complete__ and _holds_slot(arms(cls))
    ]
    for cls in outdated:  # all are taken apart before one is rebuilt: pydantic reuses whatever is still complete
        del cls.__pydantic_core_schema__
        cls.__pydantic_complete__ = False
    for cls in outdated:
        cls.model_rebuild(force=True)
