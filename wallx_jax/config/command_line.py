"""Parse `--config=FILE --config.key=value --workdir=DIR` with one-line errors, and render a configuration as text."""

import ast
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from wallx_jax.config.defaults import PER_DATASET, SETTINGS, TABLES, default_config, flatten
from wallx_jax.config.validate import REFERENCE
from wallx_jax.utils.errors import ConfigError, UserError

flags.disclaim_key_flags()  # so that the launched program's --help lists --config and --workdir
_ORDINARY: list[str] = []  # the arguments that ml_collections parses: all but settings in tables


class CommandLineError(UserError, ValueError):
    """An invalid command line, described in one line."""


def launch(main: Callable[[ConfigDict], None], needs_config: bool = True) -> None:
    """Parse this process's command line and run `main(config)`.

    If the command line is invalid, or `main` raises a CommandLineError or ConfigError, print only the message and exit
    with code 2.

    Args:
        main: called with the configuration.
        needs_config: whether --config is required; if not, `main` may be called with None.
    """
    values = flags.FLAGS
    use_any_terminal()
    if "config" not in values:
        text = "File, e.g. configs/aloha.py; --config.key=value changes one of its settings."
        config_flags.DEFINE_config_file("config", lock_config=True, help_string=text, sys_argv=_ORDINARY)
        flags.DEFINE_string("workdir", None, "Output directory; replaces config.save_path.")
    configs: list[ConfigDict | None] = []

    def parse(argv: Sequence[str]) -> Sequence[str]:
        if {"-h", "-help", "--help"} & set(argv[1:]):
            app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
        try:
            config, rest = parse_config(argv, values, needs_config)
        except CommandLineError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        configs.append(config)
        return rest

    def run(argv: Sequence[str]) -> None:
        try:
            main(configs[0])
        except (CommandLineError, ConfigError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(run, flags_parser=parse)


def parse_config(
    argv: Sequence[str], values: flags.FlagValues, needs_config: bool = True
) -> tuple[ConfigDict | None, Sequence[str]]:
    """Parse a command line.

    Args:
        argv: command line, beginning with the program's name.
        values: flags to parse into.
        needs_config: whether --config is required.

    Returns:
        The configuration (None if --config is neither given nor required), and the remaining arguments.

    Raises:
        CommandLineError: an unknown key, a wrong type, a configuration file that fails, or an unexpected argument.
    """
    try:
        argv = values.read_flags_from_files(argv, force_gnu=False)
        _ORDINARY[:], in_tables = _without_tables(argv)
        rest = values(_ORDINARY)
        config = values.config
        if config is None and needs_config:
            raise CommandLineError("which configuration? Add --config=FILE, e.g. --config=configs/aloha.py")
        if config is not None and not isinstance(config, ConfigDict):
            getattr(config, "lock", None)  # a placeholder for a file that failed to load: any access raises the cause
            raise CommandLineError(f"get_config() returned {type(config).__name__}; return a changed default_config()")
        for setting in in_tables:
            _set_in_table(config, *setting)
    except CommandLineError:
        raise
    except Exception as error:  # absl, ml_collections and the user's file may raise anything
        raise CommandLineError(explain(error, argv)) from error
    if rest[1:]:
        raise CommandLineError(f"do not know what {rest[1]!r} is; settings are written --config.key=value")
    if config is not None and values.workdir is not None:
        config.save_path = values.workdir
    return config, rest


def explain(error: Exception, argv: Sequence[str]) -> str:
    """Describe an exception from parsing the command line in one line, with the nearest known key."""
    settings = _settings(argv)
    for argument, key in settings:
        if key not in SETTINGS and _table(key) is None:
            return f"{argument}: there is no setting {key!r}{_nearest_key(key)}"
    if isinstance(error, OSError) and "Failed loading config file" in str(error):
        return f"no such configuration file: {_config_file(argv)}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # ml_collections puts the configuration file's whole traceback into the message; its last line has the cause.
    last = lines[-1] if lines else type(error).__name__
    file = _config_file(argv)
    if own := re.findall(rf'File "[^"]*{re.escape(Path(file).name)}", line (\d+)', text):
        last = f"{file}, line {own[-1]}: " + re.sub(r"^[\w.]+(Error|Exception): ", "", last)
    elif isinstance(error, flags.Error):
        return " ".join(lines).removesuffix(".").replace("flag --config.", "--config.")
    unknown = re.search(r'Key "([^"]+)" does not exist', text)
    if unknown:
        return f"the configuration sets {unknown[1]!r}: there is no such setting{_nearest_key(unknown[1])}"
    return re.sub(r"^\w+(Error|Exception): ", "", last)


def _settings(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return (argument, key) for each `--config.key`."""
    matches = [re.fullmatch(r"--?(?:no)?config\.([^=]+)(=.*)?", argument, re.DOTALL) for argument in argv[1:]]
    return [(match[0], match[1]) for match in matches if match]


def _table(key: str) -> str | None:
    """Return the table that `key` names or belongs to, if any."""
    return next((table for table in TABLES if f"{key}.".startswith(f"{table}.")), None)


def _without_tables(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    """Split off settings in tables, which may add names to the configuration; ml_collections only accepts known keys.

    Returns:
        The remaining command line, and (argument, table, key, value as text) for each setting in a table.
    """
    ordinary, in_tables, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        table = _table(match[1]) if match else None
        if match is None or table is None:
            ordinary.append(argument)
            continue
        if match[2] is None and (not rest or rest[0].startswith("-")):
            raise CommandLineError(f"{argument}: the value is missing; write {argument}=VALUE")
        in_tables.append((argument, table, match[1], rest.pop(0) if match[2] is None else match[2]))
    return ordinary, in_tables


def _set_in_table(config: ConfigDict, argument: str, table: str, key: str, text: str) -> None:
    """Replace a whole table, or set one of its entries, which may be new."""
    inside = key[len(table) + 1 :]
    names = inside.split(".") if table == "datasets" else [inside]
    value = text if _takes_text(table, names) else _literal(text)
    content: Any = value
    if inside:
        content = entry = flatten(config)[table]
        for name in names[:-1]:
            entry = entry.setdefault(name, {})
            if not isinstance(entry, dict):
                raise CommandLineError(f"{argument}: {name!r} is {entry!r}, and has no entries")
        entry[names[-1]] = value
    if not isinstance(content, dict):
        raise CommandLineError(
            f"{argument}: not a table; write --config.{table}='{{\"NAME\": VALUE, ...}}', or an entry of it as "
            f"--config.{table}.NAME=VALUE"
        )
    *parents, last = table.split(".")
    for parent in parents:
        config = config[parent]
    try:
        config[last] = content
    except ValueError:  # ConfigDict rejects only names with dots
        raise CommandLineError(f"{argument}: a name has a dot; use names without dots") from None


def _takes_text(table: str, names: list[str]) -> bool:
    """Return whether an entry is always a string, even if it looks like a number."""
    if table == "datasets":
        *parents, last = names
        return "camera_views" in parents or (last in PER_DATASET and SETTINGS[last].kind is str)
    return bool(names[0]) and table in ("camera_views", "prompt.view_names")


def _literal(text: str) -> Any:
    """Parse a Python literal, as ml_collections parses tuples; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def use_any_terminal() -> None:
    """Make stdout escape characters that its encoding lacks: in a C locale, printing a name may fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def render(config: ConfigDict) -> str:
    """Render a configuration as sorted YAML, one `key: value` per line, with keys as in `--config.key`.

    A value that differs from its default is marked with `# * default: VALUE`.
    """
    defaults = flatten(default_config())
    lines = []
    for key, value in sorted(flatten(config).items()):
        changed = value != defaults.get(key) or (key in TABLES and list(value) != list(defaults[key]))
        lines.append(f"{key}: {_yaml(value)}" + (f"  # * default: {_yaml(defaults.get(key))}" if changed else ""))
    return "\n".join(lines) + "\n"


def _config_file(argv: Sequence[str]) -> str:
    joined = "\n".join(argv)
    match = re.search(r"^--?config[=\n](.*)$", joined, re.MULTILINE)
    return match[1].split(":")[0] if match else "?"


def _yaml(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(plain, Dumper=_OneLine, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


class _OneLine(yaml.SafeDumper):
    """YAML dumper that escapes line breaks in strings, so that each value takes one line."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_OneLine.add_representer(str, _OneLine.represent_str)


def _nearest_key(key: str) -> str:
    """Suggest the nearest key, comparing whole keys, then last components (`remat` suggests `numerics.remat`)."""
    last = {name.rsplit(".", 1)[-1]: name for name in SETTINGS}
    close = difflib.get_close_matches(key, SETTINGS, 1, 0.5) or [
        last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.5)
    ]
    return f", did you mean --config.{close[0]}?" if close else REFERENCE
