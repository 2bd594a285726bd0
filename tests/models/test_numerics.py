"""Numerics: strings or enumerations in, plain strings in config.json, and every other value refused."""

import dataclasses

import pytest

from wallx_jax.models.config import TINY, Kernels, Numerics, WallXConfig

OPTIONS = [(field.name, field.type) for field in dataclasses.fields(Numerics) if field.type is not bool]


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, kind in OPTIONS for choice in kind], ids=lambda value: str(value)
)
def test_a_string_becomes_its_choice_and_returns_as_a_string(name, choice):
    numerics = Numerics(**{name: choice.value})
    assert getattr(numerics, name) is choice and numerics == Numerics(**{name: choice})
    stored = TINY.replace(numerics={name: choice}).to_hf()
    assert type(stored["wallx_jax"][name]) is str and type(stored["torch_dtype"]) is str
    assert getattr(WallXConfig.from_hf(stored).numerics, name) is choice
    assert f"{name}={choice.value!r}" in repr(numerics), "logs show the string"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Numerics)])
@pytest.mark.parametrize("value", ["some", "", None, 1, []])
def test_another_value_is_refused_with_the_choices(name, value):
    with pytest.raises(ValueError, match=rf"numerics\.{name} is .*; choose one of \["):
        Numerics(**{name: value})


def test_kernels_that_are_not_chosen_are_stored_as_such():
    """A checkpoint written on a CPU must not ask for CPU kernels on a GPU."""
    assert Numerics().kernels is Kernels.AUTO and TINY.to_hf()["wallx_jax"]["kernels"] == "auto"
    stored = TINY.to_hf()
    del stored["wallx_jax"]["kernels"]
    assert WallXConfig.from_hf(stored).numerics.kernels is Kernels.AUTO, "also in a config.json that has no such field"
