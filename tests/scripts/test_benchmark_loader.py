"""The loader benchmark: it runs on a dataset of its own, and its figures hang together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_measures_decoding_filling_and_the_cache(tmp_path):
    out = tmp_path / "figures.json"
    tiny = ["--episodes", "1", "--frames", "8", "--size", "96", "128", "--batch", "2", "--seconds", "0.2"]
    command = [sys.executable, "scripts/benchmark_loader.py", *tiny, "--workers", "0", "1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--json", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())
    assert json.loads(done.stdout) == figures
    assert figures["samples"] == 8 and figures["fill_samples_per_s"] > 0
    assert set(figures["ratio"]) == {"0", "1"}
    for workers, ratio in figures["ratio"].items():
        assert ratio == figures["cached_samples_per_s"][workers] / figures["decoded_samples_per_s"][workers]
        assert ratio > 1, "reading what is resized already beats decoding, even for tiny frames"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"], "temporary files are gone"
