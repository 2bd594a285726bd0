"""Who may import whom, and that the deployable part stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wallx_jax

PACKAGE = Path(wallx_jax.__path__[0])

# Part of the package, by prefix (the longest counts) -> the prefixes that it may import, besides itself.
SETTINGS = {
    "tree", "switches", "signals", "files", "extras", "robots", "vectors", "ranges", "config", "run_config",
    "command_line", "upstream_yaml", "hub",
}  # fmt: skip
DATASET_CHECKS = {
    f"evaluation.{name}" for name in ("preflight", "dataset_check", "findings", "frames", "signals", "videos")
}
ALLOWED = {
    "": {"extras"},
    "extras": set(),
    "tree": set(),
    "switches": set(),
    "signals": set(),
    "hub": set(),
    "files": set(),
    "robots": set(),
    "devices": set(),
    "compile_cache": set(),
    "run_config": {"models.config", "data.template"},
    "vectors": set(),
    "ranges": set(),
    "config": {"run_config", "robots", "vectors", "ranges", "models.config", "data.template"},
    "command_line": {"config"},
    "upstream_yaml": {"config", "files"},
    "models": {"tree", "switches", "data.batch"},
    "weights": {"tree", "hub", "files", "models"},
    "data.batch": set(),
    "data.template": set(),
    "data": {"tree", "hub", "files", "extras", "config", "run_config", "robots", "vectors", "ranges", "models.config"},
    "training": SETTINGS | {"models", "weights", "data"},
    # Serving a checkpoint needs to read it, but nothing else of training.
    "inference": SETTINGS | {"models", "weights", "data", "training.checkpoint", "training.checkpoint_dir"},
    "conversion": SETTINGS
    | {
        "models",
        "weights",
        "data",
        "training.checkpoint",
        "training.checkpoint_dir",
        "training.checkpoint_stream",
        "training.failed_save",
    },
    "evaluation": SETTINGS | {"models", "weights", "data", "training", "inference"},
    # Of the dataset alone, so that training can ask them.
    **{name: SETTINGS | DATASET_CHECKS | {"data"} for name in DATASET_CHECKS},
    "serving": SETTINGS | {"models.config", "data", "inference"},
    "train": SETTINGS
    | {"models", "weights", "data", "training", "inference", "devices", "compile_cache", "evaluation.preflight"},
    "doctor": {"config", "extras", "files", "devices", "compile_cache", "training.checkup", "training.parts"},
}
HEAVY = ("torch", "torchvision", "lerobot")


def modules() -> dict[str, Path]:
    """{"models.config": file}, all modules of the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix(".__init__")
        .removesuffix("__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def covers(prefix: str, module: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    files = modules()
    part = max((prefix for prefix in ALLOWED if covers(prefix, module)), key=len, default=None)
    assert part is not None, f"{module}: say in ALLOWED what it may import"
    for name in imported(files[module]):
        target = name.removeprefix("wallx_jax.")
        if name.startswith("wallx_jax.") and target in files and files[target].name != "__init__.py":
            assert any(covers(prefix, target) for prefix in {part, *ALLOWED[part]}), (
                f"{module} must not import {target}"
            )


@pytest.mark.parametrize("module", modules())
def test_nothing_imports_torch(module):
    heavy = {name.split(".")[0] for name in imported(modules()[module])} & set(HEAVY)
    assert not heavy, f"{module} imports {heavy}"


def test_no_dependency_brings_torch_along():
    """Importing every module loads no torch, where it is installed."""
    names = [f"wallx_jax.{name}".rstrip(".") for name in modules()]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
