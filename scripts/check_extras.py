"""Resolve every combination of the package's extras; fail if one brings in PyTorch or a second CUDA version.

    python scripts/check_extras.py [--python 3.11 3.12] [--json OUT]

Queries the package registry through uv, which must be installed; nothing is installed or built. Only the extras lerobot
and test may bring in PyTorch. Without it, the requested CUDA version must be the only one: a second one costs
gigabytes, and its cuDNN may be the one that gets loaded.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "wandb", "lerobot", "test-core")
ALL_OF_THEM = (("test",), ("wandb", "test"))  # test includes the others
ACCELERATORS = ("", "cuda12", "cuda13", "tpu")  # mutually exclusive
WITH_TORCH = {"lerobot", "test"}
PARALLEL = 4


def combinations() -> list[tuple[str, ...]]:
    """List every set of extras that differs in the packages it brings in."""
    subsets = (subset for count in range(len(EXTRAS) + 1) for subset in itertools.combinations(EXTRAS, count))
    chosen = itertools.chain(subsets, ALL_OF_THEM)
    return [(*subset, *filter(None, [device])) for subset in chosen for device in ACCELERATORS]


def resolve(extras: tuple[str, ...], python: str) -> dict[str, str]:
    """Return {package: version} that a fresh environment would get.

    Raises:
        RuntimeError: the extras cannot be resolved; the message is uv's.
    """
    command = [
        "uv",
        "pip",
        "compile",
        str(ROOT / "pyproject.toml"),
        "--python-version",
        python,
        "--no-python-downloads",
    ]
    command += ["--quiet", "--no-header", "--no-annotate", *(f"--extra={extra}" for extra in extras)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


def cuda_versions(packages: dict[str, str]) -> set[int]:
    """Return the major CUDA versions among NVIDIA's and JAX's packages; from 13 on, NVIDIA's names omit it."""
    found = set()
    for name in packages:
        if match := re.search(r"-cu(?:da)?(1\d)\b", name):
            found.add(int(match[1]))
        elif name.startswith("nvidia-cuda-runtime"):
            found.add(int(packages[name].split(".")[0]))
    return found


def problems(extras: tuple[str, ...], packages: dict[str, str]) -> list[str]:
    wanted = {int(extra.removeprefix("cuda")) for extra in extras if extra.startswith("cuda")}
    if WITH_TORCH & set(extras):
        return []
    found = []
    if torch := sorted({"torch", "torchvision", "lerobot"} & packages.keys()):
        found.append(f"{', '.join(torch)} comes along")
    if cuda_versions(packages) != wanted:
        found.append(f"CUDA {sorted(cuda_versions(packages))} instead of {sorted(wanted)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12"], help="versions of Python")
    parser.add_argument("--json", type=Path, help="also write what was resolved here")
    arguments = parser.parse_args()
    todo = [(python, extras) for python in arguments.python for extras in combinations()]
    failed, report = False, []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for (python, extras), resolved in zip(todo, pool.map(lambda x: _try(x[1], x[0]), todo), strict=True):
            name = f"python {python}, {','.join(extras) or 'no extra'}"
            if isinstance(resolved, str):
                failed = True
                print(f"FAIL {name}: {resolved}")
                continue
            found = problems(extras, resolved)
            failed |= bool(found)
            cuda = " and ".join(map(str, sorted(cuda_versions(resolved)))) or "none"
            torch = resolved.get("torch", "none")
            print(f"{'FAIL' if found else 'ok  '} {name}: {len(resolved)} packages, torch {torch}, CUDA {cuda}"
                  + "".join(f"; {problem}" for problem in found))  # fmt: skip
            report.append({"python": python, "extras": extras, "packages": resolved, "problems": found})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    sys.exit(int(failed))


def _try(extras: tuple[str, ...], python: str) -> dict[str, str] | str:
    try:
        return resolve(extras, python)
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    main()
