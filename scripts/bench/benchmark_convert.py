"""Convert a random model directory to a checkpoint and back; measure peak memory and speed relative to the disk's.

    python scripts/bench/benchmark_convert.py --preset wall_oss_3b --folder /path/with/30GB [--json OUT]

Creates the directory (Wall-X's tensors in bfloat16, including statistics), runs convert/wall_oss.py, convert/export.py
and convert/verify.py as subprocesses, and compares the exported file with the original byte for byte. The disk's rate
is measured on one file of the same size, written and synced, then read after dropping its cached pages. Prints JSON and
deletes its files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from wallx_jax.models.config import PRESETS
from wallx_jax.utils.files import write_text
from wallx_jax.weights import names
from wallx_jax.weights.export import write_json
from wallx_jax.weights.safetensors_io import SINGLE, open_tensors, safetensors_file

CONVERT = Path(__file__).resolve().parents[2] / "convert"
BLOCK = 64 << 20  # bytes
ROBOT = "x2_normal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="wall_oss_3b")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = json.dumps(measure(arguments.preset, Path(folder)), indent=2)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")


def measure(preset: str, folder: Path) -> dict:
    model, checkpoint, exported = folder / "model", folder / "checkpoint", folder / "exported"
    write_model(model, preset)
    sizes = [info.stop - info.start for info in open_tensors(model).info.values()]
    gib = sum(sizes) / 2**30
    figures = {"preset": preset, "tensors": len(sizes), "gib": gib, "largest_tensor_gib": max(sizes) / 2**30}
    figures["disk"] = disk_rates(folder / "plain", sum(sizes))
    for name, command in {
        "convert": ["wall_oss.py", "--model", model, "--output", checkpoint],
        "export": ["export.py", "--checkpoint", checkpoint, "--output", exported],
        "verify": ["verify.py", model, exported],
    }.items():
        for file in folder.rglob("*"):
            drop_pages(file)
        seconds, peak = run(command)
        figures[name] = {"seconds": seconds, "gib_per_s": gib / seconds, "peak_rss_gib": peak}
    figures["byte_identical"] = same_bytes(model / SINGLE, exported / SINGLE)
    return figures


def write_model(folder: Path, preset: str) -> None:
    """Write a Wall-X directory of random bfloat16 tensors, in upstream's layout."""
    config = PRESETS[preset].replace(numerics={"param_dtype": "bfloat16"})
    shapes = {name: slot.shape for name, slot in names.expand(config).items()}
    for kind, width in (("action", config.action.action_dim), ("propri", config.action.state_dim)):
        for stat in ("min", "delta"):
            shapes[f"action_preprocessor.normalizer_{kind}.{stat}.{ROBOT}"] = (width,)
    specs = {name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    folder.mkdir()
    with safetensors_file(folder / SINGLE, specs) as write:
        for name, shape in shapes.items():
            # Sign, mantissa and two bits of the exponent are random: magnitudes from 2^-7 to 2^-3.
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            bits &= 0x81FF
            bits |= 0x3C00
            write(name, bits.view(ml_dtypes.bfloat16))
    hf = config.to_hf()
    del hf["wallx_jax"]  # as published
    write_json(folder / "config.json", hf)


def disk_rates(file: Path, size: int) -> dict:
    """Measure the rates of writing (synced) and reading one file block by block, in GiB/s."""
    block = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8).data
    start = time.perf_counter()
    with open(file, "wb") as out:
        for _ in range(0, size, BLOCK):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    written = time.perf_counter() - start
    drop_pages(file)
    start = time.perf_counter()
    with open(file, "rb", buffering=0) as source:
        while source.readinto(bytearray(BLOCK)):
            pass
    read = time.perf_counter() - start
    file.unlink()
    return {"write_gib_per_s": size / 2**30 / written, "read_gib_per_s": size / 2**30 / read}


def drop_pages(file: Path) -> None:
    """Drop a file's cached pages, so that the next read goes to the disk."""
    if file.is_file():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list) -> tuple[float, float]:
    """Run a command in convert/; return (seconds, peak resident memory in GiB)."""
    start = time.perf_counter()
    script, *arguments = map(str, command)
    child = subprocess.Popen([sys.executable, CONVERT / script, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{script} failed with exit code {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def same_bytes(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as first, open(b, "rb") as second:
        while block := first.read(BLOCK):
            if block != second.read(BLOCK):
                return False
    return True


if __name__ == "__main__":
    main()
