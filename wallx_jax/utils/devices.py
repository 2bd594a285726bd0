"""Check that JAX runs on the requested platform.

When JAX cannot use a GPU it only logs a line and falls back to the CPU; a run would continue a hundred times slower.
"""

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import jax

from wallx_jax.utils.errors import UserError, one_line

INSTALL = "pip install 'jax[cuda12]'"
SMI_TIMEOUT_S = 20
_ALIASES = {"cuda": "gpu", "rocm": "gpu"}


class DeviceError(UserError, RuntimeError):
    """JAX does not have the requested devices; the message is meant for the user."""


def require(platform: str | None) -> str:
    """Return the platform that JAX computes on after checking that it is the requested one.

    Args:
        platform: the requested platform, "cpu", "gpu" or "tpu". "cpu" also selects the CPU, unless JAX has already
            been initialized. None accepts the platform in JAX_PLATFORMS or, if that is unset, any platform except the
            CPU of a machine with an NVIDIA GPU.

    Returns:
        "cpu", "gpu" or "tpu".

    Raises:
        DeviceError: JAX uses another platform or cannot start this one; the message gives the cause and the remedy.
    """
    named = jax.config.values["jax_platforms"] or ""
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    asked = platform or named.split(",")[0]
    by = f"platform = {platform!r}" if platform else f"JAX_PLATFORMS={named}"
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError if no plugin provides the platform
        why = one_line(error) if str(error) else "no plugin for it"
        raise DeviceError(f"{by}: JAX cannot start it ({why}); {_remedy(asked, found=None)}") from None
    if asked:
        if found != _ALIASES.get(asked, asked):
            raise DeviceError(
                f"{by} asks for the {asked.upper()}, but JAX uses the {found.upper()}; {_remedy(asked, found)}"
            )
    elif found == "cpu" and (gpus := nvidia_gpus()):
        raise DeviceError(
            f"this machine has {_counted(gpus)}, but JAX sees only the CPU; {_remedy('gpu', found)}. "
            "To use the CPU intentionally, set platform=cpu, or JAX_PLATFORMS=cpu in the environment"
        )
    return found


def nvidia_gpus(proc: Path = Path("/proc/driver/nvidia")) -> list[str]:
    """Return the names of the NVIDIA GPUs known to the driver, not to JAX; CUDA_VISIBLE_DEVICES="" or -1 hides all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    lines = [line for file in sorted(proc.glob("gpus/*/information")) for line in file.read_text("utf-8").splitlines()]
    if names := [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]:
        return names
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # do not hang if the driver hangs
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def cuda_plugins() -> dict[str, str]:
    """Return {package: version} of the installed JAX CUDA plugins."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("jax-cuda") and name.endswith("-plugin"):
            found[name] = distribution.version
    return found


def _remedy(asked: str, found: str | None) -> str:
    if _ALIASES.get(asked, asked) == "tpu":
        return "on a TPU machine: pip install 'jax[tpu]'"
    if _ALIASES.get(asked, asked) == "cpu":
        return "JAX had started before: set it before anything else, or JAX_PLATFORMS=cpu in the environment"
    if _ALIASES.get(asked, asked) != "gpu":
        return "known platforms are cpu, gpu (cuda) and tpu"
    plugins = cuda_plugins()
    if not plugins:
        return f"JAX's CUDA plugin is not installed: {INSTALL}"
    if not nvidia_gpus():
        return "no NVIDIA GPU is visible: see nvidia-smi, CUDA_VISIBLE_DEVICES and, in a container, --gpus all"
    installed = ", ".join(f"{name} {version}" for name, version in plugins.items())
    reason = "" if found is None else f" ({_failure()})"
    return (
        f"{installed} with jaxlib {importlib.metadata.version('jaxlib')} does not start{reason}: all three versions "
        f"must belong together ({INSTALL} -U), and the driver must be new enough for the plugin's CUDA"
    )


def _failure() -> str:
    """Return JAX's own error for why it has no GPU."""
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        return one_line(error)
    return "JAX_PLATFORMS or jax_platforms keeps it from the GPU"


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
