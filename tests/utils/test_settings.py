from dataclasses import dataclass
from typing import ClassVar

import pytest

from wallx_jax.utils.settings import Choice, build, section, setting, settings_of


class Color(Choice):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    color: Color | None = setting(None, "of the light")
    width: float = setting(1.0, "in meters", above=0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = setting(None, "of the thing", required=True)
    steps: int = setting(3, "to take", key="num_steps", minimum=2, maximum=9)
    old_name: ClassVar[str | None] = setting(None, "read only", derived=True)
    rows: tuple[tuple[str, int], ...] = setting({}, "by name", derived=True)
    words: tuple[str, ...] = setting(("a",), "to say")
    inner: Inner = section(Inner)
    same: Inner = section(Inner, prefix=False)
    unset: Inner | None = section(Inner, unset=True)


FOUND = {found.key: found for found in settings_of(Outer)}


def test_keys_types_and_defaults_follow_from_the_fields():
    described = {key: (found.kind, found.default) for key, found in FOUND.items()}
    assert described == {
        "name": (str, None), "num_steps": (int, 3), "old_name": (str, None), "rows": (dict, {}),
        "words": (tuple, ("a",)), "inner.color": (str, None), "inner.width": (float, 1.0), "color": (str, None),
        "width": (float, 1.0), "unset.color": (str, None), "unset.width": (float, None),
    }  # fmt: skip
    assert list(described) == list(FOUND)
    assert FOUND["inner.color"].choices == (Color.RED, Color.BLUE) and FOUND["unset.width"].fallback == 1.0


def test_build_takes_values_by_key_and_converts_choices():
    values = {"name": "x", "num_steps": 4, "words": (), "inner.color": "red", "inner.width": 2.0, "color": None,
              "width": 3.0, "unset.color": None, "unset.width": None}  # fmt: skip
    built = build(Outer, values, rows=(("a", 1),), unset=None)
    assert built == Outer(
        name="x", steps=4, rows=(("a", 1),), words=(), inner=Inner(Color.RED, 2.0), same=Inner(None, 3.0), unset=None
    )
    assert built.inner.color is Color.RED
    with pytest.raises(AttributeError):
        built.old_name  # noqa: B018


def test_a_derived_field_must_be_given():
    with pytest.raises(TypeError, match="rows"):
        Outer(name="x", inner=Inner(), same=Inner(), unset=None)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("num_steps", True, "expected int, got bool"),
        ("num_steps", None, "expected int, got NoneType"),
        ("num_steps", 1.0, "expected int, got float"),
        ("width", 1, None),
        ("width", float("nan"), "expected a finite number"),
        ("old_name", None, None),
        ("old_name", "", "is empty; leave it out, or give None, where no value is meant"),
        ("name", "", None),
        ("words", "a", "expected tuple, got str"),
    ],
)
def test_types(key, value, problem):
    assert FOUND[key].type_problem(value) == problem


@pytest.mark.parametrize(
    ("bounds", "value", "problem"),
    [
        ({"above": 0}, 0, "must be above 0"),
        ({"minimum": 0}, -1, "must not be negative"),
        ({"minimum": 1}, 0, "must be at least 1"),
        ({"minimum": 1, "below": 5}, 5, "must be at least 1 and below 5"),
        ({"minimum": 2, "maximum": 9}, 10, "must be from 2 to 9"),
        ({"above": 0, "maximum": 1}, 2, "must be above 0 and at most 1"),
        ({"above": 0, "below": 1}, 1, "must be above 0 and below 1"),
        ({"minimum": 0, "below": 2**32}, 2**32, "must not be negative, and be below 2**32"),
        ({"below": 100}, 100, "must be below 100"),
        ({"above": 0, "maximum": 1}, 1, None),
        ({"above": 0}, None, None),
    ],
)
def test_bounds(bounds, value, problem):
    found = setting(None, "a number", **bounds).metadata["setting"]
    assert found.value_problem(value) == problem


def test_a_choice_prints_as_its_string():
    assert (str(Color.RED), repr(Color.RED), f"{[*Color]}") == ("red", "'red'", "['red', 'blue']")
    assert FOUND["color"].value_problem("rde") == "choose one of ['red', 'blue'] (did you mean \"red\"?)"
