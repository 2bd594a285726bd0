"""An installation without the extra "train": one line names it, and --help works."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from wallx_jax.utils import extras

ROOT = Path(__file__).parents[2]
# What every Python process imports before anything else: the packages are not there, in one way or another.
BLOCKS = {
    "None in sys.modules": "import sys\nsys.modules |= dict.fromkeys({packages})\n",
    "a finder that refuses": (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {packages}:\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
    ),
}
WITH_EXTRA = [
    f"scripts/{name}.py"
    for name in ("ablate", "check_dataset", "compute_norm_stats", "fake_inference", "inspect_batch",
                 "openloop_plot", "semantics", "vqa")
]  # fmt: skip
WITHOUT = [
    "scripts/parity.py",
    "convert/wall_oss.py",
    "convert/qwen2_5_vl.py",
    "convert/export.py",
    "convert/verify.py",
]


@pytest.fixture
def run(tmp_path):
    def run(*command: str, block: str = "None in sys.modules", packages=extras.PACKAGES["train"]):
        (tmp_path / "sitecustomize.py").write_text(BLOCKS[block].format(packages=tuple(packages)))
        paths = os.pathsep.join([str(tmp_path), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths}
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_packages_are_those_of_the_extra():
    with (ROOT / "pyproject.toml").open("rb") as file:
        groups = tomllib.load(file)["project"]["optional-dependencies"]
    for extra, packages in extras.PACKAGES.items():
        assert sorted(Requirement(line).name for line in groups[extra]) == sorted(packages)


@pytest.mark.parametrize("block", BLOCKS)
def test_training_without_the_extra(run, block):
    code, out, err = run("-m", "wallx_jax.train", "--config=configs/aloha.py", block=block)
    assert code == 1 and not out
    assert err == (
        'error: av, grain, matplotlib, pyarrow, tensorboardX are not installed: pip install "wallx-jax[train]"\n'
    )
    code, out, err = run("-m", "wallx_jax.train", "--help", block=block)
    assert code == 0 and not err and "python -m wallx_jax.train --config=configs/aloha.py" in out
    assert out.endswith('not installed: pip install "wallx-jax[train]"\n')


def test_one_package_alone_is_named(run):
    assert run("-m", "wallx_jax.train", packages=["pyarrow"])[2] == (
        'error: pyarrow is not installed: pip install "wallx-jax[train]"\n'
    )


@pytest.mark.parametrize("script", WITH_EXTRA)
def test_a_script_without_the_extra(run, script):
    code, out, err = run(script)
    assert (code, out) == (1, "") and err.startswith("error: av, grain") and len(err.splitlines()) == 1
    code, out, err = run(script, "--help")
    assert code == 0 and not err and f"python {script}" in out


@pytest.mark.parametrize("script", WITHOUT)
def test_what_the_core_does_needs_no_extra(run, script):
    code, out, err = run(script, "--help")
    assert code == 0 and "usage: " in out and "not installed" not in out + err


@pytest.mark.medium
def test_the_library_without_the_extra(run):
    assert run("-c", "import wallx_jax; wallx_jax.load_policy, wallx_jax.load_vlm, wallx_jax.load_params")[0] == 0
    code, _, err = run("-c", "import wallx_jax; wallx_jax.compute_stats")
    assert code == 1 and err.splitlines()[-1].endswith('not installed: pip install "wallx-jax[train]"')
