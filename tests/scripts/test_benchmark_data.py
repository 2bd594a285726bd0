"""The benchmarks of the data pipeline: they run on datasets of their own, and their figures hang together."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--frames", "8", "--size", "96", "128", "--batch", "2", "--seconds", "0.2")

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def figures_of(script: str, folder: Path, *arguments: str) -> dict:
    out = folder / "figures.json"
    command = [sys.executable, f"scripts/{script}", *arguments, "--folder", str(folder), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json"], "temporary files are gone"
    figures = json.loads(out.read_text())
    assert json.loads(done.stdout) == figures
    return figures


def test_decoding_filling_and_the_cache(tmp_path):
    figures = figures_of("benchmark_loader.py", tmp_path, *TINY, "--episodes", "1", "--workers", "0", "1")
    assert figures["samples"] == 8 and figures["fill_samples_per_s"] > 0
    assert set(figures["ratio"]) == {"0", "1"}
    for workers, ratio in figures["ratio"].items():
        assert ratio == figures["cached_samples_per_s"][workers] / figures["decoded_samples_per_s"][workers]
        assert ratio > 1, "reading what is resized already beats decoding, even for tiny frames"


@pytest.mark.skipif(not importlib.util.find_spec("lerobot"), reason="lerobot is not installed")
def test_beside_lerobots_loader(tmp_path):
    figures = figures_of(
        "benchmark_loader.py", tmp_path, *TINY, "--episodes", "2", "--repeat", "2", "--compare-lerobot"
    )
    assert figures["samples"] == 2 * 2 * 8
    speeds = figures["lerobot_backends_samples_per_s"]
    assert speeds[figures["lerobot_backend"]] == max(speed for speed in speeds.values() if speed)
    assert all(ms > 0 for ms in figures["per_sample"].values())
    for measured in (figures, figures["one_process"]):
        for suffix, name in (("", "lerobot_resized"), ("_unresized", "lerobot")):
            ours, its = measured["wallx_jax"], measured[name]
            assert measured[f"ratio_samples_per_s{suffix}"] == ours["samples_per_s"] / its["samples_per_s"]
            ratio = its["cpu_ms_per_sample"] / ours["cpu_ms_per_sample"]
            assert measured[f"ratio_cpu_per_sample{suffix}"] == ratio
        assert all(len(rounds) == 3 for rounds in measured["rounds"].values())
    assert figures["lerobot"]["worker_mib"] > figures["wallx_jax"]["worker_mib"] > 0, "ours does without torch"


def test_opening_a_dataset(tmp_path):
    sizes = ("--frames", "3000", "--episode", "50", "--files", "3", "--workers", "2", "--samples", "20")
    figures = figures_of("bench/benchmark_open.py", tmp_path, *sizes)
    assert (figures["frames"], figures["episodes"]) == (3000, 60)
    assert all(figures[name] > 0 for name in ("read_info_s", "open_s", "first_sample_s", "convert_all_s"))
    assert len(figures["workers"]) == 2 and all(worker["samples_per_s"] > 0 for worker in figures["workers"])
