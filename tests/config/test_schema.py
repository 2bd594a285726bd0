"""Every setting is declared once: documented, bounded and with its choices; docs/configuration.md is made from that."""

import dataclasses
from pathlib import Path

import pytest
from helpers.usable_config import usable

from wallx_jax.config import default_config, document, flatten, resolve
from wallx_jax.config.defaults import SETTINGS, TABLES
from wallx_jax.config.schema import OptimConfig, Platform, SplitMode
from wallx_jax.models.config import Remat
from wallx_jax.utils.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
CHOICES = [key for key, setting in SETTINGS.items() if setting.choices]
FIRST = "lerobot/aloha_mobile_cabinet"


def bounds():
    """(key, last value inside the bound, first value outside) of every bound."""
    for key, setting in SETTINGS.items():
        step = 1 if setting.kind is int else 1e-6
        for inclusive, outward in ((setting.minimum, -step), (setting.maximum, step)):
            if inclusive is not None:
                yield key, setting.kind(inclusive), inclusive + outward
        for exclusive, outward in ((setting.above, -step), (setting.below, step)):
            if exclusive is not None:
                yield key, exclusive - outward, setting.kind(exclusive)


def errors_with(key, value) -> list[str]:
    try:
        resolve(usable(**{key.replace(".", "__"): value}))
    except ConfigError as error:
        return list(error.errors)
    return []


def test_every_key_has_a_documented_setting_in_its_place():
    assert list(flatten(default_config())) == list(SETTINGS)
    for key, setting in SETTINGS.items():
        assert len(setting.doc.split()) > 1 and "\n" not in setting.doc and not setting.doc.endswith("."), key
        assert setting.optional or isinstance(setting.default, setting.kind), key
        assert not setting.only_with or SETTINGS[setting.only_with].kind is bool, key


def test_the_configuration_holds_plain_values():
    """It is stored as YAML and JSON, which know no enumerations."""
    plain = {bool, int, float, str, tuple, dict, type(None)}
    assert {type(value) for value in flatten(default_config()).values()} <= plain
    given = flatten(usable(split_mode=SplitMode.FRAME, numerics__remat=Remat.DOTS))
    assert (type(given["split_mode"]), type(given["numerics.remat"])) == (str, str)


@pytest.mark.parametrize(("key", "inside", "outside"), list(bounds()))
def test_both_sides_of_every_bound(key, inside, outside):
    assert not [error for error in errors_with(key, inside) if error.startswith(f"{key} = {inside!r}: must")]
    assert [error for error in errors_with(key, outside) if error.startswith(f"{key} = {outside!r}: must ")]


def test_most_numbers_have_a_bound():
    """The others: mesh axes and process ids are checked together."""
    numbers = {key for key, setting in SETTINGS.items() if setting.kind in (int, float)}
    free = numbers - {key for key, _, _ in bounds()}
    assert {key.split(".")[0] for key in free} == {"mesh", "distributed"}


@pytest.mark.parametrize("key", CHOICES)
def test_choices_are_taken_and_others_refused(key):
    choices = SETTINGS[key].choices
    for choice in choices:
        assert not [error for error in errors_with(key, choice.value) if key in error]
    for wrong in ("other", choices[0].upper(), f"{choices[0]} "):
        (error,) = errors_with(key, wrong)
        assert error.startswith(f"{key} = {wrong!r}: choose one of {list(choices)}"), error


@pytest.mark.parametrize("key", [key for key, setting in SETTINGS.items() if not setting.optional])
def test_none_is_no_value_of_a_setting_with_a_default(key):
    assert [error for error in errors_with(key, None) if error.startswith(f"{key} = None: expected ")]


@pytest.mark.parametrize("key", [key for key in SETTINGS if "." not in key and key != "repo_id"])
def test_a_dataset_sets_what_is_its_own_and_nothing_else(key):
    value = flatten(default_config())[key]
    entry = {"repo_id": "me/other", "camera_views": {"face_view": "front"}, key: value}
    refused = [error for error in errors_with("datasets", {"other": entry}) if "not a setting of one dataset" in error]
    assert bool(refused) != SETTINGS[key].per_dataset


def test_a_dataset_inherits_all_but_what_points_into_the_first():
    own = {"dataset_root": "/a", "dataset_revision": "v1", "norm_stats_path": "n.json", "episodes": "0:2"}
    entry = {"repo_id": "me/other", "camera_views": {"face_view": "front"}, "episodes": "3"}
    run = resolve(usable(robot_name=FIRST, num_workers=7, **own, datasets={"other": entry}))
    assert (run.data.root, run.data.revision, run.data.norm_stats_path, run.data.episodes) == tuple(own.values())
    (other,) = run.mixed
    data = other.data
    assert (data.root, data.revision, data.norm_stats_path, data.episodes) == (None, None, None, "3")
    assert data.num_workers == 7 and data.prompt == run.data.prompt


def test_a_switch_under_two_names_is_one():
    first, second = (resolve(usable(**{key: True})).optim for key in ("freeze_vlm", "train_action_expert_only"))
    assert first == second and first.freeze_vlm and not resolve(usable()).optim.freeze_vlm
    assert not hasattr(first, "train_action_expert_only")
    assert resolve(usable()).optim == OptimConfig(), "defaults of the dataclass are those of the configuration"


def test_choices_resolve_to_their_enumerations():
    run = resolve(usable(split_mode="frame", platform="cpu", numerics__remat="dots"))
    assert run.data.split_mode is SplitMode.FRAME and run.platform is Platform.CPU
    assert resolve(usable()).platform is None
    assert dict(run.model.numerics) == {"remat": "dots"}


def test_the_page_is_the_schemas():
    assert PAGE.read_text() == document.page(), "python -m wallx_jax.config.document > docs/configuration.md"


def test_the_page_has_every_setting_once_and_every_part():
    rows = [line for line in document.page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(SETTINGS)
    assert {row.count(" | ") for row in rows} == {4}, "no cell breaks the table"
    headings = [line.removeprefix("## ") for line in document.page().splitlines() if line.startswith("## ")]
    assert headings == [heading for heading, _ in document.PARTS.values()]


@pytest.mark.parametrize(
    ("key", "cells"),
    [
        ("learning_rate", "float | `9e-05` | > 0"),
        ("num_workers", "int | `4` | ≥ 0"),
        ("augment.crop", "float | `0.95` | 0 < x ≤ 1"),
        ("ema_decay", "float | – | 0 < x < 1"),
        ("seed", "int | `42` | 0 ≤ x < 2**32"),
        ("split_mode", "str | `episode` | `episode`, `frame`"),
        ("numerics.remat", "str | – (`full`) | `full`, `dots`, `none`"),
        ("resolution", "table | `{'face_view': 256,"),
        ("predict_action_keys", "tuple of str | empty |"),
        ("save_path", "str | required |"),
    ],
)
def test_a_row_says_type_default_and_values(key, cells):
    mark = " *" if SETTINGS[key].per_dataset else ""
    assert f"| `{key}`{mark} | {cells}" in document.page()


def test_tables_are_the_settings_with_names_of_ones_own():
    assert TABLES == ("dof_config", "agent_pos_config", "camera_views", "resolution", "prompt.view_names", "datasets")
    assert {field.name for field in dataclasses.fields(OptimConfig)} >= {"lora"}, "other sections are not tables"
