"""The benchmark command: it runs, and its figures hang together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(tmp_path, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path / "figures.json"
    command = [sys.executable, "scripts/benchmark.py", "--preset", "tiny", "--json", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    figures = json.loads(out.read_text()) if out.exists() else {}
    assert not figures or json.loads(done.stdout) == figures
    return done, figures


@pytest.mark.slow
def test_times_a_step_and_a_chunk(tmp_path):
    done, figures = benchmark(tmp_path, "--repeats", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    inference, train = figures["inference"], figures["train"]
    parts = inference["vision_ms"] + inference["prefix_ms"] + 10 * inference["denoise_step_ms"]
    assert 0.3 * parts < inference["chunk_ms"] < 3 * parts
    assert inference["denoise_step_over_prefix"] == inference["denoise_step_ms"] / inference["prefix_ms"]
    assert inference["token_ms"] > 0 and inference["chunk_compile_s"] > 0
    assert train["tokens_per_s"] == pytest.approx(285 * train["samples_per_s"])
    assert train["compile_s"] > 0 and figures["peak_memory_gib"] > 0


@pytest.mark.slow
def test_plans_the_memory_of_several_devices(tmp_path):
    one, two = (benchmark(tmp_path, "--aot", "--devices", n)[1] for n in ("1", "2"))
    assert two["devices"] == 2 and 0 < two["arguments_gib"] < one["arguments_gib"]
    assert two["per_device_gib"] >= two["arguments_gib"] + two["temporary_gib"] > 0


@pytest.mark.medium
def test_says_how_to_set_the_reference_up(tmp_path):
    done, _ = benchmark(tmp_path, "--compare-torch", "--torch-python", str(tmp_path / "python"))
    assert done.returncode == 1 and "make torch-reference" in done.stderr and "Traceback" not in done.stderr
