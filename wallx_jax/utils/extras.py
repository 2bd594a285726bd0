"""What the extras of the package bring along, and the one line that says that they are missing."""

import importlib.util
import sys

# As in pyproject.toml, by the names that are imported.
PACKAGES = {"train": ("av", "grain", "matplotlib", "pyarrow", "tensorboardX"), "wandb": ("wandb",)}


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "wallx-jax[{extra}]"'


def require(extra: str, module: str, doc: str | None = None) -> None:
    """Called at the top of a module, before the imports that need an extra. Where it is not complete a command ends in
    one line, and its --help shows what it is for all the same.

    Args:
        module: the caller's __name__.
        doc: the caller's __doc__.

    Raises:
        ModuleNotFoundError: likewise in one line, where the module is imported.
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
    except (ImportError, ValueError):  # blocked; or imported without a specification
        return package in sys.modules and sys.modules[package] is not None
