"""convert/*.py and scripts/bench/benchmark_convert.py as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_run

from wallx_jax.checkpoints.from_pytorch import convert_model
from wallx_jax.utils import hub

ROOT = Path(__file__).parents[2]


def run(*command) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.medium
def test_there_and_back(wallx_dir, tmp_path):
    done = run("convert/wall_oss.py", "--model", wallx_dir, "--output", tmp_path / "checkpoint")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'checkpoint'}\n"
    assert "100%" in done.stderr and "B/s" in done.stderr, "a progress bar in bytes"
    assert "WARNING" not in done.stderr and "warning" not in done.stderr
    done = run("convert/export.py", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "out")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'out'}\n"
    done = run("convert/verify.py", wallx_dir, tmp_path / "out")
    assert done.returncode == 0 and done.stdout.endswith("\nidentical\n")

    done = run("convert/export.py", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "vlm",
               "--layout", "qwen2_5_vl", "--dtype", "bfloat16", "--shard-gb", "0.00004")  # fmt: skip
    assert done.returncode == 0 and len(list((tmp_path / "vlm").glob("model-*.safetensors"))) > 1
    done = run("convert/verify.py", tmp_path / "vlm", wallx_dir)
    assert done.returncode == 1 and done.stdout.endswith("\nA and B differ\n")
    assert "only in B:\n  action_preprocessor.action_proj_back.weight" in done.stdout


@pytest.mark.medium
def test_qwen(tmp_path):
    model = tiny_run.write_model(tmp_path / "qwen", qwen=True)
    assert run("convert/qwen2_5_vl.py", "--model", model, "--output", tmp_path / "checkpoint").returncode == 0
    assert run("convert/verify.py", model, tmp_path / "checkpoint").stdout.endswith("\nidentical\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("wall_oss.py", "--model", "{nowhere}", "--output", "{out}"), "error: model folder .* does not exist"),
        (("export.py", "--checkpoint", "{nowhere}", "--output", "{out}"), "error: no checkpoint at"),
        (("verify.py", "{nowhere}", "{model}"), "error: model folder .* does not exist"),
        (("export.py", "--checkpoint", "{model}", "--output", "{out}"), "error: no complete checkpoint in"),
    ],
)
def test_mistakes_end_in_one_line(wallx_dir, tmp_path, command, message):
    places = {"nowhere": tmp_path / "nowhere", "out": tmp_path / "out", "model": wallx_dir}
    done = run(f"convert/{command[0]}", *(word.format(**places) for word in command[1:]))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert re.match(message, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_revision_reaches_the_hub(wallx_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "resolve", lambda *args, **options: asked.append((args, options)) or wallx_dir)
    convert_model("acme/wall", tmp_path / "checkpoint", has_action_head=True, revision="v1")
    assert asked == [(("acme/wall",), {"kind": "model", "revision": "v1"})]
    metadata = json.loads((tmp_path / "checkpoint" / "metadata" / "metadata.json").read_text())
    assert (metadata["source"]["model"], metadata["source"]["revision"]) == ("acme/wall", "v1")


@pytest.mark.slow
def test_benchmark(tmp_path):
    out = tmp_path / "figures.json"
    done = run("scripts/bench/benchmark_convert.py", "--preset", "tiny", "--folder", tmp_path, "--json", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures == json.loads(done.stdout) and figures["byte_identical"]
    assert figures["tensors"] == 125 and np.isclose(figures["gib"], 654e3 / 2**30, rtol=0.05)
    for part in ("convert", "export", "verify"):
        assert 0 < figures[part]["peak_rss_gib"] < 2 and figures[part]["seconds"] > 0
    assert list(tmp_path.iterdir()) == [out], "the folder is emptied"
