"""Generate the configuration that files in configs/ modify, from the settings that the schema declares."""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from wallx_jax.config.schema import RunConfig
from wallx_jax.utils.settings import Choice, Setting, settings_of


def _in_order(settings: Iterable[Setting]) -> dict[str, Setting]:
    """Return the settings by key, each that has one behind the key that it is to come `after`."""
    by_key = {setting.key: setting for setting in settings}
    order = [key for key, setting in by_key.items() if not setting.after]
    for key, setting in by_key.items():
        if setting.after:
            order.insert(order.index(setting.after) + 1, key)
    return {key: by_key[key] for key in order}


SETTINGS = _in_order(settings_of(RunConfig))
TABLES = tuple(key for key, setting in SETTINGS.items() if setting.kind is dict)
PER_DATASET = tuple(key for key, setting in SETTINGS.items() if setting.per_dataset)


class OrderedConfig(ConfigDict):
    """A ConfigDict that preserves insertion order, because the order of joints and cameras matters."""

    def __init__(
        self, initial_dictionary: Any = None, type_safe: bool = True, convert_dict: bool = True, **options: Any
    ) -> None:
        if type(initial_dictionary) is dict:  # nested tables too
            initial_dictionary = {
                key: OrderedConfig(value) if type(value) is dict else value for key, value in initial_dictionary.items()
            }
        super().__init__(initial_dictionary, type_safe, convert_dict, **{"sort_keys": False, **options})


def default_config() -> OrderedConfig:
    """Return all settings with their defaults, locked. None means "not set"; docs/configuration.md describes them."""
    config = OrderedConfig()
    for key, setting in SETTINGS.items():
        *sections, name = key.split(".")
        parent = config
        for section in sections:
            if section not in parent:
                parent[section] = OrderedConfig()
            parent = parent[section]
        if setting.kind is dict:
            parent[name] = OrderedConfig(setting.default)
        else:
            parent[name] = placeholder(setting.kind) if setting.optional else _plain(setting.default)
    return config.lock()


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to {"resume.ckpt": value, ...}; the tables in TABLES stay whole, as plain dicts."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, ConfigDict) and name not in TABLES
        flat |= flatten(value, f"{name}.") if is_section else {name: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    """Convert nested tables to plain dicts, preserving their order, and choices to strings."""
    if isinstance(value, ConfigDict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.value if isinstance(value, Choice) else value
