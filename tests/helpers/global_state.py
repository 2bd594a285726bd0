"""What a process has only once, such as its environment and its root logger: a test leaves it as it was."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags

OURS = ("JAX_", "XLA_", "HF_", "PYTHON", "WALLX_")  # other packages set variables of their own when they are imported
LOGGERS = ("root", "absl", "jax", "orbax", "wallx_jax")  # those of other packages get their levels when imported


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def _set_environment(values: dict[str, str]) -> None:
    for name in _environment().keys() - values.keys():
        if name.startswith(OURS):
            del os.environ[name]
    os.environ.update(values)


def _signal_handlers() -> dict[signal.Signals, Any]:
    """Without the alarm, by which pytest-timeout ends a test."""
    return {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGALRM}}


def _set_signal_handlers(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _log_levels() -> dict[str, int]:
    return {name: logging.getLogger(name).level for name in LOGGERS}


def _set_log_levels(levels: dict[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _log_handlers() -> list[logging.Handler]:
    """Without pytest's, which come and go with the phases of a test."""
    return [handler for handler in logging.root.handlers if not type(handler).__module__.startswith("_pytest.")]


def _set_log_handlers(handlers: list[logging.Handler]) -> None:
    pytests = [handler for handler in logging.root.handlers if handler not in _log_handlers()]
    logging.root.handlers[:] = handlers + pytests


def _set_jax_config(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


def _set_flags(names: set[str]) -> None:
    for name in set(flags.FLAGS) - names:
        delattr(flags.FLAGS, name)


# {what it is: (how to read it, how to set it)}
STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "environment": (_environment, _set_environment),
    "working directory": (os.getcwd, os.chdir),
    "sys.path": (lambda: sys.path[:], lambda value: sys.path.__setitem__(slice(None), value)),
    "sys.argv": (lambda: sys.argv[:], lambda value: sys.argv.__setitem__(slice(None), value)),
    "excepthooks": (
        lambda: (sys.excepthook, threading.excepthook),
        lambda value: (setattr(sys, "excepthook", value[0]), setattr(threading, "excepthook", value[1])),
    ),
    "signal handlers": (_signal_handlers, _set_signal_handlers),
    "log levels": (_log_levels, _set_log_levels),
    "handlers of the root logger": (_log_handlers, _set_log_handlers),
    "logging.disable": (lambda: logging.root.manager.disable, logging.disable),
    "jax.config": (lambda: dict(jax.config.values), _set_jax_config),
    "absl flags": (lambda: set(flags.FLAGS), _set_flags),
}


def snapshot() -> dict[str, Any]:
    return {name: read() for name, (read, _) in STATES.items()}


def restore(before: dict[str, Any]) -> list[str]:
    """Sets everything to what it was; returns what was different, a line each."""
    changes = []
    for name, (read, write) in STATES.items():
        now = read()
        if name == "jax.config":  # a module may bring settings of its own
            now = {key: now[key] for key in before[name]}
        if name == "environment":
            now = {key: value for key, value in now.items() if key in before[name] or key.startswith(OURS)}
        if now != before[name]:
            changes.append(f"{name}: {_difference(before[name], now)}")
            write(before[name])
    return changes


def _difference(before: Any, now: Any) -> str:
    if isinstance(now, dict):
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return ", ".join(f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in keys)
    return f"{before} -> {now}"


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Programs that a test runs in its own process set up logging and flags for themselves."""
    before = snapshot()
    try:
        yield
    finally:
        restore(before)
