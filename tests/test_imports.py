"""Who may import whom, and that the deployable part stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wallx_jax

PACKAGE = Path(wallx_jax.__path__[0])

# From the bottom up: a module may import from its own layer and from those before it. Layers in one row are siblings.
LAYERS = (
    ("utils",),
    ("models.config",),
    ("config",),
    ("models",),
    ("weights", "data"),
    ("checkpoints", "dataset_check"),
    ("training", "inference"),
    ("evaluation",),
    ("train", "doctor", ""),
)
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
    return module == prefix or (bool(prefix) and module.startswith(f"{prefix}."))


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


def layer(module: str) -> tuple[int, str]:
    """Height and name of the layer that a module belongs to; the longest name that covers it counts."""
    found = [(len(name), height, name) for height, row in enumerate(LAYERS) for name in row if covers(name, module)]
    assert found, f"{module} is in no layer"
    _, height, name = max(found)
    return height, name


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    files = modules()
    height, own = layer(module)
    for name in imported(files[module]):
        target = name.removeprefix("wallx_jax.")
        if name.startswith("wallx_jax.") and target in files and files[target].name != "__init__.py":
            below, other = layer(target)
            assert own == other or below < height, f"{module} must not import {target}"


@pytest.mark.parametrize("module", modules())
def test_nothing_imports_torch(module):
    heavy = {name.split(".")[0] for name in imported(modules()[module])} & set(HEAVY)
    assert not heavy, f"{module} imports {heavy}"


@pytest.mark.medium
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
