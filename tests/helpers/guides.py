"""README and guides as data: their code blocks, a place where what they say can be done, and who does it."""

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers import global_state

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CONFIG = re.compile(r"# (configs/\w+\.py)\n")  # first line of a Python block that the reader saves as a file

UPSTREAM = """
pretrained_wallx_path: x-square-robot/wall-oss-flow
save_path: runs/cabinet
num_training_steps: 64000000
num_epoch: 100
FSDP2: True
torch_compile: False
data: {lerobot_config: {repo_id: lerobot/aloha_mobile_cabinet}, action_horizon: 32}
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced blocks, in order."""
    return FENCED.findall(page.read_text())


def commands(block: str) -> list[str]:
    """The programs that a bash block starts. Comments and continued lines are resolved; of a batch script those lines
    are left out that are the shell's own."""
    lines = block.replace("\\\n", " ").splitlines()
    shell = ("#", "code=", "if ", "fi", "exit ", "    scontrol ")
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith(shell)]


def written_configs() -> dict[str, str]:
    """{configs/NAME.py: text} of the configuration files that the guides have the reader write."""
    texts = [text for page in PAGES for language, text in blocks(page) if language == "python"]
    return {match[1]: text for text in texts if (match := CONFIG.match(text))}


def furnish(folder: Path) -> Path:
    """Makes `folder` look like the repository to a command of the guides, with the files that they have one write."""
    for name in ("scripts", "convert", "wallx_jax", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()
    for file in (ROOT / "configs").glob("*.py"):
        (folder / "configs" / file.name).symlink_to(file)
    for name, text in written_configs().items():
        (folder / name).write_text(text)
    upstream = folder / "workspace/lerobot_example/config_qact.yml"
    upstream.parent.mkdir(parents=True)
    upstream.write_text(UPSTREAM)
    return folder


def run_program(words: Sequence[str]) -> None:
    """`python WORDS` in this process, with a program of ours: a file, or -m and a module. Ends as the program does."""
    name, *arguments = words[1:] if words[0] == "-m" else words
    file = ROOT / (f"{name.replace('.', '/')}.py" if words[0] == "-m" else name)
    with global_state.restored():
        sys.argv[:] = [name, *arguments]
        sys.path.insert(0, str(file.parent))
        runpy.run_path(str(file), run_name="__main__")
