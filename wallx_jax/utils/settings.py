"""Declare settings as fields of dataclasses, with their documentation and constraints.

    @dataclass(frozen=True)
    class OptimConfig:
        learning_rate: float = setting(9e-5, "peak, after warmup", above=0)
        lora: LoraConfig = section(LoraConfig)

A field's name is the setting's key, and its annotation gives the type and the choices. A ClassVar declares a setting
that is read but not kept as an attribute. `settings_of` walks over a dataclass and its sections.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from enum import StrEnum
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin

from wallx_jax.utils.errors import nearest


class Choice(StrEnum):
    """A string with a fixed set of values; equal to, and printed as, the plain string."""

    def __repr__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting with its documentation and constraints.

    Attributes:
        default: value if it is not given; None: not set, where the documentation says what applies then.
        doc: description with units, in one line.
        key: full name, such as "resume.ckpt".
        kind: bool, int, float, str, tuple (of strings) or dict (a table whose names the user defines).
        choices: the only values that are accepted; empty: any.
        minimum: smallest value.
        above: all values are larger.
        maximum: largest value.
        below: all values are smaller.
        required: whether a value must be given.
        fallback: default of the dataclass, for a setting of an `unset` section.
        entry: check of a table's value, and the description of a valid one; None: not checked here.
        only_with: key of the switch without which the setting has no effect.
        per_dataset: whether each dataset of a mixture may set its own.
        inherited: whether the datasets of a mixture have the value of the first, unless they set their own.
        after: key that precedes this one in the documentation, if it is not that of the field before.
    """

    default: Any
    doc: str
    key: str = ""
    kind: type = str
    choices: tuple[Choice, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    required: bool = False
    fallback: Any = None
    entry: tuple[Callable[[Any], bool], str] | None = None
    only_with: str = ""
    per_dataset: bool = False
    inherited: bool = True
    after: str = ""

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return self.default is None

    def type_problem(self, value: Any) -> str | None:
        """Describe how a value differs from the expected type, if it does."""
        if self.optional and value is None:
            return None
        if self.optional and not self.required and value == "":
            return "is empty; leave it out, or give None, where no value is meant"
        number_is_bool = isinstance(value, bool) and self.kind is not bool
        if number_is_bool or not isinstance(value, (int, float) if self.kind is float else self.kind):
            return f"expected {self.kind.__name__}, got {type(value).__name__}"
        if isinstance(value, float) and not math.isfinite(value):
            return "expected a finite number"
        return None

    def value_problem(self, value: Any) -> str | None:
        """Describe which choices or bounds a value of the right type violates, if it does."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"choose one of {list(self.choices)}{nearest(value, self.choices)}"
        too_small = (self.minimum is not None and value < self.minimum) or (
            self.above is not None and value <= self.above
        )
        too_large = (self.maximum is not None and value > self.maximum) or (
            self.below is not None and value >= self.below
        )
        return f"must {self._bounds()}" if too_small or too_large else None

    def _bounds(self) -> str:
        """Return what the value must do, such as "be above 0 and at most 1"."""
        if self.minimum is not None and self.maximum is not None:
            return f"be from {self.minimum} to {self.maximum}"
        lower = f"above {self.above}" if self.above is not None else ""
        upper = f"at most {self.maximum}" if self.maximum is not None else ""
        upper = f"below {bound_text(self.below)}" if self.below is not None else upper
        if self.minimum == 0:
            return f"not be negative{upper and ', and be '}{upper}"
        lower = f"at least {self.minimum}" if self.minimum is not None else lower
        return f"be {lower}{lower and upper and ' and '}{upper}"


def bound_text(bound: float) -> str:
    """Return a bound as text, large powers of two as such: "2**32"."""
    exponent = int(bound).bit_length() - 1
    return f"2**{exponent}" if exponent > 16 and bound == 2**exponent else f"{bound}"


def setting(default: Any, doc: str, *, derived: bool = False, **constraints: Any) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
        default: see `Setting`; also the default of the field, unless `derived`.
        doc: see `Setting`.
        derived: the field's value follows from the setting instead of being equal to it, so it has no default; or the
            field is a ClassVar, which has no value.
        constraints: other fields of `Setting`; `key` if it is not the name of the field.
    """
    metadata = {"setting": Setting(default=default, doc=doc, **constraints)}
    if derived or constraints.get("required"):
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """A dataclass whose settings are nested in another's; see `section`."""

    kind: type
    prefix: bool
    unset: bool


def section(kind: type, *, prefix: bool = True, unset: bool = False, default: Any = MISSING) -> Any:
    """Declare a field as a section: a dataclass with settings of its own.

    Args:
        kind: the dataclass.
        prefix: whether the keys begin with the name of the field, "lora.rank".
        unset: whether all its settings are None by default, and the dataclass's own defaults only apply in the end.
        default: default of the field.
    """
    return dataclasses.field(default=default, metadata={"section": Section(kind, prefix, unset)})


def settings_of(kind: Any, prefix: str = "", unset: bool = False) -> Iterator[Setting]:
    """Yield the settings of a dataclass and its sections, complete with key, type and choices, in order of the fields.

    Args:
        kind: the dataclass.
        prefix: begin of all keys, "lora.".
        unset: as in `section`.
    """
    for field in kind.__dataclass_fields__.values():  # dataclasses.fields leaves out ClassVars
        if (part := field.metadata.get("section")) is not None:
            yield from settings_of(part.kind, f"{prefix}{field.name}." if part.prefix else prefix, part.unset)
        elif (found := field.metadata.get("setting")) is not None:
            value_type = _value_type(field.type)
            is_table, is_choice = isinstance(found.default, dict), _is_choice(value_type)
            yield dataclasses.replace(
                found,
                key=prefix + (found.key or field.name),
                kind=dict if is_table else str if is_choice else get_origin(value_type) or value_type,
                choices=tuple(value_type) if is_choice else (),
                default=None if unset else found.default,
                fallback=found.default if unset else None,
            )


def build(kind: type, values: Mapping[str, Any], prefix: str = "", **derived: Any) -> Any:
    """Build a dataclass from the values of its settings.

    Args:
        kind: the dataclass.
        values: valid values by full key.
        prefix: as in `settings_of`.
        derived: fields that are not to be taken from `values` as they are.
    """
    given = {}
    for field in (field for field in dataclasses.fields(kind) if field.name not in derived):
        if (part := field.metadata.get("section")) is not None:
            given[field.name] = build(part.kind, values, f"{prefix}{field.name}." if part.prefix else prefix)
        elif (found := field.metadata.get("setting")) is not None:
            value, value_type = values[prefix + (found.key or field.name)], _value_type(field.type)
            given[field.name] = value_type(value) if _is_choice(value_type) and value is not None else value
    return kind(**given, **derived)


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Choice)


def _value_type(annotation: Any) -> Any:
    """Return X for the annotations X, `X | None` and `ClassVar[X]`."""
    if get_origin(annotation) is ClassVar:
        return _value_type(get_args(annotation)[0])
    alternatives = [kind for kind in get_args(annotation) if kind is not NoneType]
    return alternatives[0] if NoneType in get_args(annotation) else annotation
