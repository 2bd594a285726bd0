"""Check that the package's optional dependencies (extras) are installed, and report missing ones in one line."""

import importlib.util
import sys

# The same packages as in pyproject.toml, by import name.
PACKAGES = {"train": ("av", "grain", "matplotlib", "pyarrow", "tensorboardX"), "wandb": ("wandb",)}


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "wallx-jax[{extra}]"'


def require(extra: str, module: str, doc: str | None = None) -> None:
    """Require the packages of an extra; call this at the top of a module, before the imports that need them.

    If a package is missing, a command exits with a one-line error; its --help still prints `doc`.

    Args:
        extra: a key of PACKAGES.
        module: the caller's __name__.
        doc: the caller's __doc__, which --help prints.

    Raises:
        ModuleNotFoundError: a package is missing and the module is being imported rather than run.
    """
    missing = [package for package in PACKAGES[extra] if not _is_installed(package)]
    if not missing:
        return
    message = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: {install(extra)}"
    if module != "__main__":
        raise ModuleNotFoundError(message)
    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        print(f"{(doc or '').strip()}\n\n{message}")
        sys.exit(0)
    sys.exit(f"error: {message}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # import is blocked, or the module has no __spec__
        return package in sys.modules and sys.modules[package] is not None
