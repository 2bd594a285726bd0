"""A CPU in place of the accelerator that was asked for is an error with a remedy."""

import os
import subprocess
import sys

import jax
import pytest

from wallx_jax.utils import devices
from wallx_jax.utils.devices import DeviceError


@pytest.fixture
def platforms(monkeypatch):
    """Sets what JAX_PLATFORMS says; the backend that has started is the CPU."""
    jax.devices()
    before = jax.config.jax_platforms
    yield lambda value: jax.config.update("jax_platforms", value)
    jax.config.update("jax_platforms", before)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA H100", "NVIDIA H100"])


def test_the_cpu_is_fine_where_nothing_else_is(platforms, monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: [])
    platforms(None)
    assert devices.require(None) == devices.require("cpu") == "cpu"


def test_the_cpu_is_fine_where_it_was_asked_for(platforms, gpu):
    platforms("cpu")
    assert devices.require(None) == "cpu"
    platforms(None)
    assert devices.require("cpu") == "cpu"


def test_an_unused_gpu_is_refused(platforms, gpu, monkeypatch):
    platforms(None)
    monkeypatch.setattr(devices, "cuda_plugins", lambda: {})
    with pytest.raises(DeviceError, match=r"2 x NVIDIA H100.*pip install 'jax\[cuda12\]'.*platform=cpu") as caught:
        devices.require(None)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(devices, "cuda_plugins", lambda: {"jax-cuda12-plugin": "0.1.0"})
    with pytest.raises(DeviceError, match=r"jax-cuda12-plugin 0\.1\.0 with jaxlib .* does not start \(.+\)"):
        devices.require(None)


@pytest.mark.parametrize("asked", ["gpu", "tpu"])
def test_what_was_asked_for_is_not_there(platforms, asked, monkeypatch):
    platforms(None)
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: [])
    with pytest.raises(DeviceError, match=rf"platform = '{asked}' asks for the {asked.upper()}, but JAX uses the CPU"):
        devices.require(asked)


def test_the_environment_counts_as_asking(tmp_path):
    """In a process of its own, where JAX has not started: JAX's own refusal becomes one line."""
    code = (
        "from wallx_jax.utils import devices\n"
        "try:\n    devices.require(None)\nexcept devices.DeviceError as e:\n    print(e)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("JAX_PLATFORMS=cuda") and ("jax[cuda12]" in line or "nvidia-smi" in line)


def test_gpus_are_found_in_proc_and_hidden_by_the_environment(tmp_path, monkeypatch):
    for n in range(2):
        (tmp_path / f"gpus/{n}").mkdir(parents=True)
        (tmp_path / f"gpus/{n}/information").write_text(f"Model: \t\t NVIDIA H100\nIRQ:   {n}\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.nvidia_gpus(tmp_path) == ["NVIDIA H100", "NVIDIA H100"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.nvidia_gpus(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "found"),
    [("echo NVIDIA L40S", ["NVIDIA L40S"]), ("echo no driver; exit 9", []), ("exec sleep 60", [])],
)
def test_gpus_are_found_by_nvidia_smi(tmp_path, monkeypatch, script, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(devices, "SMI_TIMEOUT_S", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.nvidia_gpus(tmp_path / "none") == found
