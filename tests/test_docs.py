"""Commands in README and docs name files, flags and settings that exist. That they work is tested where they belong."""

import re
import shlex
from pathlib import Path

import pytest

from wallx_jax.config import default_config, flatten

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))


def commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line})


@pytest.mark.parametrize("command", commands())
def test_command_exists_and_is_tested(command):
    program, *words = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            assert re.search(rf"^{word.split('=')[0]} ?\??[:=]", makefile, re.MULTILINE), word
        return
    assert program == "python"
    module = words[0] == "-m"
    script = ROOT / (words[1].replace(".", "/") + ".py" if module else words[0])
    assert script.is_file()
    assert re.search(rf"\b{script.stem}\b", TESTS), "no test runs it"
    for word in words[1 + module :]:
        if word.startswith("--config."):
            assert word.removeprefix("--config.").split("=")[0] in flatten(default_config())
        elif word.startswith("--config="):
            assert (ROOT / word.removeprefix("--config=").split(":")[0]).is_file()
        elif word.startswith("--"):
            known = script.read_text() + (ROOT / "wallx_jax/evaluation/subject.py").read_text()
            known += (ROOT / "wallx_jax/command_line.py").read_text()
            assert f'"{word.split("=")[0]}"' in known or f'"{word[2:].split("=")[0]}"' in known, word
