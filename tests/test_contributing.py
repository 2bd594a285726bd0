"""The commands of CONTRIBUTING.md: their targets, tests and options exist."""

import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import guides

PAGE = guides.ROOT / "CONTRIBUTING.md"
COMMANDS = [c for language, text in guides.blocks(PAGE) if language == "bash" for c in guides.commands(text)]
TESTS = [command for command in COMMANDS if command.startswith(".venv/bin/python -m pytest ")]
TARGETS = [command for command in COMMANDS if command.startswith("make ")]
TOOLS = [command for command in COMMANDS if command not in TESTS + TARGETS]


@pytest.mark.medium
@pytest.mark.parametrize("command", TESTS)
def test_tests_are_found(command):
    arguments = shlex.split(command)[3:]
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    done = subprocess.run(collect, cwd=guides.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("command", TARGETS)
def test_make_knows_the_target(command, tmp_path):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=guides.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ("pytest" in done.stdout or "ruff" in done.stdout), done.stderr


def test_the_linters_are_installed_with_the_package():
    declared = (guides.ROOT / "pyproject.toml").read_text()
    assert {command.split()[0].removeprefix(".venv/bin/") for command in TOOLS} == {"ruff", "mypy"}
    assert all(f'"{tool}>=' in declared for tool in ("ruff", "mypy"))


def test_marks_are_those_of_the_configuration(pytestconfig):
    marks = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert {"medium", "slow", "multiprocess"} <= marks
    assert all(f"`{mark}`" in PAGE.read_text() for mark in ("medium", "slow", "multiprocess"))
