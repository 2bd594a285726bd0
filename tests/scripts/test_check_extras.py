"""What counts as a second CUDA; the command itself asks the package registry, and runs in `make extras`."""

import tomllib

import check_extras
import pytest
from helpers.guides import ROOT

CUDA12 = {"jax-cuda12-plugin": "0.10.2", "nvidia-cudnn-cu12": "9.28.0.42", "nvidia-cuda-runtime-cu12": "12.9.79"}
CUDA13 = {"jax-cuda13-plugin": "0.12.0", "nvidia-cublas": "13.1.0.3", "nvidia-cuda-runtime": "13.0.96"}


@pytest.mark.parametrize(
    ("packages", "versions"), [({}, set()), (CUDA12, {12}), (CUDA13, {13}), (CUDA12 | CUDA13, {12, 13})]
)
def test_versions_of_cuda(packages, versions):
    assert check_extras.cuda_versions(packages) == versions


def test_what_should_not_come_along():
    assert check_extras.problems(("train", "cuda12"), CUDA12) == []
    assert check_extras.problems(("train", "cuda12"), CUDA12 | CUDA13) == ["CUDA [12, 13] instead of [12]"]
    assert check_extras.problems(("train",), CUDA13) == ["CUDA [13] instead of []"]
    torch = {"torch": "2.10.0", "torchvision": "0.25.0"}
    assert check_extras.problems(("train",), torch) == ["torch, torchvision comes along"]
    assert check_extras.problems(("lerobot", "cuda13"), torch | CUDA12 | CUDA13) == []


def test_every_extra_is_in_a_combination():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    combinations = check_extras.combinations()
    assert set().union(*combinations) == set(declared) - {"dev"}
    assert len(combinations) == len(set(combinations)) == 18 * 4
