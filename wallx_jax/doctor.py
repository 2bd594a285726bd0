"""Check this installation, its devices and, optionally, a checkpoint; report problems and how to fix them.

    python -m wallx_jax.doctor [--platform {cpu,gpu,tpu}] [--checkpoint DIR]

The exit code is 0 if there are no problems. `--checkpoint` takes a checkpoint, a run or a PyTorch model directory, of
which only the headers are read.
"""

import argparse
import importlib.metadata
import logging
import os
import platform
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path

import jax
from huggingface_hub import constants
from packaging.requirements import Requirement

from wallx_jax.checkpoints.inspection import CheckpointReport, inspect_checkpoint
from wallx_jax.config.schema import Platform
from wallx_jax.models.param_summary import gib
from wallx_jax.utils import compile_cache, devices, extras
from wallx_jax.utils.errors import run_main
from wallx_jax.utils.files import unusable_folder
from wallx_jax.utils.versions import PACKAGES, package_version

SHOWN = (*PACKAGES, "torch")
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 1 << 30  # data workers pass batches through it; a container without --shm-size has 64 MiB
LEAST_OPEN_FILES = 1024


def look_at_packages(report: CheckpointReport) -> None:
    """Report package versions, and those that are missing or do not match this package's requirements."""
    found = {name: package_version(name) for name in SHOWN if name != "wallx-jax"}
    report.add("python", f"{platform.python_version()} on {platform.platform()}")
    report.add("packages", ", ".join(f"{name} {here}" for name, here in found.items() if here))
    try:
        report.add("wallx-jax", importlib.metadata.version("wallx-jax"))
        requirements = [Requirement(line) for line in importlib.metadata.requires("wallx-jax") or ()]
    except importlib.metadata.PackageNotFoundError:
        report.add("wallx-jax", "not installed, imported from the directory")
        return
    missing: dict[str, list[str]] = {}
    known = importlib.metadata.metadata("wallx-jax").get_all("Provides-Extra") or []
    for requirement in requirements:
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        here = package_version(requirement.name)
        if here is None and needed:
            report.problems.append(f"{requirement.name} is not installed: pip install '{requirement.name}'")
        elif here is None:
            for extra in known:
                if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                    missing.setdefault(extra, []).append(requirement.name)
        elif not requirement.specifier.contains(here, prereleases=True):
            wants = f"{requirement.name}{requirement.specifier}"
            report.problems.append(f"{requirement.name} {here} is installed, {wants} is wanted: pip install '{wants}'")
    for extra, names in missing.items():
        report.add("extra", f"{extra} is not complete, it lacks {', '.join(names)}: {extras.install(extra)}")


def look_at_devices(report: CheckpointReport, wanted: str | None) -> None:
    """Report the devices that JAX uses; a platform other than `wanted` is a problem (see `devices.require`)."""
    plugins = ", ".join(f"{name} {here}" for name, here in devices.cuda_plugins().items())
    gpus = Counter(devices.nvidia_gpus())
    report.add("NVIDIA", ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "no GPU is visible")
    report.add("CUDA plugin", plugins or f"not installed; for GPUs: {devices.INSTALL}")
    try:
        devices.require(wanted)
    except devices.DeviceError as error:
        report.problems.append(str(error))
        return
    kinds = Counter(device.device_kind for device in jax.devices())
    counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    report.add("devices", f"{counted} (platform {jax.default_backend()})")
    for device in jax.local_devices():
        if stats := device.memory_stats():
            limit = stats.get("bytes_limit", 0)
            report.add("memory", f"{device}: JAX may take {gib(limit)}, {gib(stats.get('bytes_in_use', 0))} are in use")


def explain_preallocation(report: CheckpointReport) -> None:
    """Report how much GPU memory JAX preallocates, and which environment variable controls it."""
    on = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    used = f"{share} (XLA_PYTHON_CLIENT_MEM_FRACTION)" if share else "75%"
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        text = "XLA_PYTHON_CLIENT_ALLOCATOR=platform: memory is taken and given back piece by piece, which is slow"
    elif on:
        text = (
            f"JAX takes {used} of a GPU's memory at its start, whatever it needs: nvidia-smi shows that share. "
            "XLA_PYTHON_CLIENT_PREALLOCATE=false takes it as needed, XLA_PYTHON_CLIENT_MEM_FRACTION=.9 another share"
        )
    else:
        text = f"XLA_PYTHON_CLIENT_PREALLOCATE=false: JAX takes a GPU's memory as needed, up to {used}"
    report.add("GPU memory", text)


def look_at_machine(report: CheckpointReport) -> None:
    """Report free disk space, caches, CPUs, shared memory and the limit on open files."""
    report.add("disk", f"{gib(shutil.disk_usage('.').free)} free here")
    for title, folder, variable in (
        ("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME"),
        ("XLA cache", compile_cache.default_folder(), "XDG_CACHE_HOME"),
    ):
        why = unusable_folder(folder)
        report.add(title, f"{folder}{f'; {why}: set {variable} to another folder' if why else ''}")
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if open_files < LEAST_OPEN_FILES:
        report.problems.append(f"{open_files} open files are allowed, too few for data workers: ulimit -n 4096")
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
    if shared is not None and shared < LEAST_SHARED_BYTES:
        report.problems.append(
            f"{SHARED_MEMORY} has {gib(shared)} free, data workers pass batches through it: in a container "
            "--shm-size=8g or --ipc=host, or train with num_workers=0"
        )
    report.add("workers", f"{os.cpu_count()} CPUs, {open_files} open files, {gib(shared or 0)} of shared memory free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=[*Platform], help="what JAX must compute on")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, run or PyTorch model directory to check")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the report replaces what JAX and Orbax log
    report = CheckpointReport()
    look_at_packages(report)
    explain_preallocation(report)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a run may be using the GPU
    look_at_devices(report, arguments.platform)
    look_at_machine(report)
    if arguments.checkpoint is not None:
        jax.config.update("jax_platforms", "cpu")  # read the checkpoint even if the requested devices are missing
        found = inspect_checkpoint(arguments.checkpoint)
        report.findings += ["", *found.findings]
        report.problems += found.problems
    print("\n".join(report.findings))
    if report.problems:
        sys.exit("\n".join(f"error: {problem}" for problem in report.problems))
    print("nothing is wrong")


if __name__ == "__main__":
    run_main(main)
