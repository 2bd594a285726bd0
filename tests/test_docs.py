"""README and guides stay true: each command is taken by its own parser, tables, quoted messages, figures and links are
those of the source. tests/e2e/test_guides.py does what the guides say."""

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app, flags
from helpers import guides

from wallx_jax.config import default_config, flatten, resolve
from wallx_jax.config.upstream_yaml import MAPPED, WITHOUT_MEANING

ROOT, DOCS = guides.ROOT, guides.ROOT / "docs"
TESTS = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py") if "docs" not in file.stem)
BLOCKS = [(language, text) for page in guides.PAGES for language, text in guides.blocks(page)]
COMMANDS = sorted({c for language, text in BLOCKS if language == "bash" for c in guides.commands(text)})


class Parsed(Exception):
    """The arguments were taken; what the program would do with them is not wanted."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return guides.furnish(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def only_parsing(monkeypatch, restored_state):
    """Programs end behind their parser: argparse's, or absl's with a configuration, which has to be without errors."""
    real = argparse.ArgumentParser.parse_args

    def parse(*arguments, **options):
        real(*arguments, **options)
        raise Parsed

    def run(main, flags_parser):
        flags_parser(sys.argv)
        if flags.FLAGS.config is not None:  # some need none
            resolve(flags.FLAGS.config)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(app, "run", run)


def skip_other_releases(module: str) -> None:
    """Skips a module of lerobot that the installed release has under another name, which the guides must have too."""
    pytest.importorskip("lerobot")
    names = re.findall(rf"lerobot\.[\w.]*\b{module.split('.')[-1]}\b", " ".join(COMMANDS))
    (installed,) = {name for name in names if is_installed(name)}
    if module != installed:
        pytest.skip(f"another release of lerobot has {module}")


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it
        return False


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("lerobot-")])
def test_arguments_are_taken(command, workplace, only_parsing, monkeypatch):
    monkeypatch.chdir(workplace)
    program, *words = shlex.split(command)
    while "=" in program:
        assert re.match("(JAX|CUDA)_", program), f"{program}: is that a variable that anybody reads?"
        program, *words = words
    if program in ("srun", "mpirun"):
        words = words[words.index("python") + 1 :]
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            assert re.search(rf"^{word.split('=')[0]} ?\??[:=]", makefile, re.MULTILINE), word
        return
    elif program == "tensorboard":
        assert words[0] == "--logdir" and len(words) == 2
        return
    else:
        assert program == "python", f"nobody checks the arguments of {program}"
    name = words[words[0] == "-m"]
    with pytest.raises(Parsed):
        if name.startswith("lerobot."):
            skip_other_releases(name)
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(name, run_name="__main__")
        else:
            assert re.search(rf"\b{re.split('[./]', name.removesuffix('.py'))[-1]}\b", TESTS), "no test runs it"
            guides.run_program(words)


@pytest.mark.slow
def test_arguments_of_lerobots_programs_are_taken(only_parsing, monkeypatch):
    """One test for all of them: what takes long is to import lerobot."""
    pytest.importorskip("lerobot")
    import draccus

    real = draccus.parse

    def parse(*arguments, **options):
        real(*arguments, **options)
        raise Parsed

    for module in (draccus, draccus.argparsing):
        monkeypatch.setattr(module, "parse", parse)
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("lerobot-")]
    assert len(commands) > 5
    for command in commands:
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command[0])
        if command != ["lerobot-find-port"]:  # it takes none, and asks for a cable to be pulled
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(Parsed):
                entry.load()()


def test_lerobot_has_the_model_class_that_is_named():
    """Its module needs lerobot's `wallx` extra, so this block is not run; test_guides runs all others."""
    (block,) = [text for _, text in BLOCKS if "modeling_wall_x" in text]
    (line,) = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    package = Path(pytest.importorskip("lerobot").__file__).parents[1]
    source = ast.parse((package / f"{line.module.replace('.', '/')}.py").read_text())
    (found,) = [item for item in source.body if isinstance(item, ast.ClassDef) and item.name == line.names[0].name]
    assert any(isinstance(item, ast.FunctionDef) and item.name == "from_pretrained" for item in found.body)


@pytest.mark.parametrize(("code", "requeues"), [(0, False), (1, False), (75, True)])
def test_the_batch_script_asks_to_be_started_again_after_an_interruption_alone(code, requeues, tmp_path):
    (script,) = [text for _, text in BLOCKS if text.startswith("#!/bin/bash")]
    for program, body in (("srun", f'echo "$@" > srun; exit {code}'), ("scontrol", 'echo "$@" > scontrol')):
        (tmp_path / "bin").mkdir(exist_ok=True)
        file = tmp_path / "bin" / program
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code and not done.stderr
    assert "--config.resume.ckpt=latest" in (tmp_path / "srun").read_text()
    asked = (tmp_path / "scontrol").read_text().split() if (tmp_path / "scontrol").exists() else []
    assert asked == (["requeue", "7"] if requeues else [])


def rows(page: Path, columns: int) -> list[list[str]]:
    """Cells of the table rows of a page that have so many columns and a code span in the first."""
    lines = [line.strip("|").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


def test_upstreams_keys_are_all_there():
    page, defaults = DOCS / "from_upstream_yaml.md", flatten(default_config())
    mapped = {key.strip("`"): (target.strip("`"), default) for key, target, default, _ in rows(page, 4)}
    assert {key: target for key, (target, _) in mapped.items()} == MAPPED
    for key, (target, shown) in mapped.items():
        value = defaults[target]
        if target == "resolution":
            assert set(value.values()) == {256} and shown == "256 for every view"
        else:
            assert shown == ("–" if value is None else "empty" if value in ({}, ()) else f"`{value}`"), key
    assert {key.strip("`"): reason for key, reason in rows(page, 2)} == WITHOUT_MEANING


def messages() -> str:
    """All strings of the sources, a line each; adjacent literals are one, a formatted value is "…"."""
    found = []
    for file in [path for name in ("wallx_jax", "scripts", "convert") for path in (ROOT / name).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_are_in_the_source():
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 25
    strings = messages()
    for heading in headings:
        fragment = re.fullmatch("`(.*)`", heading)
        assert fragment, f"{heading!r} is no message"
        assert fragment[1].strip("…") in strings, fragment[1]


def test_memory_figures_are_those_that_were_worked_out():
    figures = re.findall(r"\d+\.\d+", (DOCS / "performance.md").read_text())
    for page in (ROOT / "README.md", DOCS / "your_robot.md", DOCS / "multi_node.md", DOCS / "pytorch.md"):
        lines = [x for x in page.read_text().splitlines() if "GiB" in x or re.match(r"\| (everything|adapters)", x)]
        for figure in re.findall(r"(?<![\d=.])\d+\.\d+", " ".join(lines)):
            assert figure in figures, f"{page.name}: {figure}"


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def missing_paths(text: str) -> list[str]:
    """Modules, pages and `folders/` that a text names and that do not exist.

    Paths are relative to the repository or to the package; a bare file name may also be in the folder named last.
    """
    folder, missing = ROOT, []
    for name in re.findall(r"[\w/]+\.(?:py|md)\b|(?<=`)[\w/]+/(?=`)", text):
        places = [base / name for base in (ROOT, ROOT / "wallx_jax", *([folder] if "/" not in name else []))]
        if found := [place for place in places if place.exists()]:
            folder = found[0] if name.endswith("/") else found[0].parent if "/" in name else folder
        else:
            missing.append(name)
    return missing


def test_architecture_names_existing_files():
    text = (DOCS / "architecture.md").read_text()
    assert not missing_paths(text)
    assert missing_paths(text.replace("models/rope.py", "models/rotary.py")) == ["models/rotary.py"]


@pytest.mark.parametrize("page", [*guides.PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, name in re.findall(r"(?<!!)\[[^]]*\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            file = page.parent / target if target else page
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if name else []
            assert not name or name in map(anchor, headings), f"{target}#{name}"
