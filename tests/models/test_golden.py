"""The recorded numbers of the PyTorch models, through scripts/parity.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import parity
import pytest

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["cpu", "xla"])
@pytest.mark.parametrize("case", ["flow", "flow_ce", "fast"])
def test_wall_x(case, kernels):
    results = parity.run(FIXTURES / "golden", FIXTURES / "golden" / f"{case}.npz", kernels)
    assert len(results) > 15
    assert [result.line() for result in results if not result.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["cpu", "xla"])
@pytest.mark.parametrize("case", ["image", "mixed_padded", "text", "video"])
def test_qwen(case, kernels):
    results = parity.run(FIXTURES / "golden_qwen", FIXTURES / "golden_qwen" / f"{case}.npz", kernels)
    assert [result.line() for result in results if not result.ok] == []


@pytest.mark.medium
def test_wall_x_says_what_torch_says_after_a_state(tmp_path):
    """Greedy text of Wall-X weights, with images and a proprioception token in the prompt."""
    from safetensors.numpy import load_file, save_file

    golden = FIXTURES / "golden"
    with np.load(golden / "fast_continued.npz") as file:
        length, scale, said = int(file["length"]), float(file["layer_scale"]), file["out.gen_tokens"]
    tensors = load_file(golden / "model.safetensors")
    tensors = {n: x * scale if ".layers." in n and x.ndim > 1 else x for n, x in tensors.items()}
    tensors = {n: x.astype(np.float32) for n, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(golden / "config.json", tmp_path / "config.json")
    with np.load(golden / "fast.npz") as file:
        inputs = {k: file[k] for k in file.files if k.startswith("in.") and k != "in.labels" or k == "meta"}
    for name in ("in.input_ids", "in.attention_mask", "in.moe_token_types"):
        inputs[name] = inputs[name][:, :length]
    assert (inputs["in.input_ids"] == 665).sum() == 2 and len(set(said.ravel())) > 20

    def agrees(**changes) -> bool:
        np.savez(tmp_path / "case.npz", **{**inputs, "out.gen_tokens": said, **changes})
        (result,) = parity.run(tmp_path, tmp_path / "case.npz")
        return result.ok

    assert agrees()
    assert not agrees(**{"in.proprioception": -inputs["in.proprioception"]})


@pytest.mark.medium
def test_command_fails_on_wrong_weights_and_unknown_outputs(tmp_path):
    with np.load(FIXTURES / "golden_qwen" / "text.npz") as file:
        arrays = {key: file[key] for key in file.files if key.startswith("in.") or key == "out.position_ids"}
    golden, report = tmp_path / "case.npz", tmp_path / "report.json"
    command = [sys.executable, ROOT / "scripts" / "parity.py", "--model", FIXTURES / "golden_qwen"]
    command += ["--golden", golden, "--json", report]

    np.savez(golden, **arrays)
    assert subprocess.run(command, cwd=ROOT).returncode == 0

    arrays["out.position_ids"] = arrays["out.position_ids"] + 1
    arrays["out.unheard_of"] = np.zeros(3)
    np.savez(golden, **arrays)
    assert subprocess.run(command, cwd=ROOT).returncode == 1
    failed = {row["name"] for row in json.loads(report.read_text()) if not row["ok"]}
    assert failed == {"position_ids", "unheard_of"}


@pytest.mark.medium
def test_wrong_weights_fail(tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(FIXTURES / "golden_qwen", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.input_layernorm.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with np.load(FIXTURES / "golden_qwen" / "text.npz") as file:
        np.savez(tmp_path / "case.npz", **{k: file[k] for k in file.files if k != "out.gen_tokens"})
    failed = {result.name for result in parity.run(tmp_path / "model", tmp_path / "case.npz") if not result.ok}
    assert {"hidden_layers", "logits"} <= failed
